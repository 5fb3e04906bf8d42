"""ONNX files in onnxruntime against the models that they were made of."""

import copy
import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from tiny_checkpoints import tokenizer
from tiny_exports import Planned, all_kinds, all_widths, save_compressed
from tiny_models import IMAGE, TINY_MODELS, TinyModel
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_lossless import CheckpointError, ConfigurationError, LayerPlan, export
from hf_lossless.checkpoints.exports.onnx import check, signature, swap
from hf_lossless.checkpoints.exports.onnx import export as onnx_export
from hf_lossless.checkpoints.exports.onnx.levels import Levels
from hf_lossless.checkpoints.exports.onnx.planes import Planes
from hf_lossless.storage.activation_grid import may_quantise_input
from hf_lossless.storage.entropy.matrix import CodedMatrix, encode
from hf_lossless.storage.entropy.steps import decode_steps, encode_steps
from hf_lossless.storage.layers import Layer
from hf_lossless.storage.plan import ActivationGrid, CodedGrid, Damping
from hf_lossless.storage.runtime.optimize import optimize
from hf_lossless.storage.values import EncodedMatrix

if any(find_spec(name) is None for name in ("onnx", "onnxruntime", "onnxscript")):
    pytest.skip("onnx, onnxruntime or onnxscript is not installed", allow_module_level=True)

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # torch.export's, about its own insides
    pytest.mark.slow,
]


def of_one_layer(tiny: TinyModel) -> TinyModel:
    """An export takes its time for every layer."""
    config = copy.deepcopy(tiny.config)
    config.num_hidden_layers = 1
    return dataclasses.replace(tiny, config=config)


BERT = of_one_layer(TINY_MODELS["bert"])
MODELS = {
    "bert": BERT,
    **{name: of_one_layer(TINY_MODELS[name]) for name in ("gpt2", "llama-tied", "vit")},
    "resnet": TINY_MODELS["resnet"],
}
FLOAT, INT8 = 1e-4, 0.1
"""How far outputs may differ from the model's, in parts of their size: by rounding, and by 8-bit inputs."""


def coded(index: int, layer: Layer) -> Planned:
    """Codes of some 4 bits, and in every third layer single ones of 7, 9 and 17 bits."""
    generator = np.random.default_rng(index)
    matrix = layer.matrix.detach().numpy()
    rows = decode_steps(*encode_steps(np.float32(np.abs(matrix).max(1) / 7 + 1e-3)))
    columns = decode_steps(*encode_steps(generator.uniform(0.5, 2, matrix.shape[1]).astype(np.float32)))
    codes = np.rint(matrix / rows[:, None] / columns).astype(np.int32)
    if index % 3 == 0 and codes.shape[1] > 3:
        for place, code in enumerate((70, -300, 70_000)):
            codes[place % len(codes), place] = code
            columns[place] = decode_steps(*encode_steps(np.float32([1 / abs(code)])))[0]
    content = encode(found := CodedMatrix.of(codes, rows, columns))
    grid = CodedGrid(step=1.0, damping=Damping(rows=0.1, columns=0.1), shape=matrix.shape)
    plan = LayerPlan(kind="coded", coded=grid, cost_bytes=len(content), predicted_loss_change=0.0, tied=layer.tied)
    return plan, EncodedMatrix(found, content)


def quantised_inputs(index: int, layer: Layer) -> Planned:
    """8 bits, and dynamic 8-bit inputs where there may be."""
    plan, _ = all_widths(16)(7, layer)
    inputs = ActivationGrid(bits=8, range="dynamic") if may_quantise_input(layer.kind, layer.tied) else None
    return plan.model_copy(update={"activation": inputs}), None


@dataclass(frozen=True)
class Case:
    """A tiny model, how it is compressed, what its graph is for, and how far its outputs may move."""

    model: str
    plan: object
    runtime: str
    limit: float
    operators: tuple[str, ...] = ()
    """Some that the graph has."""


