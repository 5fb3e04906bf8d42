"""Loads tokenizers and checks that they can do what the text tasks need."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from hf_lossless.data.tasks.columns import Row, name_of
from hf_lossless.errors import ConfigurationError, DataError


def load_tokenizer(model: str) -> Any:
    """Loads the tokenizer saved with a model.

    Raises:
        ConfigurationError: No tokenizer is saved there; transformers may then make an empty one, to which all text is
            unknown.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ConfigurationError(
            f"{model} has no tokenizer: what transformers makes of it knows {len(tokenizer)} tokens, all special. "
            "Save the model's tokenizer there, or pass it as processor=."
        )
    return tokenizer


def require_padding(tokenizer: Any) -> None:
    """Raises an error where the tokenizer cannot pad rows of different lengths to one batch.

    Raises:
        ConfigurationError: The tokenizer has no padding token.
    """
    if tokenizer.pad_token is None:
        raise ConfigurationError(
            f"the tokenizer ({type(tokenizer).__name__}) has no padding token, and rows of a batch are padded. "
            "Set one, say tokenizer.pad_token = tokenizer.eos_token, and pass it as processor= or save it."
        )


def require_fast(tokenizer: Any, why: str) -> None:
    """Raises an error where a tokenizer cannot give the characters that a token covers.

    Raises:
        ConfigurationError: The tokenizer is written in Python and not of the tokenizers library.
    """
    if not tokenizer.is_fast:
        raise ConfigurationError(
            f"the tokenizer ({type(tokenizer).__name__}) is written in Python, and {why} takes one of the tokenizers "
            "library. Pass such a one as processor=, or save it with the model."
        )


def max_length(tokenizer: Any, model: PreTrainedModel) -> int | None:
    """Returns the most tokens that tokenizer and model allow, or None where neither has a limit."""
    positions = getattr(model.config, "max_position_embeddings", None) or 0
    embeddings = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    if (
        padding_idx := getattr(embeddings, "padding_idx", None)
    ) is not None:  # as in RoBERTa: positions count from there
        positions -= padding_idx + 1
    known = [length for length in (tokenizer.model_max_length, positions) if 0 < length < 10**6]
    return min(known, default=None)


def refuse_nothing(batch: Mapping[str, Tensor], rows: Sequence[Row]) -> None:
    """Raises an error where a row has no token at all, not even a special one.

    Args:
        batch: Encoded rows with "attention_mask" [rows, ..., tokens], or else "input_ids" of the same shape.
        rows: The rows that were encoded.

    Raises:
        DataError: A row has no token.
    """
    ids = batch["input_ids"]
    counts = batch.get("attention_mask", ids.new_ones(ids.shape)).flatten(1).sum(1)
    empty = counts.eq(0).nonzero().flatten().tolist()
    if empty:
        raise DataError(
            f"the text of {name_of(rows[empty[0]])} has no token, and {len(empty)} of {len(rows)} rows of its batch "
            "are like that. Drop rows without text."
        )
