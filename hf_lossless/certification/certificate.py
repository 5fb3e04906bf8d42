"""The certificate of a compressed model on held-out rows, as stored in config.json and printed in a model card.

It has three parts: its origin (`Provenance`), measurements and tests (`Evidence`), and the verdict, which follows from
the evidence alone and is checked against it whenever a certificate is read. Verdicts:

- "certified": loss and metric both pass their tests of non-inferiority.
- "loss decreased": the same, and the upper bound of the plain change of the loss is below zero. Tested only after the
  weaker statement has passed, so that it takes no share of alpha. In a walk it is a statement about its one plan only,
  not covered by the walk's error rate.
- "not certified: ...": followed by the tests that failed, and the number of rows needed where there were too few.
  Below `MIN_ROWS` rows nothing is certified, whatever they show.

This file does not import torch, so that config.json can be read without it.
"""

from importlib import metadata
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from hf_lossless.errors import CheckpointError
from hf_lossless.storage.records import Record, read_record

CERTIFIED, LOSS_DECREASED = "certified", "loss decreased"

TOLERANCE = 0.01
"""Share of the original's loss by which the loss may rise, where no target is given."""

METRIC_MARGIN = 0.005
CONFIDENCE = 0.95

MIN_ROWS = 500
"""Least number of rows for a certificate. The tests hold their level only where the sample contains the tail: in the
simulation of recipes/benchmarks/certificate.json, where one row in a hundred is much worse, 14 % of the walks passed
wrongly with 300 rows (5 % were allowed), 4 % with 1,000."""

_LIBRARIES = ("hf-lossless", "torch", "transformers", "datasets", "numpy", "scipy")

_Number = Annotated[float, Field(allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=0)]


def library_versions() -> dict[str, str]:
    """Returns the versions of the libraries that the numbers depend on."""
    return {name: metadata.version(name) for name in _LIBRARIES}


class Provenance(Record):
    """The origin of a certificate: data, theory and versions.

    Attributes:
        data_fingerprint: Hash of the certification rows (`data.splits.fingerprint`).
        calibration_rows: Number of calibration rows; None where a finished model is judged, of which it is unknown.
        selection_rows: Number of rows that plans were selected on; None where unknown.
        theory: Name of the theory that predicted the losses.
        seed: Seed of the splits and of calibration; None where unknown.
        runtime: How the compressed model was computed (`storage.runtime.runtimes`); certificates of older releases do
            not say it, and were measured in floating point.
        versions: Versions of the libraries, by name.
    """

    data_fingerprint: str
    calibration_rows: _Count | None
    selection_rows: _Count | None
    theory: str
    seed: _Count | None
    runtime: Literal["auto", "fast", "small", "exact"] = "exact"
    versions: dict[str, str] = Field(default_factory=library_versions)

    @property
    def unseen(self) -> str:
        """States whether the certification rows were unseen by calibration and selection."""
        if self.calibration_rows is None or self.selection_rows is None:
            return ", provided that none of them had a part in making the model"
        return (
            f" that neither calibration ({self.calibration_rows:,} rows) nor selection ({self.selection_rows:,} rows) "
            "has seen"
        )


class Estimate(Record):
    """A mean over the certification rows, with its two-sided confidence interval."""

    value: _Number
    low: _Number
    high: _Number


class TestOutcome(Record):
    """The outcome of a test of non-inferiority (for the fields see `non_inferiority.NonInferiority`)."""

    __test__ = False  # else pytest takes it for a test

    method: str
    p_value: Annotated[float, Field(ge=0, le=1)]
    bound: _Number
    required_rows: _Count | None


