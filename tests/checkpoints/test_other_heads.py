"""A compressed checkpoint loads with another head, as another class, and back, as its original does."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf
from round_trips import RoundTrips
from safetensors.torch import load_file, save_file
from tiny_models import LABELS, TinyModel
from torch import Tensor, nn

from hf_lossless import CheckpointError, LosslessCompressionConfig
from hf_lossless.storage.modules.base import compressed_layers

SETTINGS = {
    "3bit": {"bits": (3,), "loss_budget": 1e9},
    "kept head": {"bits": (3,), "loss_budget": 1e9, "keep_head": True},
    "ranks": {"bits": (3,), "ranks": "auto", "ratio": 3},
    "coded": {"storage": "entropy", "bits": (4,), "loss_budget": 1e9},
}
OTHER_LABELS = {"num_labels": LABELS + 2, "ignore_mismatched_sizes": True}


@pytest.fixture(scope="module")
def round_trip(tmp_path_factory: pytest.TempPathFactory) -> RoundTrips:
    def compressed(tiny: TinyModel, original: Path, setting: str, dtype: torch.dtype) -> hf.PreTrainedModel:
        config = LosslessCompressionConfig([tiny.batch()], **SETTINGS[setting])
        return tiny.auto_class.from_pretrained(original, dtype=dtype, quantization_config=config)

    return RoundTrips(tmp_path_factory.mktemp("round-trips"), compressed, "3bit")


def hidden(model: hf.PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.base_model(**inputs)[0]


@pytest.mark.parametrize(("name", "setting"), [*(("bert", one) for one in SETTINGS), ("resnet", "3bit")])
def test_another_number_of_labels(round_trip: RoundTrips, tmp_path: Path, name: str, setting: str):
    trip = round_trip(name, setting)
    tiny, model, folder = trip.tiny, trip.model, trip.folder
    again, info = tiny.auto_class.from_pretrained(folder, **OTHER_LABELS, output_loading_info=True)
    assert again(**tiny.inputs()).logits.shape[-1] == LABELS + 2
    assert torch.equal(hidden(again, tiny.inputs()), hidden(model, tiny.inputs()))
    assert type(again.get_submodule("classifier" if name == "bert" else "classifier.1")) is nn.Linear
    assert info["mismatched_keys"]

    again.save_pretrained(tmp_path / "again")  # and so it can be saved and loaded
    third, info = tiny.auto_class.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert torch.equal(third(**tiny.inputs()).logits, again(**tiny.inputs()).logits)
    assert not any(info.values())
    assert third.hf_quantizer.quantization_config.certificate is None


@pytest.mark.parametrize("setting", SETTINGS)
def test_another_number_of_labels_must_be_allowed(round_trip: RoundTrips, setting: str):
    trip = round_trip("bert", setting)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        trip.tiny.auto_class.from_pretrained(trip.folder, num_labels=LABELS + 2)


@pytest.mark.parametrize(
    "auto_class", [hf.AutoModelForTokenClassification, hf.AutoModelForMaskedLM, hf.AutoModelForQuestionAnswering]
)
def test_another_head(round_trip: RoundTrips, tmp_path: Path, auto_class: type):
    trip = round_trip("bert")
    tiny, model, folder = trip.tiny, trip.model, trip.folder
    again = auto_class.from_pretrained(folder, **(OTHER_LABELS if "Token" in auto_class.__name__ else {}))
    assert torch.equal(hidden(again, tiny.inputs()), hidden(model, tiny.inputs()))
    again.save_pretrained(tmp_path / "again")
    third = auto_class.from_pretrained(tmp_path / "again")
    assert torch.equal(hidden(third, tiny.inputs()), hidden(model, tiny.inputs()))


@pytest.mark.parametrize("name", ["bert", "bert-mlm", "gpt2", "vit"])
def test_base_class_and_back(round_trip: RoundTrips, tmp_path: Path, name: str):
    trip = round_trip(name)
    tiny, model, folder = trip.tiny, trip.model, trip.folder
    base = hf.AutoModel.from_pretrained(folder)
    base.save_pretrained(tmp_path / "base")
    back = tiny.auto_class.from_pretrained(tmp_path / "base")
    assert torch.equal(hidden(back, tiny.inputs()), hidden(model, tiny.inputs()))
    assert set(compressed_layers(back.base_model)) >= set(compressed_layers(model.base_model))


def test_base_class_with_a_pooler_that_was_not_saved(round_trip: RoundTrips, tmp_path: Path):
    """As on the original, transformers makes a new one and says so."""
    trip = round_trip("bert-mlm")
    tiny, model = trip.tiny, copy.deepcopy(trip.model)
    model.bert.save_pretrained(tmp_path / "base")
    base, info = hf.AutoModel.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert info["missing_keys"] == {"pooler.dense.weight", "pooler.dense.bias"}
    assert torch.equal(hidden(base, tiny.inputs()), hidden(model, tiny.inputs()))


def test_files_that_are_not_those_saved_are_compared_in_full(round_trip: RoundTrips, tmp_path: Path):
    trip = round_trip("bert", "kept head")
    tiny, folder = trip.tiny, shutil.copytree(trip.folder, tmp_path / "small")
    tensors = load_file(folder / "model.safetensors")
    tensors["classifier.weight"] = torch.zeros(LABELS + 2, 32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"'classifier\.weight' .* has shape \[5, 32\], the plan needs \[3, 32\]"):
        tiny.auto_class.from_pretrained(folder)
