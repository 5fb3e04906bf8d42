"""Quantised activations from `compress` to a saved folder and back."""

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from round_trips import assert_same_model, outputs_of
from safetensors.torch import load_file, save_file
from tiny_models import TINY_MODELS
from torch import Tensor, nn

from hf_lossless import CheckpointError, LosslessCompressionConfig, compress
from hf_lossless.compression import CompressionResult
from hf_lossless.storage.layers import tensor_bytes
from hf_lossless.storage.modules.activations import QuantisedInput
from hf_lossless.storage.modules.base import CompressedModule
from hf_lossless.storage.plan import FORMAT_VERSION

MODELS = ["bert", "bert-mlm", "vit", "resnet", "gpt2", "t5"]


def config(**settings) -> LosslessCompressionConfig:
    return LosslessCompressionConfig(**{"theory": "curvature", "ratio": 1.2, "group_size": 16} | settings)


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 4))


def compressed(
    activation_bits: tuple[int | None, ...], model: nn.Module | None = None, **settings
) -> CompressionResult:
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(rows, 32, generator=generator), torch.randint(0, 4, (rows,), generator=generator))
        for rows in (8, 5)
    ]
    return compress(model or small_network(), batches, config(activation_bits=activation_bits, **settings))


@pytest.mark.parametrize("bits", [(None, 8), (None, 2, 4, 8), (8,), (4, 6)], ids=str)
@pytest.mark.parametrize("ratio", [1.5, 3, 5])
def test_sizes_and_predictions_count_activations(bits, ratio):
    result = compressed(bits, ratio=ratio)
    plain = compressed((None,), ratio=ratio)
    assert result.ratio >= ratio and result.plan.tensor_bytes == tensor_bytes(result.model)
    quantised = {name: layer.activation for name, layer in result.plan.layers.items() if layer.activation is not None}
    assert quantised and result.plan.activations == "quantised" and plain.plan.activations == "float"
    assert {grid.bits for grid in quantised.values()} <= set(bits)
    for name, layer in result.plan.layers.items():
        module = result.model.get_submodule(name)
        assert layer.cost_bytes == (
            module.weight_bytes if isinstance(module, CompressedModule) else module.weight.nbytes
        )
        if None not in bits and layer.kind != "kept":
            assert layer.activation is not None
    if None in bits:  # activations cost at most as much as weights
        assert result.frontier.predicted_loss_change[0] <= 2 * plain.frontier.predicted_loss_change[0] * 1.001


def test_by_default_activations_stay_in_floating_point():
    result = compressed((None,))
    assert result.plan.activations == "float" and "activation" not in json.dumps(result.plan.to_dict()["layers"])
    assert not any(isinstance(module, QuantisedInput) for module in result.model.modules())


def test_factors_with_quantised_inputs():
    result = compressed((4, 8), ranks={"0": 4, "2": 4}, bits=(16,), ratio=1.5)
    factored = {name: layer for name, layer in result.plan.layers.items() if layer.low_rank is not None}
    assert factored and all(layer.activation is not None for layer in factored.values())