class Evidence(Record):
    """Measurements and tests on the certification rows.

    Attributes:
        num_rows: Number of certification rows.
        confidence: Confidence 1 - alpha of each bound and interval.
        tolerance: Share of the original's mean loss by which the loss may rise.
        original_loss: Mean loss of the original.
        compressed_loss: Mean loss of the compressed model.
        loss_change: Mean of the paired differences of losses.
        loss_change_error: Standard error of `loss_change`.
        loss_change_bound: One-sided upper bound of the mean change.
        loss_test: Test of E[compressed - (1 + tolerance) original] < 0.
        metric_name: The task's metric.
        metric_margin: How far the metric may fall.
        original_metric: Metric of the original.
        compressed_metric: Metric of the compressed model.
        metric_test: Test of E[original - compressed] < margin.
        flips: Rows whose prediction changed.
        right_to_wrong: Flips whose score fell.
        wrong_to_right: Flips whose score rose.
        mean_kl: Mean divergence of the outputs from the original's, in nats; None for tasks without class scores.
    """

    num_rows: Annotated[int, Field(ge=2)]
    confidence: Annotated[float, Field(gt=0, lt=1)]
    tolerance: _Number
    original_loss: Estimate
    compressed_loss: Estimate
    loss_change: _Number
    loss_change_error: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    loss_change_bound: _Number
    loss_test: TestOutcome
    metric_name: str
    metric_margin: _Number
    original_metric: Estimate
    compressed_metric: Estimate
    metric_test: TestOutcome
    flips: _Count
    right_to_wrong: _Count
    wrong_to_right: _Count
    mean_kl: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None

    @property
    def verdict(self) -> str:
        """Derives the verdict from the tests."""
        failures = []
        if self.num_rows < MIN_ROWS:
            failures.append(
                f"{self.num_rows:,} rows are fewer than the {MIN_ROWS:,} that a certificate takes, for rare bad rows "
                "hide from so few"
            )
        if self.loss_test.p_value >= 1 - self.confidence:
            excess = self.loss_change - self.tolerance * self.original_loss.value
            failures.append(f"{self._loss_failure}{self._too_few(self.loss_test, excess)}")
        if self.metric_test.p_value >= 1 - self.confidence:
            excess = self.original_metric.value - self.compressed_metric.value - self.metric_margin
            failures.append(f"{self._metric_failure}{self._too_few(self.metric_test, excess)}")
        if failures:
            return f"not certified: {'; '.join(failures)}"
        return LOSS_DECREASED if self.loss_change_bound < 0 else CERTIFIED

    @property
    def _loss_failure(self) -> str:
        if self.tolerance > 0:
            return f"the loss may have risen by more than {self.tolerance:.3g} of the original's"
        return f"the loss is not shown to have fallen by more than {abs(self.tolerance):.3g} of the original's"

    @property
    def _metric_failure(self) -> str:
        if self.metric_margin > 0:
            return f"the {self.metric_name} may have fallen by more than {self.metric_margin:.3g}"
        return f"the {self.metric_name} is not shown to have risen by more than {abs(self.metric_margin):.3g}"

    def _too_few(self, test: TestOutcome, excess: float) -> str:
        """States how many rows could suffice; "" where there were enough, or where the excess is not negative."""
        if test.required_rows is None or test.required_rows <= self.num_rows or excess >= 0:
            return ""
        return f" ({self.num_rows:,} rows are too few to tell; about {test.required_rows:,} may be enough)"


