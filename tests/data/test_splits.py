"""Three disjoint splits by a hash of the rows' content."""

import datetime
import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hf_lossless import ConfigurationError, DataError
from hf_lossless.data.splits import (
    SHARES,
    assign,
    digest_of,
    fingerprint,
    input_columns,
    overlap,
    refuse_overlap,
    row_digests,
    three_splits,
)


def table(texts: list[Any], **columns: list[Any]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": texts, **columns})


ROWS = table([f"film {number}" for number in range(200)], label=[number % 2 for number in range(200)])

texts = st.lists(st.text(max_size=2), min_size=1, max_size=30)


def split_of_each(values: list[Any], seed: int) -> list[int]:
    return assign([digest_of([value]) for value in values], seed).tolist()


@given(values=texts, seed=st.integers(0, 2**40))
def test_equal_rows_stay_together_in_any_order(values: list[str], seed: int) -> None:
    splits = split_of_each(values, seed)
    assert len(splits) == len(values) and set(splits) <= {0, 1, 2}
    by_value = dict(zip(values, splits, strict=True))
    assert splits == [by_value[value] for value in values]
    assert split_of_each(values[::-1], seed) == splits[::-1]
    assert split_of_each(sorted(set(values)), seed) == [by_value[value] for value in sorted(set(values))]


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=6,
)


def kinds(value: Any) -> str:
    """A value as text that tells kinds apart, as the slow and obvious reference."""
    if isinstance(value, dict):
        return "{" + ",".join(sorted(f"{name!r}:{kinds(inner)}" for name, inner in value.items())) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(kinds, value)) + "]"
    return f"{type(value).__name__} {value + 0.0 if isinstance(value, float) else value!r}"


@given(one=plain, other=plain)
def test_digests_are_equal_where_values_are(one: Any, other: Any) -> None:
    assert (digest_of([one]) == digest_of([other])) == (kinds(one) == kinds(other))


def test_the_splits_are_disjoint_complete_and_about_as_large_as_their_shares() -> None:
    rows = table([f"film {number % 4000}" for number in range(5000)])
    splits = three_splits(rows, seed=3)
    parts = [splits.calibration["text"], splits.selection["text"], splits.certification["text"]]
    assert sum(map(len, parts)) == 5000
    assert len(set().union(*map(set, parts))) == sum(len(set(part)) for part in parts) == 4000
    assert np.allclose([len(part) / 5000 for part in parts], SHARES, atol=0.03)
    assert three_splits(rows, seed=4).selection["text"] != parts[1]


def test_digests_are_the_same_on_every_machine() -> None:
    assert digest_of(["a film", 1]).hex() == "67fb4375eec6b3cf302aac426a308df0"
    assert assign([digest_of([number]) for number in range(12)], seed=0).tolist() == [
        1,
        1,
        2,
        1,
        2,
        2,
        2,
        2,
        2,
        2,
        2,
        1,
    ]
    assert fingerprint(table(["a", "b"], label=[0, 1])) == "feae0046c947683deeefb288c7416157"


def test_the_same_text_with_two_labels_stays_together() -> None:
    twice = datasets.concatenate_datasets([ROWS, table(ROWS["text"], label=[1 - label for label in ROWS["label"]])])
    numbered = twice.add_column("idx", list(range(400)))  # a running number makes no row another one
    splits = three_splits(numbered, seed=0)
    for part in (splits.calibration, splits.selection, splits.certification):
        assert set(Counter(part["text"]).values()) == {2}
    assert input_columns(numbered) == ["text"]


def test_named_columns() -> None:
    rows = table(["a", "a"], note=["x", "y"])
    assert len(set(row_digests(rows))) == 2
    assert len(set(row_digests(rows, ["text"]))) == 1
    assert row_digests(rows, ["text"]) == row_digests(rows.rename_column("text", "sentence"), ["sentence"])


