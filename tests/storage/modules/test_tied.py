"""Modules that compute with another layer's weight, whatever that layer is stored as."""

import copy

import pytest
import torch
from rounded_plans import apply_rounded
from tiny_plans import by_hand
from torch import nn

from hf_lossless.storage.layers import find_layers
from hf_lossless.storage.modules.low_rank import LowRankModule
from hf_lossless.storage.modules.tied import TiedEmbedding, TiedLinear

VOCABULARY, DIM = 30, 16
STORED = {
    "grid": {"kind": "grid"},
    "float": {"kind": "low_rank"},
    "packed": {"kind": "low_rank", "left": 4, "right": 5},
    "sum": {"kind": "sum", "left": 4},
}


class Language(nn.Module):
    """An embedding and a decoder with one weight; the decoder may be defined first, and so be its home."""

    def __init__(self, decoder_first: bool) -> None:
        super().__init__()
        parts = {"embedding": nn.Embedding(VOCABULARY, DIM, padding_idx=1), "decoder": nn.Linear(DIM, VOCABULARY)}
        for name in sorted(parts, reverse=not decoder_first):
            self.add_module(name, parts[name])
        self.decoder.weight = self.embedding.weight

    def forward(self, indices):
        return self.decoder(self.embedding(indices).tanh())


def compressed(model: Language, **settings) -> Language:
    (layer,) = find_layers(model)
    plan, factors = by_hand(layer, **settings)
    return apply_rounded(model, {layer.name: plan}, {} if factors is None else {layer.name: factors})


@pytest.mark.parametrize("decoder_first", [False, True], ids=["embedding-is-home", "decoder-is-home"])
@pytest.mark.parametrize("stored", STORED)
def test_embedding_and_decoder(monkeypatch: pytest.MonkeyPatch, stored: str, decoder_first: bool):
    torch.manual_seed(0)
    model = Language(decoder_first)
    twin = compressed(copy.deepcopy(model), **STORED[stored])
    if decoder_first:
        home, tied = twin.decoder, twin.embedding
        assert isinstance(tied, TiedEmbedding) and (tied.num_embeddings, tied.embedding_dim) == (VOCABULARY, DIM)
    else:
        home, tied = twin.embedding, twin.decoder
        assert isinstance(tied, TiedLinear) and (tied.out_features, tied.in_features) == (VOCABULARY, DIM)
    assert tied.home is home and not any(name.startswith("home") for name, _ in tied.named_modules())
    assert torch.equal(tied.weight, home.weight)
    assert twin.decoder.bias is not None and torch.equal(twin.decoder.bias, model.decoder.bias)

    model.embedding.weight.data = home.weight.detach().clone()
    model.decoder.weight = model.embedding.weight
    indices = torch.tensor([[0, 1, 29], [4, 4, 7]])
    monkeypatch.setattr(LowRankModule, "matrix", None)  # nobody needs it
    torch.testing.assert_close(twin(indices), model(indices), rtol=1e-5, atol=1e-5)

    copied = copy.deepcopy(twin)
    assert (copied.embedding if decoder_first else copied.decoder).home is (
        copied.decoder if decoder_first else copied.embedding
    )
    assert torch.equal(copied(indices), twin(indices))
    for tensor in twin.state_dict().values():
        tensor.zero_()
    assert copied(indices).abs().sum() > 0


@pytest.mark.parametrize("stored", STORED)
def test_the_weight_is_stored_once(stored: str):
    model = compressed(Language(False), **STORED[stored])
    assert {name for name in model.state_dict() if name.startswith("decoder")} == {"decoder.bias"}


@pytest.mark.parametrize("stored", STORED)
def test_a_cast_goes_with_the_home(stored: str):
    model = compressed(Language(False), **STORED[stored]).to(torch.bfloat16)
    assert model.decoder.weight.dtype == torch.bfloat16
    assert model(torch.tensor([[0, 1]])).dtype == torch.bfloat16
