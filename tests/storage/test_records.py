"""Records are read strictly, and what is wrong is named."""

from typing import Any

import pytest

from hf_lossless.errors import PlanError
from hf_lossless.storage.records import Record, read_record


class Part(Record):
    count: int


class Whole(Record):
    parts: tuple[Part, ...]


def read(values: Any) -> Whole:
    return read_record(Whole, values, "the whole", PlanError, "Take it again.")


def test_it_is_read():
    assert read({"parts": [{"count": 3}]}) == Whole(parts=(Part(count=3),))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"parts": [{"count": "3"}]}, r"^the whole is malformed at parts\.0\.count: .* \(got '3'\)\. Take it again\.$"),
        ({"parts": [], "more": 1}, r"malformed at more: .* \(got 1\)"),
        ([], r"malformed at its top: "),
        ({"parts": {1, 2}}, r"^the whole is not made of JSON values: .* Take it again\.$"),
    ],
    ids=["type", "unknown", "top", "not-json"],
)
def test_what_is_wrong_is_named(values, message):
    with pytest.raises(PlanError, match=message):
        read(values)
