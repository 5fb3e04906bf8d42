"""A compressed checkpoint loads with another head, as another class, and back, as its original does."""

from pathlib import Path

import pytest
import torch
import transformers as hf
from tiny_models import LABELS, TINY_MODELS, TinyModel
from torch import Tensor, nn

from hf_lossless import CheckpointError, LosslessCompressionConfig
from hf_lossless.storage.modules.base import compressed_layers

SETTINGS = {
    "3bit": {"bits": (3,), "loss_budget": 1e9},
    "kept head": {"bits": (3,), "loss_budget": 1e9, "keep_head": True},
    "ranks": {"bits": (3,), "ranks": "auto", "ratio": 3},
    "coded": {"storage": "entropy", "ratio": 4},
}
OTHER_LABELS = {"num_labels": LABELS + 2, "ignore_mismatched_sizes": True}


def saved(folder: Path, name: str = "bert", setting: str = "3bit") -> tuple[TinyModel, hf.PreTrainedModel, Path]:
    tiny = TINY_MODELS[name]
    tiny.build().save_pretrained(folder / "original")
    config = LosslessCompressionConfig([tiny.batch()], **SETTINGS[setting])
    model = tiny.auto_class.from_pretrained(folder / "original", quantization_config=config)
    model.save_pretrained(folder / "small")
    return tiny, model, folder / "small"


def hidden(model: hf.PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.base_model(**inputs)[0]


@pytest.mark.parametrize(("name", "setting"), [*(("bert", one) for one in SETTINGS), ("resnet", "3bit")])
def test_another_number_of_labels(tmp_path: Path, name: str, setting: str):
    tiny, model, folder = saved(tmp_path, name, setting)
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
def test_another_number_of_labels_must_be_allowed(tmp_path: Path, setting: str):
    tiny, _, folder = saved(tmp_path, setting=setting)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        tiny.auto_class.from_pretrained(folder, num_labels=LABELS + 2)


@pytest.mark.parametrize(
    "auto_class", [hf.AutoModelForTokenClassification, hf.AutoModelForMaskedLM, hf.AutoModelForQuestionAnswering]
)
def test_another_head(tmp_path: Path, auto_class: type):
    tiny, model, folder = saved(tmp_path)
    again = auto_class.from_pretrained(folder, **(OTHER_LABELS if "Token" in auto_class.__name__ else {}))
    assert torch.equal(hidden(again, tiny.inputs()), hidden(model, tiny.inputs()))
    again.save_pretrained(tmp_path / "again")
    third = auto_class.from_pretrained(tmp_path / "again")
    assert torch.equal(hidden(third, tiny.inputs()), hidden(model, tiny.inputs()))


@pytest.mark.parametrize("name", ["bert", "bert-mlm", "gpt2", "vit"])
def test_base_class_and_back(tmp_path: Path, name: str):
    tiny, model, folder = saved(tmp_path, name)
    base = hf.AutoModel.from_pretrained(folder)
    base.save_pretrained(tmp_path / "base")
    back = tiny.auto_class.from_pretrained(tmp_path / "base")
    assert torch.equal(hidden(back, tiny.inputs()), hidden(model, tiny.inputs()))
    assert set(compressed_layers(back.base_model)) >= set(compressed_layers(model.base_model))


def test_base_class_with_a_pooler_that_was_not_saved(tmp_path: Path):
    """As on the original, transformers makes a new one and says so."""
    tiny, model, _ = saved(tmp_path, "bert-mlm")
    model.bert.save_pretrained(tmp_path / "base")
    base, info = hf.AutoModel.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert info["missing_keys"] == {"pooler.dense.weight", "pooler.dense.bias"}
    assert torch.equal(hidden(base, tiny.inputs()), hidden(model, tiny.inputs()))


def test_files_that_are_not_those_saved_are_compared_in_full(tmp_path: Path):
    from safetensors.torch import load_file, save_file

    tiny, _, folder = saved(tmp_path, setting="kept head")
    tensors = load_file(folder / "model.safetensors")
    tensors["classifier.weight"] = torch.zeros(LABELS + 2, 32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"'classifier\.weight' .* has shape \[5, 32\], the plan needs \[3, 32\]"):
        tiny.auto_class.from_pretrained(folder)
