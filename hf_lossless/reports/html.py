"""Renders the report of a saved folder as one self-contained HTML page.

Pictures, style and script are inside the file. Names and texts come from files that anyone may have edited: jinja2
escapes them all, and the page's content security policy allows only the script with the given digest, and no request at
all.
"""

import base64
import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata, resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from hf_lossless.certification.certificate import CERTIFIED, LOSS_DECREASED, Certificate
from hf_lossless.checkpoints.entry import LosslessCheckpointConfig
from hf_lossless.checkpoints.record import CompressionRecord
from hf_lossless.checkpoints.saved_folder import SavedFolder
from hf_lossless.reports.pictures.agreement import agreement_figure
from hf_lossless.reports.pictures.frontier import frontier_figure
from hf_lossless.reports.pictures.layers import layers_figure
from hf_lossless.reports.pictures.style import svg_data_uri
from hf_lossless.reports.tables import layer_columns
from hf_lossless.reports.words import limitations
from hf_lossless.storage.kinds import KINDS
from hf_lossless.storage.plan import CompressionPlan

GENERATOR = "hf-lossless report"
"""The report's generator tag, by which an older report is recognised."""


@dataclass(frozen=True)
class _Picture:
    """An image as a data URI, its alternative text and its caption."""

    uri: str
    alt: str
    caption: str


@dataclass(frozen=True)
class _Verdict:
    """The outcome of the certificate: its tone ("good", "bad" or "none"), a headline, and full texts."""

    tone: str
    headline: str
    texts: list[str]


def html_report(folder: str | os.PathLike[str]) -> str:
    """Renders a saved folder as one HTML page that needs no other file, no script from elsewhere and no network.

    The page has size and verdict, pictures, a table of the layers, what was not checked, and the provenance. It says so
    where the folder has no certificate or no compression.json.

    Args:
        folder: A folder written by `hf-lossless compress`, or by `save_pretrained` of a compressed model.

    Raises:
        CheckpointError: The folder holds no compressed model, or contradicts itself.
        PlanError: Its plan is malformed.
    """
    saved = SavedFolder.read(folder)
    config, record, plan, about = saved.entry, saved.record, saved.plan, saved.config
    environment = Environment(
        loader=PackageLoader("hf_lossless.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = _resource("report.js")
    return environment.get_template("report.html.jinja").render(
        generator=GENERATOR,
        version=metadata.version("hf-lossless"),
        style=Markup(_resource("report.css")),
        script=Markup(script),
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        name=saved.path.resolve().name,
        architecture=_text(about.get("architectures")),
        config=config,
        ratio=plan.original_bytes / config.size_bytes,
        plan=plan,
        certificate=config.certificate,
        verdict=_verdict(config.certificate, record),
        record=record,
        pictures=list(_pictures(plan, record)),
        summary=_summary(plan),
        columns=layer_columns(plan),
        largest_bytes=max((layer.cost_bytes for layer in plan.layers.values()), default=0),
        unchecked=limitations(config, record),
        provenance=_provenance(config, record, about),
    )


def _resource(name: str) -> str:
    return resources.files("hf_lossless.reports").joinpath("templates", name).read_text(encoding="utf-8")


def _text(value: Any) -> str:
    """Formats any value of a config.json as text."""
    if value is None:
        return "unknown"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _verdict(certificate: Certificate | None, record: CompressionRecord | None) -> _Verdict:
    if certificate is None:
        text = (
            "Nothing is proven of rows that had no part in making this model. A compression with a tolerance as its "
            "target is certified; a finished model can be tested with: hf-lossless certify."
        )
        return _Verdict("none", "Not certified: the folder has no certificate", [text])
    seen = certificate.evidence
    share = f"{100 * abs(seen.tolerance):.3g} % of the original's"
    outcome = f"did not rise by more than {share}" if seen.tolerance > 0 else f"fell by more than {share}"
    headlines = {CERTIFIED: f"Certified: the loss {outcome}", LOSS_DECREASED: "Certified: the loss fell"}
    rows = f", on {seen.num_rows:,} held-out rows, at {100 * seen.confidence:.6g} % confidence"
    headline = headlines.get(certificate.verdict)
    not_smaller = [] if record is None or record.not_smaller is None else [f"Not smaller: {record.not_smaller}."]
    return _Verdict(
        "good" if certificate.passed else "bad",
        "Not certified" if headline is None else headline + rows,
        [certificate.paragraph(), *not_smaller],
    )


def _pictures(plan: CompressionPlan, record: CompressionRecord | None) -> Iterator[_Picture]:
    if record is not None:
        size, predicted = record.chosen
        yield _Picture(
            svg_data_uri(frontier_figure(record)),
            f"The frontier: {record.frontier_plans:,} plans by size and predicted change of the loss. The chosen plan "
            f"takes {size:,} bytes and is predicted to change the loss by {predicted:+.3g}.",
            "The plans that no other beats in both size and predicted loss. Bars reach two standard errors to each "
            "side. Around 0 the axis is linear: what lies there is too small to matter.",
        )
    order = "of the model" if record is not None else "of their names"
    has_ranks = any(layer.low_rank is not None for layer in plan.layers.values())
    yield _Picture(
        svg_data_uri(layers_figure(plan)),
        f"How each of {len(plan.layers):,} layers is stored: {'; '.join(_summary(plan))}.",
        f"Layers in the order {order}."
        + (" A rank stands as a number at the end of its bar where there is room." if has_ranks else ""),
    )
    if record is not None and record.checks:
        yield _Picture(
            svg_data_uri(agreement_figure(record)),
            f"Predicted against measured: {len(record.checks):,} measurements on the calibration rows.",
            "What was measured while the plan was made, on the calibration rows. Bars reach two standard errors to "
            "each side.",
        )


def _summary(plan: CompressionPlan) -> list[str]:
    """Summarises how many layers are of each kind, and their bytes."""
    texts = []
    for kind, what in KINDS.items():
        found = [layer for layer in plan.layers.values() if layer.kind == kind]
        if found:
            texts.append(f"{len(found):,} as {what.words}, {sum(layer.cost_bytes for layer in found):,} bytes")
    return texts


def _provenance(
    config: LosslessCheckpointConfig, record: CompressionRecord | None, about: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """Lists what is known of the model's origin, as pairs of heading and text."""
    lines = [
        ("theory", config.plan.theory),
        ("architecture", _text(about.get("architectures"))),
        ("kind of model", _text(about.get("model_type"))),
        ("format version", str(config.format_version)),
        ("transformers that saved it", _text(about.get("transformers_version"))),
    ]
    if record is not None:
        error = record.measured_loss_change_error
        measured = "not finite" if record.measured_loss_change is None else f"{record.measured_loss_change:+.4g}"
        exact = "" if record.resolution_bytes == 0 else f", sizes rounded up to {record.resolution_bytes:,} bytes"
        lines += [
            (
                "calibration rows",
                f"{record.calibration_rows:,}, mean loss of the original {record.calibration_loss:.4g}",
            ),
            ("predicted change of the loss", f"{record.chosen[1]:+.4g}"),
            ("measured on the calibration rows", measured + ("" if error is None else f", standard error {error:.2g}")),
            ("plans on the frontier", f"{record.frontier_plans:,}{exact}"),
        ]
    if record is not None and config.certificate is None:
        lines.append(("versions", ", ".join(f"{name} {version}" for name, version in record.versions.items())))
    return lines
