"""`certify`: makes a certificate from the outputs of two models on the certification rows.

compare -> test the loss -> test the metric -> verdict
"""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hf_lossless.certification.bounded_mean import bounded_interval
from hf_lossless.certification.certificate import (
    CONFIDENCE,
    METRIC_MARGIN,
    TOLERANCE,
    Certificate,
    Estimate,
    Evidence,
    Provenance,
    TestOutcome,
)
from hf_lossless.certification.comparison import Outputs, compare
from hf_lossless.certification.non_inferiority import NonInferiority, check_confidence, loss_test, metric_test
from hf_lossless.certification.skewed_mean import skewed_interval, skewed_upper_bound


def certify(
    original: Outputs,
    compressed: Outputs,
    provenance: Provenance,
    *,
    metric_name: str,
    tolerance: float = TOLERANCE,
    metric_margin: float = METRIC_MARGIN,
    confidence: float = CONFIDENCE,
) -> Certificate:
    """Judges a compressed model on rows that nothing else has used.

    Args:
        original: The original's outputs on the certification rows.
        compressed: The compressed model's outputs on the same rows, in the same order.
        provenance: Origin of data and plan.
        metric_name: Name of the metric in the outputs' scores.
        tolerance: Share of the original's mean loss by which the loss may rise; zero or below demands that it falls.
        metric_margin: How far the mean score may fall.
        confidence: Confidence 1 - alpha of both tests together.

    Raises:
        DataError: The outputs are not of the same rows.
        CalibrationError: The compressed model's outputs are not finite.
        ConfigurationError: Tolerance, margin or confidence is out of range.
    """
    check_confidence(confidence)
    comparison = compare(original, compressed)
    original_losses, compressed_losses = (_numbers(outputs.losses) for outputs in (original, compressed))
    original_scores, compressed_scores = (_numbers(outputs.scores) for outputs in (original, compressed))
    evidence = Evidence(
        num_rows=comparison.num_rows,
        confidence=confidence,
        tolerance=float(tolerance),
        original_loss=_estimate(comparison.original_loss, skewed_interval(original_losses, confidence)),
        compressed_loss=_estimate(comparison.compressed_loss, skewed_interval(compressed_losses, confidence)),
        loss_change=_short(comparison.loss_change),
        loss_change_error=_short(comparison.loss_change_error),
        loss_change_bound=_short(float(skewed_upper_bound(compressed_losses - original_losses, confidence))),
        loss_test=_outcome(loss_test(original_losses, compressed_losses, tolerance, confidence)),
        metric_name=metric_name,
        metric_margin=float(metric_margin),
        original_metric=_estimate(comparison.original_metric, bounded_interval(original_scores, confidence)),
        compressed_metric=_estimate(comparison.compressed_metric, bounded_interval(compressed_scores, confidence)),
        metric_test=_outcome(metric_test(original_scores, compressed_scores, metric_margin, confidence)),
        flips=comparison.flips,
        right_to_wrong=comparison.right_to_wrong,
        wrong_to_right=comparison.wrong_to_right,
        mean_kl=None if comparison.mean_kl is None else _short(comparison.mean_kl),
    )
    return Certificate(verdict=evidence.verdict, evidence=evidence, provenance=provenance)


def _numbers(values: Tensor) -> NDArray[np.float64]:
    return values.detach().cpu().double().numpy()


def _short(number: float) -> float:
    """Rounds to six digits: further digits are noise, and cost bytes. The verdict follows from rounded values too."""
    return float(f"{number:.6g}")


def _estimate(value: float, interval: tuple[float, float]) -> Estimate:
    low, high = interval
    return Estimate(value=_short(value), low=_short(low), high=_short(high))


def _outcome(test: NonInferiority) -> TestOutcome:
    return TestOutcome(
        method=test.method, p_value=_short(test.p_value), bound=_short(test.bound), required_rows=test.required_rows
    )
