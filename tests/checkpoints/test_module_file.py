"""A plain module is saved in one file and loaded again: tied weights, unsaved buffers, shared memory, any dtype."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hf_lossless import CheckpointError, LosslessCompressionConfig, compress, load_module, save_module

WORDS = 40


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.middle = nn.Embedding(WORDS, 32), nn.Linear(32, 32)
        self.out = nn.Linear(32, WORDS, bias=False)
        self.out.weight = self.words.weight
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 32), persistent=False)
        self.register_buffer("first", self.scale[:16], persistent=True)  # a view of the other
        self.norm = nn.BatchNorm1d(32)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.norm(self.middle(self.words(ids).mean(1)) * self.scale) * self.first.mean())


SETTINGS = {
    "3bit": {"bits": (3,), "loss_budget": 1e9},
    "kept tie": {"bits": (3,), "loss_budget": 1e9, "modules_to_not_convert": ["words"]},
    "ranks": {"bits": (3,), "ranks": "auto", "loss_budget": 1e9},
    "coded": {"storage": "entropy", "loss_budget": 1e9},
}


def ids(rows: int = 8) -> Tensor:
    return torch.randint(WORDS, (rows, 6), generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize("place", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_round_trip(tmp_path: Path, setting: str, dtype: torch.dtype, place: str):
    torch.manual_seed(0)
    model = Tied().eval()
    result = compress(model, [(ids(), torch.arange(8))], LosslessCompressionConfig(**SETTINGS[setting]))
    model.to(dtype)
    save_module(tmp_path / "small.safetensors", model, result)
    with torch.device(place):
        again = load_module(tmp_path / "small.safetensors", Tied())
    # Products of float32 factors differ in the last bit with where in memory a file's tensors come to lie.
    torch.testing.assert_close(again(ids(5)), model(ids(5)), rtol=1e-6, atol=1e-6)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert again.first.dtype == dtype and not again.training
    if setting == "kept tie":
        assert again.out.weight is again.words.weight
        size_bytes = (tmp_path / "small.safetensors").stat().st_size
        assert size_bytes < sum(one.nbytes for one in Tied().state_dict().values())  # the weight is there once
    save_module(tmp_path / "again.safetensors", again, result.plan)
    third = load_module(tmp_path / "again.safetensors", Tied())
    torch.testing.assert_close(third(ids(5)), model(ids(5)), rtol=1e-6, atol=1e-6)


def test_refusals(tmp_path: Path):
    model = Tied().eval()
    path = tmp_path / "small.safetensors"
    result = compress(model, [(ids(), torch.arange(8))], LosslessCompressionConfig(**SETTINGS["3bit"]))
    with pytest.raises(CheckpointError, match=r"the layer 'middle' is not compressed in this Tied"):
        save_module(path, Tied(), result)
    save_module(path, model, result)

    class More(Tied):
        def __init__(self):
            super().__init__()
            self.more = nn.Parameter(torch.zeros(3))

    with pytest.raises(CheckpointError, match=r"the tensor 'more' is missing from .*Build the model as the original"):
        load_module(path, More())

    class Attribute(Tied):
        def __init__(self):
            super().__init__()
            self.table = torch.zeros(3)

    load_module(path, Attribute())
    with torch.device("meta"), pytest.raises(CheckpointError, match=r"table is a tensor that is neither parameter nor"):
        load_module(path, Attribute())
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"cannot be read: .*Take the file again"):
        load_module(path, Tied())
