"""Saved folders of tiny models with their tokenizer or image processor, and rows for them."""

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tiny_models import IMAGE, LABELS, TINY_MODELS, VOCABULARY, TinyModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import BertPreTokenizer, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, ViTImageProcessorPil

Row = dict[str, Any]


def save_text_model(folder: Path, tiny: TinyModel = TINY_MODELS["bert"]) -> Path:
    """A classifier of texts made of the words w5, w6, ... as many as its vocabulary has."""
    tiny.build().save_pretrained(folder)
    tokenizer(tiny.config.vocab_size).save_pretrained(folder)
    return folder


def tokenizer(vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    words = ["[UNK]", "[PAD]", *(f"w{index}" for index in range(2, vocabulary))]
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")


def pair_tokenizer(vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """As a BERT's: [CLS] first [SEP] second [SEP]; the words are the same, and punctuation is apart."""
    words = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", *(f"w{index}" for index in range(5, vocabulary))]
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = BertPreTokenizer()
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{f"{name}_token": f"[{name.upper()}]" for name in ("unk", "pad", "cls", "sep", "mask")},
    )


def save_image_model(folder: Path, tiny: TinyModel = TINY_MODELS["vit"]) -> Path:
    tiny.build().save_pretrained(folder)
    ViTImageProcessorPil(size={"height": IMAGE, "width": IMAGE}).save_pretrained(folder)
    return folder


def text_rows(count: int = 12, seed: int = 0, vocabulary: int = VOCABULARY) -> list[Row]:
    """Texts of one to eight words."""
    generator = random.Random(seed)
    return [
        {
            "text": " ".join(f"w{generator.randrange(2, vocabulary)}" for _ in range(generator.randrange(1, 9))),
            "label": generator.randrange(LABELS),
        }
        for _ in range(count)
    ]


def image_rows(count: int = 6, seed: int = 0) -> list[Row]:
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (count, IMAGE, IMAGE, 3), dtype=np.uint8)
    return [{"image": Image.fromarray(values), "label": index % LABELS} for index, values in enumerate(pixels)]


def without(rows: Iterable[Row], column: str) -> list[Row]:
    return [{name: value for name, value in row.items() if name != column} for row in rows]
