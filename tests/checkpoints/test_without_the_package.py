"""What demands this package of transformers is met and made again, and a dense model demands nothing.

test_new_process.py sees transformers refuse folders where the package is not imported.
"""

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from tiny_models import TINY_MODELS

from hf_lossless import LosslessCompressionConfig, compress
from hf_lossless.checkpoints.entry import DEMAND


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny, path = TINY_MODELS["bert"], tmp_path_factory.mktemp("small")
    model = tiny.build()
    compress(model, [tiny.batch()], LosslessCompressionConfig(bits=(3,), loss_budget=1e9))
    model.save_pretrained(path)
    return path


def test_demand_is_met_and_made_again(folder: Path, tmp_path: Path):
    assert json.loads((folder / "config.json").read_text())["fusion_config"] == {DEMAND: True}
    config = hf.AutoConfig.from_pretrained(folder)
    model = hf.AutoModelForSequenceClassification.from_pretrained(folder, config=config)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["fusion_config"] == {DEMAND: True}
    hf.AutoModelForSequenceClassification.from_config(hf.AutoConfig.from_pretrained(folder))  # random, as asked


def test_dequantised_model_is_dense_and_loads_anywhere(tmp_path: Path):
    for name in ("bert", "bert-mlm", "gpt2", "resnet", "nomic-bert"):
        tiny, path = TINY_MODELS[name], tmp_path / name
        model = tiny.build()
        compress(model, [tiny.batch()], LosslessCompressionConfig(bits=(3,), loss_budget=1e9))
        with torch.no_grad():
            expected = model(**tiny.inputs()).logits
            assert model.dequantize() is model
            assert torch.allclose(model(**tiny.inputs()).logits, expected, atol=1e-5)
        assert sum(one.numel() for one in model.parameters()) == sum(one.numel() for one in tiny.build().parameters())
        model.save_pretrained(path)
        assert not {"quantization_config", "fusion_config"} & json.loads((path / "config.json").read_text()).keys()
        again, info = tiny.auto_class.from_pretrained(path, output_loading_info=True)
        assert not any(info.values())
        assert type(again) is type(tiny.build()) and torch.equal(
            again(**tiny.inputs()).logits, model(**tiny.inputs()).logits
        )
        model.base_model.save_pretrained(path / "base")
        compress(again, [tiny.batch()], LosslessCompressionConfig(bits=(4,), loss_budget=1e9))  # and once more
