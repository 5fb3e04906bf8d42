"""Folders that earlier code wrote, at least one for each format version: they load as the models that they were.

What they are, and why they are never made anew, is in golden/README.md.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from round_trips import assert_same_model, outputs_of
from safetensors.torch import load_file
from torch import Tensor

from hf_lossless.storage.plan import FORMAT_VERSION

GOLDEN = Path(__file__).parent / "golden"
FOLDERS = sorted(path.parent for path in GOLDEN.glob("*/config.json"))
EACH_FOLDER = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def load(folder: Path, inputs: dict[str, Tensor]) -> hf.PreTrainedModel:
    """The model; no tensor may be missing, and none left over."""
    auto = hf.AutoModelForImageClassification if "pixel_values" in inputs else hf.AutoModelForSequenceClassification
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def inputs_of(expected: dict[str, Any]) -> dict[str, Tensor]:
    """The model's arguments: tokens as they stand there, or pixels by their formula."""
    if "input_ids" in expected:
        return {"input_ids": torch.tensor(expected["input_ids"])}
    shape, (low, high) = torch.Size(expected["pixel_values"]["shape"]), expected["pixel_values"]["linspace"]
    return {"pixel_values": torch.linspace(low, high, shape.numel()).reshape(shape)}


@EACH_FOLDER
def test_what_is_loaded_is_what_was_saved(folder: Path) -> None:
    expected, stored = read(folder / "expected.json"), read(folder / "config.json")["quantization_config"]
    assert stored["format_version"] == expected["format_version"]
    inputs = inputs_of(expected)
    model = load(folder, inputs)
    # Another machine adds in another order; where inputs are quantised, none lies near the middle of two levels.
    torch.testing.assert_close(outputs_of(model, inputs), torch.tensor(expected["logits"]), atol=1e-5, rtol=1e-5)

    entry = model.config.quantization_config
    assert sorted({layer.kind for layer in entry.plan.layers.values()}) == expected["kinds"]
    tensors = load_file(folder / "model.safetensors")
    assert entry.plan.tensor_bytes == sum(tensor.nbytes for tensor in tensors.values())
    verdict = None if entry.certificate is None else entry.certificate.verdict
    assert verdict == stored.get("certificate", {}).get("verdict")


@EACH_FOLDER
def test_saved_again_it_is_the_same(folder: Path, tmp_path: Path) -> None:
    inputs = inputs_of(read(folder / "expected.json"))
    model = load(folder, inputs)
    model.save_pretrained(tmp_path)
    again = load(tmp_path, inputs)
    assert_same_model(again, model, inputs)
    entry, first = again.config.quantization_config, model.config.quantization_config
    assert (entry.plan, entry.certificate) == (first.plan, first.certificate)


def test_every_version_has_a_folder() -> None:
    versions = {read(folder / "config.json")["quantization_config"]["format_version"] for folder in FOLDERS}
    assert versions == set(range(1, FORMAT_VERSION + 1)), "a new version needs a folder, see golden/README.md"
