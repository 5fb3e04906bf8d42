"""Tiny models of every family, with a tokenizer or image processor of their own and a few rows, for `--smoke`.

Weights are random, so nothing is learnt and no figure means anything; what is tried is the whole way from rows to a
loaded checkpoint. Rows are made up, or those of real data where HF_LOSSLESS_ASSETS names a folder that has them.
"""

import os
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
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    ViTImageProcessorPil,
)

from hf_lossless.data.rows import load_rows

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

Smoke = Callable[[Any, Path], datasets.Dataset]
"""Writes a tiny model of an auto class into a folder, and gives rows for it."""


def text_model(config: PreTrainedConfig, rows: Callable[[], list[Row]]) -> Smoke:
    """A tiny model of texts, with a tokenizer as its family has, trained on the rows."""

    def make(auto_class: Any, folder: Path) -> datasets.Dataset:
        table = datasets.Dataset.from_list(rows())
        texts = [text for row in table for text in row.values() if isinstance(text, str)]
        byte_level = config.model_type in ("roberta", "gpt2")
        tokenizer = (_byte_level if byte_level else _word_pieces)(texts)
        tokenizer.save_pretrained(folder)
        torch.manual_seed(0)
        config.vocab_size = len(tokenizer)
        config.pad_token_id = tokenizer.pad_token_id
        auto_class.from_config(config).save_pretrained(folder)
        return table

    return make


def image_model(config: PreTrainedConfig) -> Smoke:
    """A tiny classifier of images."""

    def make(auto_class: Any, folder: Path) -> datasets.Dataset:
        torch.manual_seed(0)
        auto_class.from_config(config).save_pretrained(folder)
        ViTImageProcessorPil(size={"height": IMAGE, "width": IMAGE}).save_pretrained(folder)
        return _images()

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
    return _real("squad/xquad.en.json") or list(islice(_made_up_questions(), ROWS))


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
    path = _real_file("swag/codah.tsv")
    if path is None:
        return [_made_up_endings(words) for words in islice(_sentences(count=20), ROWS)]
    rows = []
    for line in islice(path.read_text(encoding="utf-8").splitlines(), ROWS):
        _, prompt, *endings, label = line.split("\t")
        rows.append({"sent1": prompt, "sent2": "", **dict(zip(_ENDINGS, endings, strict=True)), "label": int(label)})
    return rows


_ENDINGS = ("ending0", "ending1", "ending2", "ending3")


def _made_up_endings(words: list[str]) -> Row:
    endings = {name: " ".join(words[8 + 3 * index : 11 + 3 * index]) for index, name in enumerate(_ENDINGS)}
    return {"sent1": " ".join(words[:6]), "sent2": words[6], **endings, "label": len(words[7]) % 4}


def mnli_rows() -> list[Row]:
    """Pairs of sentences with one of three labels."""
    return _real("mnli/train_sample.jsonl") or [
        {"premise": " ".join(words[:12]), "hypothesis": " ".join(words[12:]), "label": len(words[0]) % 3}
        for words in islice(_sentences(count=18), ROWS)
    ]


def sst2_rows() -> list[Row]:
    """Sentences with one of two labels."""
    return _real("minilm-sst2/validation.jsonl") or [
        {"text": " ".join(words), "label": len(words[0]) % 2} for words in islice(_sentences(count=12), ROWS)
    ]


def language_rows() -> list[Row]:
    """Texts of a few sentences."""
    return [{"text": " ".join(row["context"].split()[:60])} for row in squad_rows()]


def _real_file(name: str) -> Path | None:
    """A file of real data, where the environment names a folder that has it."""
    folder = os.environ.get("HF_LOSSLESS_ASSETS")
    path = Path(folder or "", name)
    return path if folder and path.is_file() else None


def _real(name: str) -> list[Row] | None:
    """The first rows of such a file."""
    path = _real_file(name)
    return None if path is None else load_rows(str(path)).select(range(ROWS)).to_list()


def _sentences(count: int) -> Iterator[list[str]]:
    """Words that are made up, `count` at a time."""
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghij", k=generator.randrange(2, 7))) for _ in range(200)]
    while True:
        yield generator.choices(words, k=count)


def _images() -> datasets.Dataset:
    path = _real_file("fashion-mnist/validation.parquet")
    if path is not None:
        return load_rows(str(path)).select(range(ROWS))
    pixels = np.random.default_rng(0).integers(0, 256, (ROWS, IMAGE, IMAGE, 3), dtype=np.uint8)
    return datasets.Dataset.from_list(
        [{"image": Image.fromarray(values), "label": index % 10} for index, values in enumerate(pixels)]
    )
