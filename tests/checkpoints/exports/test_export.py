"""What is refused, what comes along, what is said; how exports load is in test_stock_loading.py."""

import json
import re
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from round_trips import assert_same_outputs, outputs_of
from tiny_checkpoints import tokenizer
from tiny_exports import Planned, all_widths, save_compressed
from tiny_models import TINY_MODELS
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_lossless import CheckpointError, ConfigurationError, export
from hf_lossless.checkpoints.exports import export as export_module
from hf_lossless.checkpoints.exports import gemma
from hf_lossless.checkpoints.saved_folder import SavedFolder
from hf_lossless.storage.activation_grid import may_quantise_input
from hf_lossless.storage.layers import Layer
from hf_lossless.storage.modules.base import compressed_layers
from hf_lossless.storage.plan import ActivationGrid

BERT = TINY_MODELS["bert"]
needs_compressed_tensors = pytest.mark.skipif(
    find_spec("compressed_tensors") is None, reason="compressed-tensors is not installed"
)


def quantised_inputs(index: int, layer: Layer) -> Planned:
    """8 bits per output, and dynamic 8-bit inputs where there may be."""
    plan, _ = all_widths()(7, layer)
    inputs = ActivationGrid(bits=8, range="dynamic") if may_quantise_input(layer.kind, layer.tied) else None
    return plan.model_copy(update={"activation": inputs}), None


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed BERT with its tokenizer and what else may lie beside it."""
    folder = tmp_path_factory.mktemp("exports") / "small"
    save_compressed(BERT, folder, all_widths(8))
    tokenizer().save_pretrained(folder)
    for name in ("README.md", "frontier.png", "report.html", "LICENSE", "vocab.txt", ".gitattributes"):
        (folder / name).write_text(name)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool.jinja").write_text("{{ tools }}")
    (folder / "checkpoint-5").mkdir()
    return folder


@pytest.fixture(scope="module")
def small_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed BERT whose layers have quantised inputs."""
    folder = tmp_path_factory.mktemp("exports") / "small"
    save_compressed(BERT, folder, quantised_inputs)
    return folder


def test_files_of_the_tokenizer_come_along_and_claims_do_not(small: Path, tmp_path: Path):
    export(small, tmp_path / "new/dense", "dense")
    copied = {"tokenizer.json", "tokenizer_config.json", "vocab.txt", "LICENSE", "additional_chat_templates"}
    assert {path.name for path in (tmp_path / "new/dense").iterdir()} == {*copied, "config.json", "model.safetensors"}
    assert (tmp_path / "new/dense/additional_chat_templates/tool.jinja").exists()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["dense"]
    words = AutoTokenizer.from_pretrained(small)("w5 w6")
    assert AutoTokenizer.from_pretrained(tmp_path / "new/dense")("w5 w6") == words


def test_layers_that_a_format_cannot_carry_are_listed(small: Path, tmp_path: Path):
    with pytest.raises(ConfigurationError) as refused:
        export(small, tmp_path / "out", "gemma")
    message = str(refused.value)
    assert message.startswith("the format gemma cannot hold 17 of 17 compressed layers:\n")
    assert message.endswith("\nTake another format.")  # no layer is left that it can hold
    for name in SavedFolder.read(small).entry.plan.layers:
        assert name in message
    assert "\n  groups of 8 inputs have a scale each, and not all inputs together: bert.embeddings.word_emb" in message
    with pytest.raises(ConfigurationError, match=r"Take another format\.$"):
        export(small, tmp_path / "out", "gemma", allow_dense=True)
    assert not list(tmp_path.iterdir())


@needs_compressed_tensors
def test_a_part_that_a_format_cannot_carry_can_be_kept_dense(small: Path, tmp_path: Path):
    embeddings = [f"bert.embeddings.{name}_embeddings" for name in ("word", "position", "token_type")]
    listed = f"  it is an embedding: {', '.join(embeddings)}\nKeep these in floating point with allow_dense=True"
    with pytest.raises(ConfigurationError, match=f"cannot hold 3 of 17 compressed layers:\n{re.escape(listed)}"):
        export(small, tmp_path / "out", "compressed-tensors")
    assert not list(tmp_path.iterdir())
    result = export(small, tmp_path / "out", "compressed-tensors", allow_dense=True)
    assert result.dense == dict.fromkeys(embeddings, "it is an embedding")
    assert len(result.converted) == 14 and not result.rounded and not result.float_inputs
    assert result.compressed_bytes == SavedFolder.read(small).entry.size_bytes


@needs_compressed_tensors
def test_groups_that_do_not_divide_a_row_are_not_convertible(tmp_path: Path):
    save_compressed(BERT, tmp_path / "small", all_widths(20))
    why = r"\n  its 32 inputs are no whole number of groups of 20: .*\n  its 48 inputs are no .*: .*output\.dense"
    with pytest.raises(ConfigurationError, match=why):
        export(tmp_path / "small", tmp_path / "out", "compressed-tensors")


@needs_compressed_tensors
@pytest.mark.parametrize(("name", "why"), [("resnet", "it is a convolution"), ("gpt2", "it is a Conv1D")])
def test_kinds_that_transformers_would_fill_with_random_weights(name: str, why: str, tmp_path: Path):
    save_compressed(TINY_MODELS[name], tmp_path / "small", all_widths())
    for format in ("compressed-tensors", "gemma"):
        with pytest.raises(ConfigurationError, match=f"\n  {why}: "):
            export(tmp_path / "small", tmp_path / "out", format)