CASES = {
    "bert-kinds-fast": Case("bert", all_kinds, "fast", 2 * INT8, ("MatMulIntegerToFloat", "BitwiseAnd")),
    "bert-kinds-small": Case("bert", all_kinds, "small", INT8, ("MatMulNBits",)),
    "bert-kinds-standard": Case("bert", all_kinds, "standard", FLOAT, ("DequantizeLinear",)),
    "bert-coded-fast": Case("bert", coded, "fast", INT8, ("MatMulIntegerToFloat",)),
    "bert-coded-small": Case("bert", coded, "small", INT8, ("MatMulNBits",)),
    "bert-inputs-fast": Case("bert", quantised_inputs, "fast", 0.01, ("MatMulNBits",)),
    "gpt2-coded-fast": Case("gpt2", coded, "fast", INT8),
    "llama-tied-kinds-small": Case("llama-tied", all_kinds, "small", INT8),
    "vit-widths-small": Case("vit", all_widths(), "small", INT8),
    "resnet-coded-fast": Case("resnet", coded, "fast", INT8),
    "resnet-kinds-small": Case("resnet", all_kinds, "small", INT8, ("DequantizeLinear",)),
}


def outputs_in_onnxruntime(folder: Path, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    run = check.session(folder / "onnx/model.onnx")
    names = [one.name for one in run.get_outputs()]
    feeds = {one.name: inputs[one.name].numpy() for one in run.get_inputs()}
    return dict(zip(names, map(torch.from_numpy, run.run(names, feeds)), strict=True))


def difference(theirs: Tensor, ours: Tensor) -> float:
    return float((theirs.double() - ours.double()).norm() / ours.double().norm())


def operators(folder: Path) -> Counter[str]:
    import onnx

    return Counter(node.op_type for node in onnx.load(folder / "onnx/model.onnx").graph.node)


@pytest.mark.parametrize("name", CASES)
def test_computes_what_the_model_computes(name: str, tmp_path: Path):
    case = CASES[name]
    tiny = MODELS[case.model]
    model = optimize(save_compressed(tiny, tmp_path / "small", case.plan), "exact")
    processor = {"size": {"height": IMAGE, "width": IMAGE}}  # a ResNet's config does not know how large images are
    (tmp_path / "small/preprocessor_config.json").write_text(json.dumps(processor))
    result = export(tmp_path / "small", tmp_path / "out", "onnx", runtime=case.runtime)
    assert (result.runtime, result.size_bytes) == (case.runtime, (tmp_path / "out/onnx/model.onnx").stat().st_size)
    for rows in (1, 4):
        inputs = tiny.inputs(rows, seed=rows)
        with torch.no_grad():
            expected = model(**inputs)[0]
        given = {**inputs, "token_type_ids": torch.zeros_like(inputs.get("input_ids", torch.empty(0)))}
        [found] = outputs_in_onnxruntime(tmp_path / "out", given).values()
        assert difference(found, expected) < case.limit
    found = operators(tmp_path / "out")
    assert all(found[name] for name in case.operators), found
    if case.runtime == "standard":
        assert not re.search(rb"com\.microsoft.{0,9}$", (tmp_path / "out/onnx/model.onnx").read_bytes()[-64:])


class Unpacked(nn.Module):
    """Codes of all widths, as they come out of their planes."""

    def __init__(self, codes: list[Tensor]) -> None:
        super().__init__()
        self.planes = nn.ModuleList(Planes(one) for one in codes)

    def forward(self, rows: Tensor) -> tuple[Tensor, ...]:
        return tuple(form() for form in self.planes) + tuple(form(rows) for form in self.planes)


class Products(nn.Module):
    """One input through several linear forms."""

    def __init__(self, forms: list[nn.Module]) -> None:
        super().__init__()
        self.forms = nn.ModuleList(forms)

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        return tuple(form(input, None) for form in self.forms)


def run(module: nn.Module, input: Tensor, path: Path) -> list[np.ndarray]:
    """What onnxruntime makes of a module."""
    with torch.no_grad():
        graph = torch.onnx.export(module, (input,), dynamo=True, opset_version=21, verbose=False)
    onnx_export.pack_int4(graph.model)
    graph.save(path)
    session = check.session(path)
    return session.run(None, {session.get_inputs()[0].name: input.numpy()})


def test_planes_give_back_codes_of_every_width(tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    codes = [
        torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (7, 13), generator=generator, dtype=torch.int32)
        for bits in (*range(1, 9), 12, 20)
    ]
    for one, bits in zip(codes, (*range(1, 9), 12, 20), strict=True):
        one[0, 0] = -(2 ** (bits - 1))
    rows = torch.tensor([[3, 0], [6, 3]])
    found = run(Unpacked(codes), rows, tmp_path / "planes.onnx")
    for ours, whole, some in zip(codes, found, found[len(codes) :], strict=False):
        assert torch.equal(torch.from_numpy(whole), ours.float())
        assert torch.equal(torch.from_numpy(some), ours.float()[rows])


class _Module:
    """What a form asks of the module whose place it takes."""

    activation = None


@pytest.mark.parametrize(("runtime", "limit"), [("fast", 0.03), ("small", 0.03), ("standard", 1e-5)])
def test_products_of_every_width_and_group(runtime: str, limit: float, tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    levels = []
    for bits in range(1, 9):
        codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (9, 40), generator=generator, dtype=torch.int32)
        size = (40, 16, 32, 7)[bits % 4]
        scales = torch.rand(9, -(-40 // size), generator=generator) + 0.5
        levels.append(Levels(codes, scales, size, zeros=torch.rand(scales.shape, generator=generator) * 3))
        levels.append(Levels(codes, scales, size))
        levels.append(Levels(codes * 3, scales[:, :1], 40, torch.rand(40, generator=generator) + 0.5))
    input = torch.randn(5, 40, generator=generator)
    shared = swap.SharedInputs()
    forms = [swap._LINEAR[runtime](one, _Module(), shared) for one in levels]
    found = run(Products(forms), input, tmp_path / "products.onnx")
    for one, theirs in zip(levels, found, strict=True):
        assert difference(torch.from_numpy(theirs), input @ one.dense.T) < limit


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed BERT with its tokenizer."""
    folder = tmp_path_factory.mktemp("onnx") / "small"
    save_compressed(BERT, folder, all_widths(16))
    tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text("of the compressed model")
    return folder


def test_the_folder_and_the_command(small: Path, tmp_path: Path, output_of: Callable[..., str]):
    out = tmp_path / "out"
    said = output_of("export", small, "--format", "onnx", "--runtime", "small", "--out", out)
    assert "11 of 11 compressed layers converted\nrun time small: on random inputs its outputs differ" in said
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert names == {"onnx/model.onnx", "config.json", "tokenizer.json", "tokenizer_config.json"}
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config and config["architectures"] == ["BertForSequenceClassification"]
    assert config["transformers.js_config"] == {"dtype": "fp32"}  # no suffix in the file's name
    assert hf.AutoConfig.from_pretrained(out).num_labels == 3
    assert AutoTokenizer.from_pretrained(out)("w5 w6") == AutoTokenizer.from_pretrained(small)("w5 w6")
    content = (out / "onnx/model.onnx").read_bytes()
    assert b"site-packages" not in content and b"hf_lossless/" not in content  # torch notes where a node comes from
    graph = check.session(out / "onnx/model.onnx")
    assert [one.name for one in graph.get_inputs()] == ["input_ids", "attention_mask", "token_type_ids"]
    assert all(one.shape == ["batch_size", "sequence_length"] for one in graph.get_inputs())


def test_a_base_model(tmp_path: Path):
    save_compressed(BERT, tmp_path / "small", all_widths(16))
    base = hf.BertModel.from_pretrained(tmp_path / "small")
    (tmp_path / "out").mkdir()
    written = onnx_export.write_onnx(base, tmp_path / "small", tmp_path / "out", "standard")
    assert written.difference < FLOAT
    found = outputs_in_onnxruntime(
        tmp_path / "out", {**BERT.inputs(), "token_type_ids": torch.zeros(3, 8, dtype=torch.int64)}
    )
    assert list(found) == ["last_hidden_state", "pooler_output"]


def test_the_model_is_left_as_it_was(small: Path):
    model = AutoModelForSequenceClassification.from_pretrained(small)
    optimize(model, "exact")
    inputs, before = BERT.inputs(), list(model.state_dict())
    with torch.no_grad():
        expected = model(**inputs).logits
        with pytest.raises(ZeroDivisionError), swap.onnx_forms(model, "small", inputs):
            assert list(model.state_dict()) != before
            raise ZeroDivisionError
        assert torch.equal(model(**inputs).logits, expected)
    assert list(model.state_dict()) == before


def test_another_model_is_found_before_the_folder_appears(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Were the codes shifted by one, all would load and run."""
    levels_of = swap.levels_of

    def shifted(module: object) -> Levels:
        levels = levels_of(module)
        return Levels(levels.codes.roll(1, 1), levels.scales, levels.group_size, levels.column_steps, levels.zeros)

    monkeypatch.setattr(swap, "levels_of", shifted)
    with pytest.raises(
        ConfigurationError, match=r"runtime='standard' gives outputs that differ by .* allowed is 0\.001"
    ):
        export(small, tmp_path / "out", "onnx", runtime="standard")
    assert not list(tmp_path.iterdir())


def test_what_is_refused(small: Path, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(
        ConfigurationError, match=r"runtime='quick' is unknown to the format onnx\. Take one of fast, sm"
    ):
        export(small, tmp_path / "out", "onnx", runtime="quick")
    with pytest.raises(
        ConfigurationError, match=r"runtime='fast' is for the format onnx, not for dense\. Leave it out"
    ):
        export(small, tmp_path / "out", "dense", runtime="fast")
    with pytest.raises(CheckpointError, match="holds no model compressed by hf_lossless"):
        export(text_folder, tmp_path / "out", "onnx")
    monkeypatch.setattr(onnx_export, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(
        ConfigurationError, match=r'onnxscript is not installed\. Install them: pip install "hf-lossless\['
    ):
        export(small, tmp_path / "out", "onnx")
    assert not list(tmp_path.iterdir())


def test_a_truncated_folder_is_refused(small: Path, tmp_path: Path):
    import shutil

    shutil.copytree(small, tmp_path / "small")
    weights = tmp_path / "small/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="truncated"):
        export(tmp_path / "small", tmp_path / "out", "onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("t5", "T5ForConditionalGeneration has an encoder and a decoder, .* Take another format"),
        ("bart", "BartForConditionalGeneration has an encoder and a decoder"),
    ],
)
def test_models_without_one_graph_are_refused_by_name(name: str, why: str, tmp_path: Path):
    with pytest.raises(ConfigurationError, match=why):
        signature.signature_of(TINY_MODELS[name].build(), tmp_path)


def test_inputs_and_images(tmp_path: Path):
    roberta = signature.signature_of(TINY_MODELS["roberta"].build(), tmp_path)
    assert list(roberta.axes) == ["input_ids", "attention_mask", "token_type_ids"]
    assert roberta.longest == 14  # its 16 positions begin at 2
    distilbert = signature.signature_of(TINY_MODELS["distilbert"].build(), tmp_path)
    assert list(distilbert.axes) == ["input_ids", "attention_mask"]
    assert signature.signature_of(TINY_MODELS["vit"].build(), tmp_path).image == (3, 32, 32)
    resnet = TINY_MODELS["resnet"].build()
    assert signature.signature_of(resnet, tmp_path).image == (3, 224, 224)
    for said, sides in (
        ({"size": {"height": 28, "width": 30}}, (28, 30)),
        ({"size": {"shortest_edge": 64}}, (64, 64)),
        ({"size": {"shortest_edge": 64}, "do_center_crop": True, "crop_size": {"height": 56, "width": 56}}, (56, 56)),
        ({"size": 40}, (40, 40)),
    ):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
        assert signature.signature_of(resnet, tmp_path).image == (3, *sides)
