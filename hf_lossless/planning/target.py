"""`Target`: the goal of a plan, and the choice of the plan on the frontier that meets it."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from hf_lossless.certification.certificate import CONFIDENCE, METRIC_MARGIN, TOLERANCE
from hf_lossless.errors import ConfigurationError, UnreachableTargetError
from hf_lossless.planning.knapsack import Frontier
from hf_lossless.storage.plan import CompressionPlan, checkpoint_bytes

_EXAMPLES = {"ratio": "ratio=6", "max_bytes": "max_bytes=1_000_000", "loss_budget": "loss_budget=0.01"}


@dataclass(frozen=True)
class Target:
    """The goal of a plan: exactly one of a tolerance, a ratio, a number of bytes, a loss budget.

    Attributes:
        tolerance: Share of the original's loss by which the loss may rise, with a certificate; the default is 0.01.
        ratio: Least ratio of the original's bytes to the checkpoint's.
        max_bytes: Most bytes of tensors and plan.
        loss_budget: Largest predicted rise of the loss, in nats.
        confidence: Confidence of the certificate.
        metric_margin: How far the task's metric may fall, for the certificate.

    Raises:
        ConfigurationError: There are several targets, or a value is out of range.

    Example:
        >>> Target().tolerance, Target(ratio=6).tolerance
        (0.01, None)
    """

    tolerance: float | None = None
    ratio: float | None = None
    max_bytes: int | None = None
    loss_budget: float | None = None
    confidence: float = CONFIDENCE
    metric_margin: float = METRIC_MARGIN

    def __post_init__(self) -> None:
        names = ("tolerance", *_EXAMPLES)
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if len(given) > 1:
            raise ConfigurationError(
                f"got several targets at once: {given}. Give exactly one of {', '.join(names)}, or none: "
                f"tolerance={TOLERANCE} is the default."
            )
        if not given:
            object.__setattr__(self, "tolerance", TOLERANCE)
        self._check_certificate()
        for name in _EXAMPLES.keys() & given.keys():
            value = given[name]
            # A loss budget of 0 is allowed: no predicted rise.
            if not _is_finite(value) or value < 0 or (value == 0 and name != "loss_budget"):
                least = "of at least 0" if name == "loss_budget" else "above 0"
                raise ConfigurationError(
                    f"{name}={value!r} is not a finite number {least}. Give one, say {_EXAMPLES[name]}."
                )

    def _check_certificate(self) -> None:
        if self.tolerance is not None and not _is_finite(self.tolerance):
            raise ConfigurationError(
                f"tolerance={self.tolerance!r} is not a finite number. Give a share of the original's loss, say 0.01; "
                "zero or below demands that the loss falls."
            )
        if not _is_finite(self.confidence) or not 0 < self.confidence < 1:
            raise ConfigurationError(f"confidence={self.confidence!r} is not between 0 and 1. Give say 0.95.")
        if not _is_finite(self.metric_margin) or not -1 < self.metric_margin < 1:
            raise ConfigurationError(
                f"metric_margin={self.metric_margin!r} is not between -1 and 1. Metrics run from 0 to 1: half a point "
                "is 0.005."
            )


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def choose_plan(
    frontier: Frontier, plan_at: Callable[[int], CompressionPlan], target: Target, bits: Iterable[int]
) -> CompressionPlan:
    """Chooses the plan that meets a target: the smallest within a loss budget, the best within a size.

    Args:
        frontier: Cost and predicted loss of the plans; costs are those of the layers' tensors.
        plan_at: Makes the plan at a point of the frontier.
        target: Any target but a tolerance, which is decided by the loss of held-out rows.
        bits: The widths among the choices, for messages.

    Raises:
        UnreachableTargetError: No plan meets the target; the message says what the nearest plan reaches.
    """
    if target.loss_budget is not None:
        point = frontier.within_loss(target.loss_budget)
        if point is None:
            raise UnreachableTargetError(
                f"loss_budget={target.loss_budget:g} cannot be met: the least predicted loss change of any plan with "
                f"bits={tuple(bits)} is {frontier.predicted_loss_change[-1]:.4g}. Allow more, or add wider widths "
                "(16 keeps a layer)."
            )
        return plan_at(point)

    smallest = plan_at(0)
    original_bytes = smallest.original_bytes
    max_bytes = target.max_bytes if target.max_bytes is not None else int(original_bytes / (target.ratio or 1))
    # The JSON of a plan counts too, and differs between plans: from the best plan whose tensors alone fit, step down
    # to the first that fits with its JSON.
    point = frontier.within_bytes(max_bytes - smallest.other_bytes)
    least_bytes = checkpoint_bytes(smallest)
    for candidate in () if point is None else range(point, -1, -1):
        plan = plan_at(candidate)
        size_bytes = checkpoint_bytes(plan)
        if size_bytes <= max_bytes:
            return plan
        least_bytes = min(least_bytes, size_bytes)
    asked = f"ratio={target.ratio:g}" if target.ratio is not None else f"max_bytes={target.max_bytes}"
    best_ratio = math.floor(100 * original_bytes / least_bytes) / 100  # rounded up, it could not be reached
    raise UnreachableTargetError(
        f"{asked} cannot be reached: the smallest plan takes {least_bytes} bytes of the original's {original_bytes}, "
        f"a ratio of {best_ratio:.2f}. Ask for at most that, add narrower widths than bits={tuple(bits)}, "
        "or leave fewer modules out."
    )
