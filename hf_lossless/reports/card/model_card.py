"""Renders a checkpoint's model card from its plan and its certificate, by the template beside this file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from hf_lossless.certification.certificate import Certificate
from hf_lossless.checkpoints.entry import LosslessCheckpointConfig
from hf_lossless.checkpoints.names import with_present_bytes
from hf_lossless.checkpoints.record import CompressionRecord, plan_in_order, record_of
from hf_lossless.checkpoints.saved_folder import SavedFolder
from hf_lossless.errors import CheckpointError
from hf_lossless.reports.card.details import UNKNOWN_DATASET, CardDetails, details_of_base, is_hub_id
from hf_lossless.reports.card.digest import with_digest
from hf_lossless.reports.card.text import (
    CAPTIONS,
    FRONTIER,
    layers_table,
    loading_code,
    markdown_table,
    not_checked,
    storage_table,
    task_name,
)

_TEMPLATE = Path(__file__).with_name("template.md")


@dataclass(frozen=True)
class _Source:
    """The data that a card is rendered from, read from a folder or a model."""

    entry: LosslessCheckpointConfig
    record: CompressionRecord | None
    config: Mapping[str, Any]
    files: Sequence[str]
    name: str

    @property
    def architecture(self) -> str:
        """Returns the name of the saved class."""
        return next(iter(self.config.get("architectures") or ()), "PreTrainedModel")


def model_card(
    source: PreTrainedModel | str | Path,
    details: CardDetails | None = None,
    *,
    repo_id: str | None = None,
    token: str | None = None,
) -> ModelCard:
    """Renders the card of a compressed checkpoint: the compression, the certificate, and what was not checked.

    Args:
        source: A folder with a compressed checkpoint, or a compressed model.
        details: Details that the checkpoint does not contain; missing licence and language are read from the base
            model's card. None: only the base model of a model that was just compressed.
        repo_id: The model's future repository; None: it has its folder's name.
        token: Token for a base model that is not public.

    Returns:
        The card; `str(card)` is the text of README.md with its digest line (see `reports.card.digest`),
        `card.save(path)` writes it.

    Raises:
        CheckpointError: The folder or the model is not compressed by this package, or the folder is not complete.
        ConfigurationError: The details cannot be used.

    Example::

        card = model_card("my-model-small", CardDetails(base_model="google-bert/bert-base-uncased"))
        card.save("my-model-small/README.md")
    """
    if isinstance(source, PreTrainedModel):
        found = _of_model(source, repo_id)
        details = (details or CardDetails()).filled_from(CardDetails(base_model=base_of(source)))
    else:
        found = _of_folder(Path(source), repo_id)
        details = details or CardDetails()
    if details.base_model is not None and (details.license is None or details.language is None):
        details = details.filled_from(details_of_base(details.base_model, token))
    card = ModelCard.from_template(_metadata(found, details), template_path=str(_TEMPLATE), **_words(found, details))
    return ModelCard(with_digest(str(card)))


def _of_folder(folder: Path, repo_id: str | None) -> _Source:
    saved = SavedFolder.read(folder)
    files = [path.name for path in folder.iterdir()]
    return _Source(saved.entry, saved.record, saved.config, files, repo_id or folder.resolve().name)


def _of_model(model: PreTrainedModel, repo_id: str | None) -> _Source:
    entry = entry_of(model)
    entry = LosslessCheckpointConfig.of(with_present_bytes(model, entry.plan), entry.certificate)
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    return _Source(entry, record_of_model(model), config, (), repo_id or "my-model-small")


def record_of_model(model: PreTrainedModel) -> CompressionRecord | None:
    """Returns the record of how a model was compressed; None where it was loaded compressed."""
    quantizer: Any = model.hf_quantizer
    return None if quantizer.result is None else record_of(quantizer.result)


def entry_of(model: PreTrainedModel) -> LosslessCheckpointConfig:
    """Returns a compressed model's entry in config.json.

    Raises:
        CheckpointError: The model is not compressed by this package.
    """
    # The config may be shared with a part that was saved since.
    entry = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    if not isinstance(entry, LosslessCheckpointConfig):
        raise CheckpointError(
            f"this {type(model).__name__} is not compressed by hf_lossless. Load it with "
            "quantization_config=LosslessCompressionConfig(dataset=...)."
        )
    return entry


def base_of(model: PreTrainedModel) -> str | None:
    """Returns the name or folder that a model was compressed from; None for a loaded compressed checkpoint.

    Raises:
        CheckpointError: As for `entry_of`.
    """
    entry_of(model)
    quantizer: Any = model.hf_quantizer
    name = model.name_or_path or ""
    return name if not quantizer.pre_quantized and (Path(name).is_dir() or is_hub_id(name)) else None


def _metadata(source: _Source, details: CardDetails) -> ModelCardData:
    """Makes the front matter."""
    task = task_name(source.architecture)
    certificate = source.entry.certificate
    kinds = {layer.kind for layer in source.entry.plan.layers.values()}
    return ModelCardData(
        base_model=details.base_id,
        base_model_relation="quantized" if details.base_id is not None else None,
        datasets=[details.dataset] if details.dataset is not None else None,
        eval_results=None if certificate is None else _results(certificate, task or "other", details),
        language=list(details.language) if details.language else None,
        library_name="transformers",
        license=details.license,
        license_name=details.license_name,
        license_link=details.license_link,
        metrics=None if certificate is None else [certificate.evidence.metric_name],
        model_name=None if certificate is None else source.name.rsplit("/", 1)[-1],  # of the results
        pipeline_tag=task,
        tags=["hf-lossless", "quantized", "compressed", *(["low-rank"] if kinds & {"low_rank", "sum"} else [])],
    )


def _results(certificate: Certificate, task: str, details: CardDetails) -> list[EvalResult]:
    """Lists the certificate's measurements of the compressed model."""
    seen = certificate.evidence
    measured = {seen.metric_name: seen.compressed_metric, "loss": seen.compressed_loss}
    return [
        EvalResult(
            task_type=task,
            dataset_type=details.dataset or UNKNOWN_DATASET,
            dataset_name=details.dataset or UNKNOWN_DATASET,
            dataset_split=details.split,
            metric_type=name,
            metric_name=f"{name}, {seen.num_rows:,} held-out rows",
            metric_value=estimate.value,
        )
        for name, estimate in measured.items()
    ]


