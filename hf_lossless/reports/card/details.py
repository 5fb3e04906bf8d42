"""The details of a card that no checkpoint contains: base model, data set, licence and language.

They come from the user, from the base model's own card (licence and language), or from the front matter of a card that
was rendered before, so that nobody has to give them twice.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import httpx, validate_repo_id  # type: ignore[attr-defined]  # exported lazily

from hf_lossless.errors import ConfigurationError

_FILES = (".json", ".jsonl", ".csv", ".parquet")

_UNREADABLE = (EntryNotFoundError, httpx.HTTPError, OfflineModeIsEnabled, ValueError, yaml.YAMLError)
"""Errors of a missing card, of a Hub that refuses or cannot be reached, and of malformed front matter."""

UNKNOWN_DATASET = "unknown"
"""Type and name of the data set in the results of a card without one."""


@dataclass(frozen=True)
class CardDetails:
    """Details that the user gives of a model; None stands for "not known".

    Args:
        base_model: Hub id of the original, or its folder; a folder's name does not get into the card.
        dataset: Hub id of the data set of the rows.
        split: Split of the data set that the certificate's rows come from.
        license: The Hub's name of the licence, say "apache-2.0".
        license_name: The licence's own name, where `license` is "other".
        license_link: Address of the licence's text, where `license` is "other".
        language: Codes of the model's languages, say ("en",).

    Raises:
        ConfigurationError: `base_model` is neither a folder nor a Hub id, or `dataset` is no Hub id.

    Example:
        >>> details = CardDetails(dataset="stanfordnlp/sst2")
        >>> details.filled_from(CardDetails(dataset="nyu-mll/glue", license="mit"))
        CardDetails(base_model=None, dataset='stanfordnlp/sst2', split=None, license='mit', license_name=None, \
license_link=None, language=None)
    """

    base_model: str | None = None
    dataset: str | None = None
    split: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.base_model is not None and not Path(self.base_model).is_dir():
            _refuse_bad_id("base_model", self.base_model, "Give the Hub id of the original, or its folder.")
        if self.dataset is not None:
            remedy = "Give the Hub id of the data set, or leave it out where it is not on the Hub."
            if Path(self.dataset).suffix in _FILES or Path(self.dataset).is_file():
                raise ConfigurationError(f"dataset={self.dataset!r} is a file. {remedy}")
            _refuse_bad_id("dataset", self.dataset, remedy)

    @property
    def base_id(self) -> str | None:
        """Returns the base model's Hub id; None where it is not known, or a folder."""
        return None if self.base_model is None or Path(self.base_model).is_dir() else self.base_model

    def filled_from(self, other: "CardDetails") -> "CardDetails":
        """Fills unknown details from another instance; the three details of the licence are taken together."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in values.items():
            if value is None and not (name.startswith("license") and self.license is not None):
                values[name] = getattr(other, name)
        return CardDetails(**values)


def details_of_card(text: str) -> CardDetails:
    """Reads the details from the front matter of a rendered card."""
    data: Any = ModelCard(text).data
    results = data.eval_results or []
    return CardDetails(
        base_model=data.base_model,
        dataset=next(iter(data.datasets or ()), None),
        split=next((result.dataset_split for result in results), None),
        license=data.license,
        license_name=data.license_name,
        license_link=data.license_link,
        language=None if data.language is None else tuple(data.language),
    )


def details_of_base(base_model: str, token: str | None = None) -> CardDetails:
    """Reads licence and language from the base model's card; no details where it is missing or unreadable."""
    path = Path(base_model)
    source = str(path / "README.md") if path.is_dir() else base_model
    if path.is_dir() and not Path(source).is_file():
        return CardDetails()
    try:
        data: Any = ModelCard.load(source, token=token, ignore_metadata_errors=True).data
    except _UNREADABLE:
        return CardDetails()
    language = data.language
    return CardDetails(
        license=data.license,
        license_name=data.license_name,
        license_link=data.license_link,
        language=(language,) if isinstance(language, str) else None if language is None else tuple(language),
    )


def is_hub_id(name: str) -> bool:
    """Tells whether a name is a valid Hub id of a model or a data set."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return bool(name)


def _refuse_bad_id(what: str, value: str, remedy: str) -> None:
    if not is_hub_id(value):
        raise ConfigurationError(f"{what}={value!r} is not a Hub id. {remedy}")
