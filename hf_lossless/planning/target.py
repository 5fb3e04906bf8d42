"""Which plan of the frontier meets the target: a ratio, a number of bytes, or a loss budget."""

import math
from collections.abc import Callable

from hf_lossless.config import LosslessCompressionConfig
from hf_lossless.errors import UnreachableTargetError
from hf_lossless.planning.knapsack import Frontier
from hf_lossless.storage.plan import CompressionPlan, checkpoint_bytes


def choose_plan(
    frontier: Frontier, plan_at: Callable[[int], CompressionPlan], config: LosslessCompressionConfig
) -> CompressionPlan:
    """The plan that meets the target of `config`: the smallest within a loss budget, the best within a size.

    Args:
        frontier: Cost and predicted loss of the plans; costs are those of the layers' tensors.
        plan_at: The plan at a point of the frontier.
        config: The target.

    Raises:
        UnreachableTargetError: There is none; the message says what the nearest plan reaches.
    """
    if config.loss_budget is not None:
        point = frontier.within_loss(config.loss_budget)
        if point is None:
            raise UnreachableTargetError(
                f"loss_budget={config.loss_budget:g} cannot be met: the least predicted loss change of any plan with "
                f"bits={config.bits} is {frontier.predicted_loss_change[-1]:.4g}. Allow more, or add wider widths "
                "(16 keeps a layer)."
            )
        return plan_at(point)

    smallest = plan_at(0)
    original_bytes = smallest.original_bytes
    max_bytes = config.max_bytes if config.max_bytes is not None else int(original_bytes / (config.ratio or 1))
    # A plan's own text counts too, and differs from plan to plan: from the best plan whose tensors alone would fit,
    # step down to the first that fits with its text.
    point = frontier.within_bytes(max_bytes - smallest.other_bytes)
    least_bytes = checkpoint_bytes(smallest)
    for candidate in () if point is None else range(point, -1, -1):
        plan = plan_at(candidate)
        size_bytes = checkpoint_bytes(plan)
        if size_bytes <= max_bytes:
            return plan
        least_bytes = min(least_bytes, size_bytes)
    asked = f"ratio={config.ratio:g}" if config.ratio is not None else f"max_bytes={config.max_bytes}"
    best_ratio = math.floor(100 * original_bytes / least_bytes) / 100  # rounded up, it could not be reached
    raise UnreachableTargetError(
        f"{asked} cannot be reached: the smallest plan takes {least_bytes} bytes of the original's {original_bytes}, "
        f"a ratio of {best_ratio:.2f}. Ask for at most that, add narrower widths than bits={config.bits}, "
        "or leave fewer modules out."
    )