def _words(source: _Source, details: CardDetails) -> dict[str, Any]:
    """Makes the template's variables."""
    entry, record = source.entry, source.record
    plan = plan_in_order(entry.plan, record)
    certificate = entry.certificate
    base = details.base_id
    return {
        "title": source.name.rsplit("/", 1)[-1],
        "name": source.name,
        "architecture": source.architecture,
        "origin": f"[{base}](https://huggingface.co/{base})" if base else f"A {source.architecture}",
        "ratio": f"{plan.original_bytes / entry.size_bytes:.2f}",
        "size_bytes": f"{entry.size_bytes:,}",
        "original_bytes": f"{plan.original_bytes:,}",
        "headline": _headline(certificate),
        "paragraph": None if certificate is None else certificate.paragraph(),
        "not_smaller": None if record is None else record.not_smaller,
        "certificate_table": None if certificate is None else _certificate_table(certificate),
        "data_sentence": _data_sentence(details),
        "theory": plan.theory,
        "predicted": f"{plan.predicted_loss_change:+.2g}",
        "measured": _measured(record),
        "activations": (
            "The inputs of some layers are quantised too, simulated in floating point."
            if plan.activations == "quantised"
            else "Activations stay in floating point."
        ),
        "storage_table": storage_table(plan),
        "layers_table": layers_table(plan),
        "num_layers": len(plan.layers),
        "pictures": {file: text for file, text in CAPTIONS.items() if record is not None or file != FRONTIER},
        "loading_code": loading_code(source.name, source.architecture, source.files, plan),
        "not_checked": not_checked(entry, record),
        "provenance": _provenance(source, details),
    }


def _headline(certificate: Certificate | None) -> str:
    if certificate is None:
        return "Without a certificate."
    return f"{certificate.verdict[0].upper()}{certificate.verdict[1:]}."


def _measured(record: CompressionRecord | None) -> str:
    if record is None or record.measured_loss_change is None:
        return "that is a prediction, no measurement"
    change, error = record.measured_loss_change, record.measured_loss_change_error
    scatter = "" if error is None else f" (standard error {error:.1g})"
    return f"measured on the {record.calibration_rows:,} calibration rows, it was {change:+.2g}{scatter}"


def _certificate_table(certificate: Certificate) -> str:
    return markdown_table(("", "original", "compressed"), certificate.table())


def _data_sentence(details: CardDetails) -> str:
    if details.dataset is None:
        return "; which data set the rows are from is not recorded here, their fingerprint is in the table"
    split = f", split `{details.split}`" if details.split else ""
    return f"; the rows are from [{details.dataset}](https://huggingface.co/datasets/{details.dataset}){split}"


def _provenance(source: _Source, details: CardDetails) -> list[str]:
    """Lists the recorded versions, base model and licence; nothing of the machine that renders the card."""
    entry = source.entry
    base = f"base model: {details.base_id}" if details.base_id else "base model: not named on the Hub"
    licence = details.license_name or details.license
    lines = [
        base,
        f"licence: {licence}" if licence else "licence: not known here; that of the base model holds",
        f"theory `{entry.plan.theory}`, format version {entry.format_version} of `hf_lossless`",
    ]
    made = source.record if entry.certificate is None else entry.certificate.provenance
    if made is not None:
        versions = ", ".join(f"{name} {version}" for name, version in sorted(made.versions.items()))
        lines.append(f"compressed with {versions}")
    elif version := source.config.get("transformers_version"):
        lines.append(f"saved by transformers {version}; other versions are not recorded")
    return lines
