"""Splits the user's rows into three disjoint sets: calibration, selection, certification.

A row's split is a function of its own content, not of its place:

    digest = blake2b(inputs of the row),    u = blake2b(digest, keyed by the seed) / 2^64  in [0, 1)

and u falls into one of three intervals as long as the shares. So two equal rows never straddle two splits, the order of
rows does not matter, and every process, machine and run finds the same splits. The price is that the sizes of the
splits are the shares only on average.

The hash covers what the model sees: every column except labels (or answers) and running numbers. Labels are left out
because the same text under two labels would otherwise be two rows, one to calibrate on and one to certify on, and the
model would be judged on an input that it was fitted to. Running numbers are left out because they make every row
unique. Names of columns are left out too (their alphabetical order stays), so that a column "text" in one data set
equals a column "sentence" in another. Images are hashed as pixels, whatever their file format. Near-duplicates (an
extra blank, another JPEG quality) count as different rows.
"""

import hashlib
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hf_lossless.data.tasks.columns import TARGET_COLUMNS
from hf_lossless.errors import ConfigurationError, DataError

SHARES = (0.2, 0.2, 0.6)
"""Shares of calibration, selection and certification. 128 rows are enough to calibrate on; more certification rows
tighten the bound."""

_RUNNING_NUMBERS = ("idx", "id", "index", "guid", "__index_level_0__")
_DIGEST_BYTES = 16
_BATCH_SIZE = 1000


@dataclass(frozen=True)
class Splits:
    """The three splits of a data set; no row's content is in two of them.

    Attributes:
        calibration: Rows for the statistics and the predictions of the loss.
        selection: Rows on which plans are measured and ordered.
        certification: Rows for the certificate, used for nothing else.
    """

    calibration: datasets.Dataset
    selection: datasets.Dataset
    certification: datasets.Dataset


def three_splits(
    rows: datasets.Dataset, seed: int, shares: Sequence[float] = SHARES, columns: Sequence[str] | None = None
) -> Splits:
    """Splits a data set in three; each row goes to exactly one split, and splits keep the order of rows.

    Args:
        rows: All of the user's rows.
        seed: Seed of the splits.
        shares: Expected share of each split; above 0, with the sum 1.
        columns: The model's inputs; None: all but labels and running numbers.

    Raises:
        DataError: A split is left without rows, or a value cannot be hashed.
        ConfigurationError: The shares are no shares.
    """
    split_of_row = assign(row_digests(rows, columns), seed, shares)
    indices = [np.flatnonzero(split_of_row == split) for split in range(len(SHARES))]
    if not all(map(len, indices)):
        raise DataError(
            f"{len(rows)} rows split into {', '.join(str(len(split)) for split in indices)} for calibration, selection "
            "and certification. Give more rows that differ, or the three splits separately."
        )
    return Splits(*(rows.select(split) for split in indices))


def assign(digests: Sequence[bytes], seed: int, shares: Sequence[float] = SHARES) -> NDArray[np.intp]:
    """Assigns a split to each digest: 0, 1 or 2 for calibration, selection or certification.

    Raises:
        ConfigurationError: The shares are no shares.
    """
    if len(shares) != len(SHARES) or not all(share > 0 for share in shares) or not math.isclose(sum(shares), 1):
        raise ConfigurationError(f"shares={tuple(shares)} are not three numbers above 0 with the sum 1. Give such.")
    key = str(seed).encode()
    keyed = b"".join(hashlib.blake2b(digest, digest_size=8, key=key).digest() for digest in digests)
    places = np.frombuffer(keyed, dtype="<u8") / 2.0**64
    # The last edge is left out: everything beyond the second belongs to the third, whatever the sum rounds to.
    return np.searchsorted(np.cumsum(shares)[:-1], places, side="right")


def fingerprint(rows: datasets.Dataset) -> str:
    """Computes a hash of a set of rows, inputs and labels, in any order; equal rows count as often as they come.

    Labels are part of the content here, since another label gives another loss.
    """
    labels = [name for name in rows.column_names if name in TARGET_COLUMNS]
    digests = row_digests(rows, [*input_columns(rows), *labels])
    return hashlib.blake2b(b"".join(sorted(digests)), digest_size=_DIGEST_BYTES).hexdigest()


def overlap(rows: datasets.Dataset, others: datasets.Dataset, columns: Sequence[str] | None = None) -> NDArray[np.intp]:
    """Finds the indices of the rows whose inputs are also inputs of the other rows."""
    seen = set(row_digests(others, columns))
    return np.flatnonzero([digest in seen for digest in row_digests(rows, columns)])


