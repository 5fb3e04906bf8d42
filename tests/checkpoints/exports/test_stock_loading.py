"""Exports in stock transformers: one process, in which hf_lossless cannot be imported, loads and runs them all."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers as hf
from new_process import run_python
from round_trips import assert_same_outputs, outputs_of
from safetensors.torch import load_file
from tiny_exports import Planned, all_kinds, all_widths, dense_reference, save_compressed
from tiny_models import TINY_MODELS, TinyModel
from torch import Tensor

from hf_lossless import ExportResult, export
from hf_lossless.checkpoints.exports.convert import largest_move
from hf_lossless.storage.modules.base import compressed_layers

STOCK = """
import json, sys
sys.modules["hf_lossless"] = None  # an import of it fails from here on
import torch, transformers
from transformers.integrations.gemma_quant import QuantizedLinear
found = {}
for name, class_name, folder in json.load(open(sys.argv[1] + "/jobs.json")):
    model, info = getattr(transformers, class_name).from_pretrained(folder, output_loading_info=True)
    inputs = torch.load(f"{sys.argv[1]}/{name}.inputs")
    with torch.no_grad():
        outputs = model(**inputs)
    weights = {}
    for key, module in model.named_modules():
        packed = isinstance(module, QuantizedLinear)  # unlike the other format's, not unpacked by a forward pass
        weight = module._dequantize_weights(model.config.dtype) if packed else getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor):
            weights[key] = weight.detach()
    output = outputs.logits if "logits" in outputs else outputs.last_hidden_state
    found[name] = {"output": output, "weights": weights, "info": {key: list(value) for key, value in info.items()}}
torch.save(found, sys.argv[1] + "/found")
try:
    import hf_lossless
except ImportError:
    print("without hf_lossless")