class OddLayers(nn.Module):
    """A layer whose inputs are all zero, one with constant inputs, one that never runs, and a common one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.zeros, self.constant, self.idle, self.common = (nn.Linear(32, 32) for _ in range(4))
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        dead = self.zeros((x - 1e9).relu()) + self.constant(torch.full_like(x, 3.0))
        return self.head(self.common(x).tanh() + dead)


@pytest.mark.parametrize("bits", [(8,), (None, 4, 8)], ids=str)
def test_dead_layers(bits):
    result = compressed(bits, OddLayers(), ratio=1.2, bits=(4, 8))
    layers = result.plan.layers
    assert layers["idle"].kind == "kept" and layers["idle"].activation is None
    assert layers["zeros"].activation is not None or layers["zeros"].kind == "kept"
    assert layers["constant"].activation is not None
    assert torch.isfinite(result.model(torch.randn(3, 32))).all()


@pytest.fixture(scope="module", params=MODELS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    tiny, root = TINY_MODELS[request.param], tmp_path_factory.mktemp(request.param)
    tiny.build().save_pretrained(root / "original")
    settings = config(dataset=[tiny.batch(4, seed) for seed in (0, 1)], activation_bits=(4, 8), bits=(2,))
    model = tiny.auto_class.from_pretrained(root / "original", quantization_config=settings)
    model.save_pretrained(root / "small")
    return tiny, model, root / "small"


def test_reload_is_the_same_model(saved):
    tiny, model, folder = saved
    again, info = tiny.auto_class.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    plan = again.config.quantization_config.plan
    assert plan == model.config.quantization_config.plan and plan.activations == "quantised"
    assert "static" in {layer.activation.range for layer in plan.layers.values() if layer.activation}
    assert_same_model(again, model, tiny.inputs())
    assert_same_model(copy.deepcopy(again), model, tiny.inputs())
    assert sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values()) == plan.tensor_bytes
    for layer in plan.layers.values():
        assert layer.activation is None or not layer.tied


def test_scales_keep_their_dtype(saved):
    tiny, model, folder = saved
    as_loaded = tiny.auto_class.from_pretrained(folder, dtype=torch.bfloat16)
    as_cast = copy.deepcopy(model).to(torch.bfloat16)
    wanted = {name: value for name, value in model.state_dict().items() if ".activation." in name}
    assert wanted
    for twin in (as_loaded, as_cast):
        assert outputs_of(twin, tiny.inputs(dtype=torch.bfloat16)).dtype == torch.bfloat16
        for name, value in wanted.items():
            assert twin.state_dict()[name].dtype == value.dtype and torch.equal(twin.state_dict()[name], value)


def test_saving_what_was_reloaded_writes_the_same_bytes(saved, tmp_path: Path):
    tiny, _, folder = saved
    tiny.auto_class.from_pretrained(folder).save_pretrained(tmp_path)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / file).read_bytes() == (folder / file).read_bytes()


def test_gradients_reach_what_lies_below(saved):
    tiny, model, _ = saved
    twin = copy.deepcopy(model)
    twin(**tiny.batch()).loss.backward()
    biases = [parameter.grad for name, parameter in twin.named_parameters() if parameter.grad is not None]
    assert biases and all(gradient.isfinite().all() for gradient in biases)
    assert any(gradient.abs().sum() > 0 for gradient in biases)


def bert_folder(folder: Path) -> Path:
    tiny = TINY_MODELS["bert"]
    tiny.build().save_pretrained(folder / "original")
    settings = config(dataset=[tiny.batch(4)], activation_bits=(8,), bits=(4,), ratio=3)
    model = tiny.auto_class.from_pretrained(folder / "original", quantization_config=settings)
    model.save_pretrained(folder / "small")
    return folder / "small"


@pytest.mark.parametrize("change", ["missing", "bf16", "shape"])
def test_a_changed_scale_is_refused(tmp_path: Path, change: str):
    folder = bert_folder(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("activation.scale"))
    if change == "missing":
        del tensors[name]
    else:
        tensors[name] = tensors[name].bfloat16() if change == "bf16" else torch.ones(2)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    message = {"missing": "is missing", "bf16": "is of type BF16", "shape": r"has shape \[2\]"}[change]
    with pytest.raises(CheckpointError, match=f"'{name}'.*{message}"):
        hf.AutoModelForSequenceClassification.from_pretrained(folder)


def test_the_base_model_of_a_classifier(tmp_path: Path):
    base = hf.AutoModel.from_pretrained(bert_folder(tmp_path))
    plan = base.config.quantization_config.plan
    assert plan.activations == "quantised"
    base.save_pretrained(tmp_path / "base")
    assert hf.AutoModel.from_pretrained(tmp_path / "base").config.quantization_config.plan == plan


def test_a_model_that_took_no_quantised_layer_says_so(tmp_path: Path):
    tiny = TINY_MODELS["bert"]
    tiny.build().save_pretrained(tmp_path / "original")
    settings = config(
        dataset=[tiny.batch(4)], activation_bits=(8,), bits=(4,), ratio=1, modules_to_not_convert=["encoder", "pooler"]
    )
    model = tiny.auto_class.from_pretrained(tmp_path / "original", quantization_config=settings)
    assert [name for name, layer in model.config.quantization_config.plan.layers.items() if layer.activation] == [
        "classifier"
    ]
    model.save_pretrained(tmp_path / "small")
    base = hf.AutoModel.from_pretrained(tmp_path / "small")
    assert base.config.quantization_config.plan.activations == "float"
    base.save_pretrained(tmp_path / "base")
    hf.AutoModel.from_pretrained(tmp_path / "base")


def test_an_older_release_is_told_to_upgrade(tmp_path: Path):
    folder = bert_folder(tmp_path)
    entry = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert entry["format_version"] == FORMAT_VERSION and entry["plan"]["activations"] == "quantised"
