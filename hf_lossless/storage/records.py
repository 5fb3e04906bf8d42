"""Frozen records that config.json keeps, validated field by field when read, because anyone may have edited them."""

import json
import reprlib
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from hf_lossless.errors import LosslessError


class Record(BaseModel):
    """A frozen record that refuses unknown fields and silent conversions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


AnyRecord = TypeVar("AnyRecord", bound=Record)


def read_record(kind: type[AnyRecord], values: Any, what: str, error: type[LosslessError], remedy: str) -> AnyRecord:
    """Reads a record from JSON values.

    Args:
        kind: Class of the record.
        values: JSON values, possibly read from a file.
        what: Name of the record in errors, such as "the compression plan".
        error: Class of the error to raise.
        remedy: Last sentence of the error's message.

    Raises:
        LosslessError: An error of the class `error`: a field is missing, unknown, or of the wrong type or range.
    """
    try:
        text = json.dumps(values)
    except (TypeError, ValueError) as problem:
        raise error(f"{what} is not made of JSON values: {problem}. {remedy}") from problem
    try:
        return kind.model_validate_json(text)
    except ValidationError as problem:
        first = problem.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        got = reprlib.repr(first["input"])  # shortened, because it may be the whole record
        raise error(f"{what} is malformed at {place or 'its top'}: {first['msg']} (got {got}). {remedy}") from problem
