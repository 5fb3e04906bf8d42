"""Masked language modelling: hidden tokens from those around them, as BERT was trained.

In each block 15 % of the tokens, one at least, are replaced by [MASK] and are to be predicted. Which ones is drawn with
a seed that is a hash of the block's own tokens: the same text has the same tokens hidden in every split, process and
run, for the original as for the compressed model. Training also left some of the tokens as they are or put random
ones there; here all are hidden, as in use. The perplexity is that of hidden tokens.
"""

import hashlib
import random
from typing import Any

from transformers import AutoModelForMaskedLM

from hf_lossless.errors import ConfigurationError
from hf_lossless.tasks.language_modelling import (
    Block,
    LanguageModelling,
    nothing_to_predict,
    text_in,
    tokens_of,
)
from hf_lossless.tasks.rows import Row
from hf_lossless.tasks.tokenization import require_fast

SHARE = 0.15


class MaskedLanguageModelling(LanguageModelling):
    """A text with gaps to what was in them."""

    name = "fill-mask"
    heads = ("ForMaskedLM",)
    auto_class = AutoModelForMaskedLM
    shift = 0

    def blocks(self, row: Row, tokenizer: Any, longest: int) -> list[Block]:
        """Parts of at most `longest` tokens, each with special tokens around it where the row holds a text."""
        if tokenizer.mask_token_id is None:
            raise ConfigurationError(
                f"the tokenizer ({type(tokenizer).__name__}) has no mask token, so nothing can be hidden. Take the "
                "tokenizer that the model was trained with."
            )
        tokens = tokens_of(row, tokenizer)
        if tokens is not None:
            parts = [tokens[start : start + longest] for start in range(0, len(tokens), longest)]
        else:
            require_fast(tokenizer, "cutting a text into blocks")
            parts = tokenizer(text_in(row), truncation=True, max_length=longest, return_overflowing_tokens=True)[
                "input_ids"
            ]
        special = set(tokenizer.all_special_ids)
        hidden = (_hidden(part, special, tokenizer.mask_token_id) for part in parts)
        blocks = [block for block in hidden if block is not None]
        if not blocks:
            raise nothing_to_predict(row)
        return blocks


def _hidden(tokens: list[int], special: set[int], mask: int) -> Block | None:
    """A block with some of its tokens hidden; None where all are special."""
    places = [place for place, token in enumerate(tokens) if token not in special]
    if not places:
        return None
    seed = hashlib.blake2b(" ".join(map(str, tokens)).encode(), digest_size=8).digest()
    count = max(1, round(SHARE * len(places)))
    chosen = set(random.Random(int.from_bytes(seed, "little")).sample(places, count))
    return Block(
        [mask if place in chosen else token for place, token in enumerate(tokens)],
        [token if place in chosen else -100 for place, token in enumerate(tokens)],
    )
