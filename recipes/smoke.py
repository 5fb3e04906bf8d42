"""Tiny models of every family, with a tokenizer or image processor of their own and a few rows, for `--smoke`.

Weights are random, so nothing is learnt and no figure means anything; what is tried is the whole way from rows to a
loaded checkpoint. Rows are those of the real data where they are at hand, and else made up.
"""

import json
import random
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    ViTImageProcessorPil,
)

from hf_lossless.data.rows import load_rows

ASSETS = Path(__file__).resolve().parents[2] / "shared" / "assets"
ROWS, IMAGE, VOCABULARY = 120, 32, 400

Row = dict[str, Any]

ENCODER: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 130,
}
"""Sizes of a tiny BERT or RoBERTa."""

PATCHES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "image_size": IMAGE,
    "patch_size": 8,
    "num_labels": 10,
}
"""Sizes of a tiny ViT."""

Smoke = Callable[[Path], tuple[str, datasets.Dataset]]


def text_model(auto_class: Any, config: PreTrainedConfig, rows: Callable[[], list[Row]]) -> Smoke:
    """A tiny model of texts, with a tokenizer as its family has, trained on the rows."""

    def make(folder: Path) -> tuple[str, datasets.Dataset]:
        table = datasets.Dataset.from_list(rows())
        texts = [text for row in table for text in row.values() if isinstance(text, str)]
        byte_level = config.model_type in ("roberta", "gpt2")
        tokenizer = (_byte_level if byte_level else _word_pieces)(texts)
        tokenizer.save_pretrained(folder)
        torch.manual_seed(0)
        config.vocab_size = len(tokenizer)
        config.pad_token_id = tokenizer.pad_token_id
        auto_class.from_config(config).save_pretrained(folder)
        return str(folder), table

    return make


def image_model(config: PreTrainedConfig) -> Smoke:
    """A tiny classifier of images."""

    def make(folder: Path) -> tuple[str, datasets.Dataset]:
        torch.manual_seed(0)
        AutoModelForImageClassification.from_config(config).save_pretrained(folder)
        ViTImageProcessorPil(size={"height": IMAGE, "width": IMAGE}).save_pretrained(folder)
        return str(folder), _images()

    return make


def _word_pieces(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """As BERT's: lower case, word pieces, [CLS] first [SEP] second [SEP]."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=special))
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    backend.decoder = decoders.WordPiece()
    return _fast(backend, special)


def _byte_level(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """As RoBERTa's and GPT-2's: pairs of bytes."""
    special = ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet)
    )
    backend.post_processor = processors.RobertaProcessing(("</s>", 3), ("<s>", 2))
    backend.decoder = decoders.ByteLevel()
    return _fast(backend, special)


def _fast(backend: Tokenizer, special: list[str]) -> PreTrainedTokenizerFast:
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **dict(zip(names, special, strict=True)))


# Rows


def squad_rows() -> list[Row]:
    """Questions on short contexts."""
    path = ASSETS / "squad/xquad.en.json"
    found = _squad(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else _made_up_questions()
    return list(islice(found, ROWS))


def _squad(official: Any) -> Iterator[Row]:
    for article in official["data"]:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                answers = question["answers"]
                yield {
                    "id": question["id"],
                    "question": question["question"],
                    "context": paragraph["context"],
                    "answers": {key: [answer[key] for answer in answers] for key in ("text", "answer_start")},
                }


def _made_up_questions() -> Iterator[Row]:
    for words in _sentences(count=40):
        context = " ".join(words)
        yield {
            "question": f"what comes after {words[4]} ?",
            "context": context,
            "answers": {"text": [words[5]], "answer_start": [len(" ".join([*words[:5], ""]))]},
        }


def swag_rows() -> list[Row]:
    """Sentences with four endings."""
    path = ASSETS / "swag/codah.tsv"
    if not path.is_file():
        rows = []
        for words in islice(_sentences(count=20), ROWS):
            endings = {f"ending{index}": " ".join(words[8 + 3 * index : 11 + 3 * index]) for index in range(4)}
            rows.append({"sent1": " ".join(words[:6]), "sent2": words[6], **endings, "label": len(words[7]) % 4})
        return rows
    rows = []
    for line in islice(path.read_text(encoding="utf-8").splitlines(), ROWS):
        _, prompt, *endings, label = line.split("\t")
        rows.append({"sent1": prompt, "sent2": "", **dict(zip(_ENDINGS, endings, strict=True)), "label": int(label)})
    return rows


_ENDINGS = ("ending0", "ending1", "ending2", "ending3")


def mnli_rows() -> list[Row]:
    """Pairs of sentences with one of three labels."""
    path = ASSETS / "mnli/train_sample.jsonl"
    if path.is_file():
        return _first(path)
    return [
        {"premise": " ".join(words[:12]), "hypothesis": " ".join(words[12:]), "label": len(words[0]) % 3}
        for words in islice(_sentences(count=18), ROWS)
    ]


def sst2_rows() -> list[Row]:
    """Sentences with one of two labels."""
    path = ASSETS / "minilm-sst2/validation.jsonl"
    if path.is_file():
        return _first(path)
    return [{"text": " ".join(words), "label": len(words[0]) % 2} for words in islice(_sentences(count=12), ROWS)]


def language_rows() -> list[Row]:
    """Texts of a few sentences."""
    return [{"text": " ".join(row["context"].split()[:60])} for row in squad_rows()]


def _first(path: Path) -> list[Row]:
    rows: list[Row] = load_rows(str(path)).select(range(ROWS)).to_list()
    return rows


def _sentences(count: int) -> Iterator[list[str]]:
    """Words that are made up, `count` at a time."""
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghij", k=generator.randrange(2, 7))) for _ in range(200)]
    while True:
        yield generator.choices(words, k=count)


def _images() -> datasets.Dataset:
    path = ASSETS / "fashion-mnist/validation.parquet"
    if path.is_file():
        return load_rows(str(path)).select(range(ROWS))
    pixels = np.random.default_rng(0).integers(0, 256, (ROWS, IMAGE, IMAGE, 3), dtype=np.uint8)
    return datasets.Dataset.from_list(
        [{"image": Image.fromarray(values), "label": index % 10} for index, values in enumerate(pixels)]
    )
