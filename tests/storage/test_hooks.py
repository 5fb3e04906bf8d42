"""Hooks of a layer are those of what replaces it; torch's fast path, which calls no layer, is not taken."""

import torch
from torch import Tensor, nn

from hf_lossless import LosslessCompressionConfig, compress
from hf_lossless.storage.layers import find_layers, left_out_bytes, left_out_text


def batches() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(16, 8), torch.arange(16) % 3)]


def test_hooks_stay_and_can_be_removed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    seen = []
    handle = model[2].register_forward_hook(lambda module, inputs, output: output * 3)
    model[0].register_forward_pre_hook(lambda module, inputs: seen.append(type(module).__name__))
    compress(model, batches(), LosslessCompressionConfig(bits=(8,), loss_budget=1e9))
    x = torch.randn(4, 8)
    hooked = model(x)
    assert seen[-1] == type(model[0]).__name__ == "PackedLinear"
    handle.remove()
    assert torch.equal(hooked, model(x) * 3)


def test_layer_whose_forward_was_replaced_is_left_alone():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    model[0].forward = lambda x: x * 2
    assert [layer.name for layer in find_layers(model)] == ["1"]


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder, self.out = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.encoder(x[:, None].expand(-1, 4, -1)).mean(1))


def test_fast_path_is_not_taken():
    torch.manual_seed(0)
    model = Encoder().eval()
    config = LosslessCompressionConfig(bits=(8,), activation_bits=(2,), loss_budget=1e9)
    result = compress(model, batches(), config)
    assert any(plan.activation is not None for plan in result.plan.layers.values())
    x = torch.randn(4, 8)
    slow = model(x)
    with torch.no_grad():
        assert torch.equal(model(x), slow)
        compiled = torch.compile(model, backend="eager")
        assert torch.allclose(compiled(x), slow, atol=1e-6)


def test_what_is_left_out_is_named_with_its_bytes():
    model = Encoder()
    found = left_out_bytes(model, find_layers(model))
    assert found == {f"encoder.layers.{layer}.self_attn.in_proj_weight": 24 * 8 * 4 for layer in range(2)}
    assert "MultiheadAttention.in_proj_weight (1,536 bytes)" in left_out_text(model, find_layers(model))
    linear = nn.Sequential(nn.Linear(2, 2))
    assert left_out_text(linear, find_layers(linear)) is None
