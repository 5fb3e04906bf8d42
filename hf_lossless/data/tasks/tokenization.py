"""What the tasks on text ask of a tokenizer."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from hf_lossless.data.tasks.columns import Row, name_of
from hf_lossless.errors import ConfigurationError, DataError


def load_tokenizer(model: str) -> Any:
    """The tokenizer saved with a model.

    Raises:
        ConfigurationError: There is none; transformers may make an empty one then, to which all text is unknown.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ConfigurationError(
            f"{model} has no tokenizer: what transformers makes of it knows {len(tokenizer)} tokens, all special. "
            "Save the model's tokenizer there, or pass it as processor=."
        )
    return tokenizer


def require_padding(tokenizer: Any) -> None:
    """Ends with an error where rows of different lengths cannot share a batch.

    Raises:
        ConfigurationError: There is no padding token.
    """
    if tokenizer.pad_token is None:
        raise ConfigurationError(
            f"the tokenizer ({type(tokenizer).__name__}) has no padding token, and rows of a batch are padded. "
            "Set one, say tokenizer.pad_token = tokenizer.eos_token, and pass it as processor= or save it."
        )


def require_fast(tokenizer: Any, why: str) -> None:
    """Ends with an error where a tokenizer cannot say which characters a token stands for.

    Raises:
        ConfigurationError: It is one of those written in Python.
    """
    if not tokenizer.is_fast:
        raise ConfigurationError(
            f"the tokenizer ({type(tokenizer).__name__}) is written in Python, and {why} takes one of the tokenizers "
            "library. Pass such a one as processor=, or save it with the model."
        )


def max_length(tokenizer: Any, model: PreTrainedModel) -> int | None:
    """The most tokens that tokenizer and model allow, or None where neither says."""
    positions = getattr(model.config, "max_position_embeddings", None) or 0
    embeddings = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    if (padding_idx := getattr(embeddings, "padding_idx", None)) is not None:  # RoBERTa's kin count from there
        positions -= padding_idx + 1
    known = [length for length in (tokenizer.model_max_length, positions) if 0 < length < 10**6]
    return min(known, default=None)


def refuse_nothing(batch: Mapping[str, Tensor], rows: Sequence[Row]) -> None:
    """Ends with an error where a row has no token at all, not even a special one.

    Args:
        batch: With "attention_mask" [rows, ..., tokens], or else "input_ids" with the same shape.
        rows: What it was made of.

    Raises:
        DataError: There is such a row.
    """
    ids = batch["input_ids"]
    counts = batch.get("attention_mask", ids.new_ones(ids.shape)).flatten(1).sum(1)
    empty = counts.eq(0).nonzero().flatten().tolist()
    if empty:
        raise DataError(
            f"the text of {name_of(rows[empty[0]])} has no token, and {len(empty)} of {len(rows)} rows of its batch "
            "are like that. Drop rows without text."
        )