class Certificate(Record):
    """A verdict with its evidence and its provenance.

    Attributes:
        verdict: "certified", "loss decreased", or "not certified: " and the reason.
        evidence: Measurements and tests.
        provenance: Data, theory and versions.
    """

    verdict: str
    evidence: Evidence
    provenance: Provenance

    @model_validator(mode="after")
    def _verdict_follows(self) -> "Certificate":
        if self.verdict != self.evidence.verdict:
            raise ValueError(
                f"the verdict {self.verdict!r} does not follow from the evidence, which says {self.evidence.verdict!r}"
            )
        return self

    @property
    def passed(self) -> bool:
        """Tells whether the model passed: held-out data show it to be no worse by more than the margins."""
        return self.verdict in (CERTIFIED, LOSS_DECREASED)

    def paragraph(self) -> str:
        """Writes the certificate as a few plain sentences, for a model card."""
        seen, made = self.evidence, self.provenance
        sure = f"{seen.confidence:.6g}"
        divergence = (
            "" if seen.mean_kl is None else f" The outputs moved by a mean KL divergence of {seen.mean_kl:.2g}."
        )
        return (
            f"{self.verdict[0].upper()}{self.verdict[1:]}. Judged on {seen.num_rows:,} rows{made.unseen}. "
            f"The mean loss is {seen.compressed_loss.value:.4g}, the original's {seen.original_loss.value:.4g}; the "
            f"change is at most {seen.loss_change_bound:+.2g} at confidence {sure}; {self._asked_of_loss}. "
            f"The {seen.metric_name} is {seen.compressed_metric.value:.4g}, the original's "
            f"{seen.original_metric.value:.4g}; it fell by at most {seen.metric_test.bound:.2g} at confidence {sure}; "
            f"{self._asked_of_metric}. "
            f"{seen.flips:,} predictions changed, {seen.right_to_wrong:,} from right to wrong and "
            f"{seen.wrong_to_right:,} from wrong to right.{divergence} "
            "This holds for rows like these; it says nothing of other data."
        )

    @property
    def _asked_of_loss(self) -> str:
        share = f"{abs(self.evidence.tolerance):.3g} of the original's loss"
        asked = f"a rise of {share} was tolerated" if self.evidence.tolerance > 0 else f"a fall of {share} was demanded"
        # The bound of the change does not decide this: the original's loss varies too, correlated with it.
        bound = self.evidence.loss_test.bound
        outcome = f"kept with {-bound:.1g} to spare" if bound < 0 else f"perhaps missed by {bound:.1g}"
        return f"{asked}, and is {outcome}"

    @property
    def _asked_of_metric(self) -> str:
        margin = self.evidence.metric_margin
        return f"a fall of {margin:.3g} was allowed" if margin > 0 else f"a rise of {abs(margin):.3g} was demanded"

    def table(self) -> list[tuple[str, str, str]]:
        """Makes table rows of ("", original, compressed); values of both models stand under compressed."""
        seen, made = self.evidence, self.provenance
        return [
            ("held-out loss", _with_interval(seen.original_loss), _with_interval(seen.compressed_loss)),
            (
                f"held-out {seen.metric_name}",
                _with_interval(seen.original_metric),
                _with_interval(seen.compressed_metric),
            ),
            ("change of the loss", "", f"{seen.loss_change:+.4g} ± {seen.loss_change_error:.2g}"),
            ("its upper bound", "", f"{seen.loss_change_bound:+.4g}"),
            ("tolerated rise, of the original's loss", "", f"{seen.tolerance:.3g}"),
            ("test of the loss", "", f"{seen.loss_test.method}: p = {seen.loss_test.p_value:.2g}"),
            (f"upper bound of the fall in {seen.metric_name}", "", f"{seen.metric_test.bound:.4g}"),
            ("allowed fall", "", f"{seen.metric_margin:.3g}"),
            (f"test of the {seen.metric_name}", "", f"{seen.metric_test.method}: p = {seen.metric_test.p_value:.2g}"),
            ("changed predictions", "", f"{seen.flips:,}"),
            ("from right to wrong, from wrong to right", "", f"{seen.right_to_wrong:,}, {seen.wrong_to_right:,}"),
            ("mean KL divergence", "", "none" if seen.mean_kl is None else f"{seen.mean_kl:.3g}"),
            ("confidence", "", f"{seen.confidence:.6g}"),
            (
                "rows: calibration, selection, certification",
                "",
                ", ".join(map(_known, (made.calibration_rows, made.selection_rows, seen.num_rows))),
            ),
            ("fingerprint of the certification rows", "", made.data_fingerprint),
            ("theory, seed", "", f"{made.theory}, {_known(made.seed)}"),
            ("run time", "", made.runtime),
            ("versions", "", ", ".join(f"{name} {version}" for name, version in made.versions.items())),
            ("verdict", "", self.verdict),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Returns the certificate as JSON-ready values."""
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, values: Any) -> "Certificate":
        """Reads a certificate back.

        Args:
            values: Values from `to_dict`, possibly through a JSON file.

        Raises:
            CheckpointError: A field is missing, unknown, of the wrong type or range, or the verdict does not follow
                from the evidence.
        """
        remedy = "Take config.json again from where the checkpoint came from, or certify the model again."
        return read_record(cls, values, "the certificate", CheckpointError, remedy)


def _known(number: int | None) -> str:
    return "unknown" if number is None else f"{number:,}"


def _with_interval(estimate: Estimate) -> str:
    return f"{estimate.value:.4g} ({estimate.low:.4g} to {estimate.high:.4g})"