def test_the_fingerprint_knows_rows_and_labels_but_no_order() -> None:
    name = fingerprint(ROWS)
    assert fingerprint(ROWS.shuffle(seed=1)) == name == fingerprint(ROWS.add_column("idx", list(range(200))))
    assert fingerprint(ROWS.select(range(199))) != name
    assert fingerprint(datasets.concatenate_datasets([ROWS, ROWS.select([0])])) != name
    assert fingerprint(table(ROWS["text"], label=[1 - label for label in ROWS["label"]])) != name


def image(colour: tuple[int, int, int], size: tuple[int, int] = (3, 2)) -> Image.Image:
    return Image.new("RGB", size, colour)


def encoded(picture: Image.Image, kind: str) -> dict[str, Any]:
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return {"bytes": buffer.getvalue(), "path": None}


def test_images_are_their_pixels(tmp_path: Path) -> None:
    red, blue = image((255, 0, 0)), image((0, 0, 255))
    red.save(tmp_path / "red.bmp")
    files = [encoded(red, "PNG"), encoded(red, "BMP"), {"bytes": None, "path": str(tmp_path / "red.bmp")}]
    rows = datasets.Dataset.from_dict({"image": [*files, encoded(blue, "PNG")]})
    as_images = rows.cast_column("image", datasets.Image())
    for digests in (row_digests(rows, ["image"]), row_digests(as_images)):
        assert len(set(digests[:3])) == 1 and digests[3] != digests[0] == digest_of([red])
    assert digest_of([image((0, 0, 0), (2, 3))]) != digest_of([image((0, 0, 0), (3, 2))])


def test_a_broken_image_is_its_bytes() -> None:
    broken = datasets.Dataset.from_dict({"image": [{"bytes": b"no image", "path": None}] * 2})
    assert len(set(row_digests(broken.cast_column("image", datasets.Image())))) == 1


def test_other_values() -> None:
    assert digest_of([np.array([1, 2])]) == digest_of([[1, 2]])
    assert digest_of([np.int32(1)]) == digest_of([1]) != digest_of([True])
    assert digest_of([datetime.date(2020, 1, 2)]) != digest_of([datetime.date(2020, 1, 3)])
    with pytest.raises(DataError, match=r"a row holds a object, which has no canonical form .* Give text, numbers"):
        digest_of([object()])


def test_overlap() -> None:
    certification, calibration = ROWS.select(range(5, 105)), ROWS.select(range(8))
    assert overlap(certification, calibration).tolist() == [0, 1, 2]
    refuse_overlap(certification, ROWS.select(range(5)))
    message = (
        r"3 of 100 certification rows are among the 8 calibration rows too, .* row 0: .*'film 5'.*\. Give rows that"
    )
    with pytest.raises(DataError, match=message):
        refuse_overlap(certification, calibration)
    with pytest.raises(DataError, match=r"row 0: \{'text': 'x{80}\.\.\.'\}"):
        refuse_overlap(table(["x" * 100]), table(["x" * 100]))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: three_splits(ROWS, 0, (0.5, 0.5, 0.5)), ConfigurationError, r"shares=\(0\.5, 0\.5, 0\.5\) are not th"),
        (lambda: three_splits(ROWS, 0, (0.5, 0.5)), ConfigurationError, r"shares=\(0\.5, 0\.5\) are not three numbers"),
        (
            lambda: three_splits(ROWS, 0, (0.5, 0.5, 0)),
            ConfigurationError,
            r"are not three numbers above 0 with the su",
        ),
        (lambda: three_splits(table(["a"] * 9), 0), DataError, r"9 rows split into .* Give more rows that differ, or"),
        (lambda: row_digests(ROWS, ["image"]), DataError, r"no column 'image': found text, label\. Name the columns"),
        (lambda: input_columns(ROWS.select_columns("label")), DataError, r"no column of inputs: found label, all of"),
    ],
    ids=["shares-above-1", "two-shares", "a-share-of-0", "all-rows-equal", "no-such-column", "labels-only"],
)
def test_bad_input(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