def refuse_overlap(
    certification: datasets.Dataset,
    calibration: datasets.Dataset,
    columns: Sequence[str] | None = None,
    what: str = "calibration",
) -> None:
    """Raises an error where certification rows were also used to make the model that they judge.

    Raises:
        DataError: Some rows overlap; the message counts them and shows one.
    """
    shared = overlap(certification, calibration, columns)
    if len(shared):
        shown = {name: _shortened(value) for name, value in certification[int(shared[0])].items()}
        raise DataError(
            f"{len(shared)} of {len(certification)} certification rows are among the {len(calibration)} {what} "
            f"rows too, the first of them row {shared[0]}: {shown}. Give rows that were not used before, or one data "
            "set from which the splits are made."
        )


def _shortened(value: Any, longest: int = 80) -> str:
    text = str(value)
    return text if len(text) <= longest else f"{text[:longest]}..."


def input_columns(rows: datasets.Dataset) -> list[str]:
    """Finds the columns that are hashed by default, in alphabetical order.

    Raises:
        DataError: All columns are labels or running numbers.
    """
    columns = sorted(set(rows.column_names) - {*TARGET_COLUMNS, *_RUNNING_NUMBERS})
    if not columns:
        raise DataError(
            f"the rows have no column of inputs: found {', '.join(rows.column_names) or 'none'}, all of them labels or "
            "running numbers. Add the model's inputs."
        )
    return columns


def row_digests(rows: datasets.Dataset, columns: Sequence[str] | None = None) -> list[bytes]:
    """Computes the digest of each row's content: 16 bytes, the same on every machine.

    Args:
        rows: Any rows; read in batches, so that they need not fit memory.
        columns: The columns to hash, in this order; None: the input columns.

    Raises:
        DataError: A column is missing, or holds a value that has no canonical form.
    """
    columns = input_columns(rows) if columns is None else list(columns)
    missing = [name for name in columns if name not in rows.column_names]
    if missing:
        raise DataError(
            f"the rows have no column {', '.join(map(repr, missing))}: found {', '.join(rows.column_names)}. "
            "Name the columns of the model's inputs."
        )
    chosen = rows.with_format(None).select_columns(list(dict.fromkeys(columns)))
    for name, feature in chosen.features.items():
        if isinstance(feature, datasets.Image):  # decoded here: a broken one must not end the loop
            chosen = chosen.cast_column(name, datasets.Image(decode=False))
    digests = []
    for batch in chosen.iter(batch_size=_BATCH_SIZE):
        digests += [digest_of(values) for values in zip(*(batch[name] for name in columns), strict=True)]
    return digests


def digest_of(values: Iterable[Any]) -> bytes:
    """Computes the digest of one row's values, in order.

    Example:
        >>> digest_of(["a film", 1]) == digest_of(["a film", 1]) != digest_of(["a film", "1"])
        True
    """
    return hashlib.blake2b(_canonical(tuple(values)), digest_size=_DIGEST_BYTES).digest()


def _canonical(value: Any) -> bytes:
    """Encodes a value as bytes: a letter for its kind, the length of its content, its content. The code is unique."""
    kind, content = _kind_and_content(value)
    return kind + struct.pack("<Q", len(content)) + content


def _kind_and_content(value: Any) -> tuple[bytes, bytes]:
    if value is None:
        return b"n", b""
    if isinstance(value, str):
        return b"s", value.encode("utf-8", "surrogatepass")
    if isinstance(value, bool | np.bool_):
        return b"o", b"1" if value else b"0"
    if isinstance(value, int | np.integer):
        return b"i", str(int(value)).encode()
    if isinstance(value, float | np.floating):
        number = float(value) + 0.0  # -0.0 becomes 0.0
        return b"f", b"nan" if math.isnan(number) else struct.pack("<d", number)
    if isinstance(value, bytes):
        return b"b", value
    if isinstance(value, Mapping):
        if set(value) == {"bytes", "path"}:
            return _image_file(value)
        return b"m", b"".join(_canonical(str(name)) + _canonical(value[name]) for name in sorted(value, key=str))
    if isinstance(value, list | tuple):
        return b"l", b"".join(map(_canonical, value))
    if isinstance(value, np.ndarray):
        return _kind_and_content(value.tolist())
    if isinstance(value, Image.Image):
        return _pixels(value)
    if hasattr(value, "isoformat"):  # dates and times
        return b"d", value.isoformat().encode()
    raise DataError(
        f"a row holds a {type(value).__name__}, which has no canonical form to tell equal rows by. Give text, numbers, "
        "images, or lists and dicts of them; or name the columns that are to be compared."
    )


def _pixels(image: Image.Image) -> tuple[bytes, bytes]:
    """Encodes the pixels of an image as a model sees them: RGB, whatever mode the image was stored in."""
    rgb = image.convert("RGB")
    return b"p", struct.pack("<2Q", *rgb.size) + rgb.tobytes()


def _image_file(file: Mapping[str, Any]) -> tuple[bytes, bytes]:
    """Encodes an undecoded image: its pixels, or its bytes where it cannot be decoded (the task reports that)."""
    try:
        return _pixels(datasets.Image().decode_example({"bytes": file["bytes"], "path": file["path"]}))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # what Pillow raises
        return b"r", file["bytes"] or str(file["path"]).encode()