"""


@dataclass(frozen=True)
class Case:
    """A tiny model, how it is compressed, and how it is exported."""

    model: str
    format: str
    plan: Callable[..., Planned]
    allow_dense: bool = False
    dtype: torch.dtype = torch.float32
    max_shard_size: str = "1GB"
    load_as: str | None = None
    """The class that the stock process loads it with; None: its own."""

    @property
    def tiny(self) -> TinyModel:
        return TINY_MODELS[self.model]


CASES = {
    **{f"dense-{name}": Case(name, "dense", all_kinds) for name in TINY_MODELS},
    "dense-sharded": Case("bert", "dense", all_kinds, max_shard_size="8KB"),
    "dense-bf16": Case("llama", "dense", all_kinds, dtype=torch.bfloat16),
    "dense-t5-fp16": Case("t5", "dense", all_kinds, dtype=torch.float16),
    "gemma-bert": Case("bert", "gemma", all_widths()),
    "gemma-llama": Case("llama", "gemma", all_widths()),
    "gemma-bart": Case("bart", "gemma", all_widths()),
    "gemma-nomic-bert": Case("nomic-bert", "gemma", all_widths()),
    "gemma-vit": Case("vit", "gemma", all_widths(), allow_dense=True),
    "gemma-resnet": Case("resnet", "gemma", all_widths(), allow_dense=True),
    "gemma-llama-tied": Case("llama-tied", "gemma", all_widths(), allow_dense=True),
    "gemma-t5": Case("t5", "gemma", all_widths(), allow_dense=True),
    "gemma-fp16": Case("bert", "gemma", all_widths(), dtype=torch.float16),
    "gemma-base": Case("bert", "gemma", all_widths(), load_as="BertModel"),
    "ct-bert": Case("bert", "compressed-tensors", all_widths(8), allow_dense=True),
    "ct-rows": Case("bert", "compressed-tensors", all_widths(), allow_dense=True),
    "ct-kinds": Case("bert", "compressed-tensors", all_kinds, allow_dense=True),
    "ct-fp16": Case("bert", "compressed-tensors", all_widths(8), allow_dense=True, dtype=torch.float16),
    "ct-llama": Case("llama", "compressed-tensors", all_widths(16), allow_dense=True),
    "ct-llama-tied": Case("llama-tied", "compressed-tensors", all_widths(16), allow_dense=True),
    "ct-nomic-bert": Case("nomic-bert", "compressed-tensors", all_widths(8), allow_dense=True),
    "ct-vit": Case("vit", "compressed-tensors", all_widths(8), allow_dense=True),
    "ct-convnext": Case("convnext", "compressed-tensors", all_widths(4), allow_dense=True),
    "ct-mixtral": Case("mixtral", "compressed-tensors", all_widths(8), allow_dense=True),
    "ct-base": Case("bert", "compressed-tensors", all_widths(8), allow_dense=True, load_as="BertModel"),
    # Scales are rounded to bfloat16 here.
    "gemma-bf16": Case("llama", "gemma", all_widths(), dtype=torch.bfloat16),
    "ct-bf16": Case("llama", "compressed-tensors", all_widths(8), allow_dense=True, dtype=torch.bfloat16),
}
if find_spec("compressed_tensors") is None:
    CASES = {name: case for name, case in CASES.items() if not name.startswith("ct-")}
ROUNDED = [name for name in ("gemma-bf16", "ct-bf16") if name in CASES]
EXACT = [name for name in CASES if name not in ROUNDED]


@dataclass(frozen=True)
class Loaded:
    """A case in the stock process, and what it was made from."""

    case: Case
    compressed: hf.PreTrainedModel
    result: ExportResult
    folder: Path
    output: Tensor
    weights: dict[str, Tensor]
    info: dict[str, list[str]]

    @property
    def inputs(self) -> dict[str, Tensor]:
        return self.case.tiny.inputs(dtype=self.case.dtype)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loaded]:
    root = tmp_path_factory.mktemp("exports")
    made, jobs = {}, []
    for name, case in CASES.items():
        tiny, folder, out = case.tiny, root / f"{name}-small", root / name
        compressed = save_compressed(tiny, folder, case.plan, case.dtype, case.max_shard_size)
        made[name] = compressed, export(folder, out, case.format, allow_dense=case.allow_dense), out
        jobs.append((name, case.load_as or tiny.model_class.__name__, str(out)))
        torch.save(tiny.inputs(dtype=case.dtype), root / f"{name}.inputs")
    (root / "jobs.json").write_text(json.dumps(jobs))
    stock = run_python(STOCK, root)
    assert stock.returncode == 0, stock.stderr[-3000:]
    assert stock.stdout.endswith("without hf_lossless\n")
    found = torch.load(root / "found")
    return {name: Loaded(case, *made[name], **found[name]) for name, case in CASES.items()}


def test_compressed_tensors_is_there():
    if find_spec("compressed_tensors") is None:
        pytest.skip("compressed-tensors is not installed, so exports for it are not tested")


@pytest.mark.parametrize("name", EXACT)
def test_the_outputs_are_those_of_the_dense_reference(loaded: dict[str, Loaded], name: str, tmp_path: Path):
    one = loaded[name]
    reference = dense_reference(one.case.tiny, one.compressed, tmp_path)
    reference = reference if one.case.load_as is None else reference.base_model
    assert_same_outputs(one.output, outputs_of(reference.eval(), one.inputs))
    assert one.output.dtype == one.case.dtype
    assert not one.result.rounded


@pytest.mark.parametrize("name", ROUNDED)
def test_rounded_scales_move_weights_by_no_more_than_is_said(loaded: dict[str, Loaded], name: str, tmp_path: Path):
    one = loaded[name]
    assert one.result.rounded and set(one.result.rounded) <= set(one.result.converted)
    reference = dense_reference(one.case.tiny, one.compressed, tmp_path)
    for layer, module in compressed_layers(one.compressed).items():
        theirs, ours = one.weights[layer], module.weight.detach()
        moves = (theirs.double() - ours.double()).abs()
        assert bool((moves <= largest_move(torch.bfloat16) * ours.double().abs()).all())
        assert bool(moves.any()) == (layer in one.result.rounded)
        reference.get_submodule(layer).weight.data = theirs
    assert_same_outputs(one.output, outputs_of(reference.eval(), one.inputs))


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_finds_its_place(loaded: dict[str, Loaded], name: str):
    one = loaded[name]
    astray = {key: names for key, names in one.info.items() if names}
    if one.case.load_as is not None:  # a base model leaves the head aside
        assert all(name.startswith("classifier") for name in astray.pop("unexpected_keys"))
    assert not astray


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_is_what_is_said(loaded: dict[str, Loaded], name: str):
    one = loaded[name]
    stored = {key: tensor for file in one.folder.glob("*.safetensors") for key, tensor in load_file(file).items()}
    config = json.loads((one.folder / "config.json").read_text())
    entry = config.get("quantization_config")
    entry_bytes = 0
    if entry is not None:
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        del config["quantization_config"]
        entry_bytes = len(text) - len(json.dumps(config, indent=2, sort_keys=True) + "\n")
    assert (one.folder / "config.json").stat().st_size - entry_bytes > 0
    assert one.result.size_bytes == sum(tensor.nbytes for tensor in stored.values()) + entry_bytes
    assert (entry is None) == (one.case.format == "dense")
    assert "certificate" not in json.dumps(config) and "lossless" not in json.dumps(config)
    if one.case.format == "dense":
        assert not one.result.dense and all(
            tensor.is_floating_point() or tensor.numel() == 1 for tensor in stored.values()
        )
    elif not one.case.allow_dense:
        assert not one.result.dense
    modules = compressed_layers(one.compressed)
    assert modules.keys() == {*one.result.converted, *one.result.dense}
    if one.case.format == "compressed-tensors":
        packed = {key.removesuffix(".weight_packed") for key in stored if key.endswith(".weight_packed")}
        assert packed == set(one.result.converted)
    for layer in one.result.dense:
        assert stored[f"{layer}.weight"].is_floating_point()


def test_narrow_layers_stay_small(loaded: dict[str, Loaded]):
    """Packed, the codes take the bits that their container has: nothing is blown up to bytes on the way."""
    one = loaded["gemma-bert"]
    stored = load_file(one.folder / "model.safetensors")
    containers = {1: 2, 2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}
    for name, module in compressed_layers(one.compressed).items():
        out_features, in_features = module.matrix_shape
        part = "embedding_quantized" if module.kind == "embedding" else "weight"
        assert stored[f"{name}.{part}"].nbytes == out_features * in_features * containers[module.grid.bits] // 8