@pytest.mark.parametrize("format", ["dense", "gemma"])
def test_quantised_inputs_are_dropped_only_when_that_is_allowed(small_inputs: Path, tmp_path: Path, format: str):
    with pytest.raises(
        ConfigurationError, match=r"cannot hold 14 of 17 compressed layers:\n  its input is quantised: "
    ):
        export(small_inputs, tmp_path / "out", format)
    result = export(small_inputs, tmp_path / "out", format, allow_dense=True)
    assert len(result.float_inputs) == len(result.dense) == 14 and len(result.converted) == 3
    compressed = AutoModelForSequenceClassification.from_pretrained(small_inputs)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    without = outputs_of(again, BERT.inputs())
    assert not torch.allclose(outputs_of(compressed, BERT.inputs()), without, rtol=0, atol=1e-3)
    for module in compressed_layers(compressed).values():
        module.activation = None
    assert_same_outputs(outputs_of(compressed, BERT.inputs()), without)


def test_a_folder_that_is_no_compressed_checkpoint_is_refused(text_folder: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match="model holds no model compressed by hf_lossless"):
        export(text_folder, tmp_path / "out", "dense")
    with pytest.raises(CheckpointError, match=r"nothing/config\.json cannot be read"):
        export(tmp_path / "nothing", tmp_path / "out", "dense")
    assert not list(tmp_path.iterdir())


def test_where_an_export_cannot_go(small: Path, tmp_path: Path):
    (tmp_path / "link").symlink_to(small)
    before = sorted(small.rglob("*"))
    for out in (small, small / "dense", tmp_path / "link/dense", small / "../small/dense"):
        with pytest.raises(CheckpointError, match=r"is the checkpoint .*small or lies inside it\. Name another one"):
            export(small, out, "dense")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        export(small, tmp_path, "dense")
    assert sorted(small.rglob("*")) == before


def test_an_unknown_format_is_refused(small: Path, tmp_path: Path):
    with pytest.raises(ConfigurationError, match=r"'gguf' is unknown\. Take one of dense, compressed-tensors, gemma"):
        export(small, tmp_path / "out", "gguf")


def test_a_class_that_transformers_does_not_have_is_refused(small: Path, tmp_path: Path):
    shutil.copytree(small, tmp_path / "small")
    values = json.loads((small / "config.json").read_text())
    (tmp_path / "small/config.json").write_text(json.dumps({**values, "architectures": ["MyBert"]}))
    with pytest.raises(CheckpointError, match=r"small is of the class 'MyBert', which transformers .* lacks"):
        export(tmp_path / "small", tmp_path / "out", "dense")


def test_a_missing_package_is_named(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(export_module, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"not installed\. Install it: pip install compressed-tensors"):
        export(small, tmp_path / "out", "compressed-tensors", allow_dense=True)


@needs_compressed_tensors
def test_an_architecture_that_a_format_breaks_is_found_before_anything_is_there(tmp_path: Path):
    """T5 initialises its layers' weights by name, and those of this format have none."""
    save_compressed(TINY_MODELS["t5"], tmp_path / "small", all_widths())
    with pytest.raises(
        ConfigurationError, match="cannot load a T5ForConditionalGeneration in the format compressed-tensors"
    ):
        export(tmp_path / "small", tmp_path / "out", "compressed-tensors", allow_dense=True)
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_a_tensor_that_goes_astray_is_found(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Were the names in config.json wrong, transformers would fill the layers with random weights."""
    monkeypatch.setattr(gemma, "name_pattern", lambda names, prefix: "no-such-module$")
    save_compressed(BERT, tmp_path / "small", all_widths())
    with pytest.raises(ConfigurationError, match="cannot load a BertForSequenceClassification in the format gemma: "):
        export(tmp_path / "small", tmp_path / "out", "gemma")
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


Run = Callable[..., tuple[int, str, str]]


def test_the_command(small: Path, tmp_path: Path, run: Run):
    out = tmp_path / "dense"
    status, said, _ = run("export", small, "--format", "dense", "--out", out)
    assert status == 0
    size = (out / "model.safetensors").stat().st_size
    header = 8 + int.from_bytes((out / "model.safetensors").read_bytes()[:8], "little")
    before = SavedFolder.read(small).entry.size_bytes
    assert said == (
        f"{out}: {size - header:,} bytes, format dense; {small}: {before:,} bytes\n"
        "17 of 17 compressed layers converted\n"
    )
    status, said, complaint = run("export", small, "--format", "gemma", "--out", tmp_path / "gemma")
    assert status == 1 and not said
    assert "error: the format gemma cannot hold 17 of 17 compressed layers:\n" in complaint
    assert "Traceback" not in complaint


def test_the_command_says_what_is_another_model(small_inputs: Path, tmp_path: Path, run: Run):
    out = tmp_path / "dense"
    arguments = ("export", small_inputs, "--format", "dense", "--out", out, "--allow-dense")
    status, said, _ = run(*arguments)
    assert status == 0
    assert "3 of 17 compressed layers converted, the others in floating point:\n  its input is quantised: bert" in said
    assert f"{out} is another model than {small_inputs}: 14 layers have quantised inputs there, and none here" in said


def test_the_command_says_what_is_rounded(tmp_path: Path, run: Run):
    save_compressed(BERT, tmp_path / "small", all_widths(), torch.bfloat16)
    arguments = ("export", tmp_path / "small", "--format", "gemma", "--out", tmp_path / "gemma")
    status, said, _ = run(*arguments)
    assert status == 0
    assert "layers are rounded to torch.bfloat16: their weights move by at most 1.18% of their size" in said
