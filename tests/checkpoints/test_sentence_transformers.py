"""sentence-transformers loads a compressed folder, encodes, saves, and loads again."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_checkpoints import tokenizer
from tiny_models import TINY_MODELS

from hf_lossless import LosslessCompressionConfig, compress
from hf_lossless.storage.modules.base import compressed_layers

sentence_transformers = pytest.importorskip("sentence_transformers")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

TEXTS = ["w5 w6", "w7 w8 w9"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny, path = TINY_MODELS["bert"], tmp_path_factory.mktemp("small")
    model = tiny.build()
    compress(model, [tiny.batch()], LosslessCompressionConfig(bits=(3,), loss_budget=1e9))
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def test_cross_encoder(folder: Path, tmp_path: Path):
    model = sentence_transformers.CrossEncoder(str(folder), device="cpu")
    scores = model.predict([tuple(TEXTS)])
    assert compressed_layers(model.model)
    model.save_pretrained(str(tmp_path))
    assert np.array_equal(
        sentence_transformers.CrossEncoder(str(tmp_path), device="cpu").predict([tuple(TEXTS)]), scores
    )


def test_sentence_transformer(folder: Path, tmp_path: Path):
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    vectors = model.encode(TEXTS)
    tiny = TINY_MODELS["bert"]
    assert vectors.shape == (2, tiny.config.hidden_size) and compressed_layers(model)
    model.save(str(tmp_path))
    again = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    assert np.array_equal(again.encode(TEXTS), vectors)
    assert compressed_layers(again).keys() == compressed_layers(model).keys()
    assert torch.equal(*(next(iter(compressed_layers(one).values())).matrix() for one in (again, model)))
