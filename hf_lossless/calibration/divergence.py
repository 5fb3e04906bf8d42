"""How far a model's predictions have moved from what they were: the mean divergence over the labels of some batches."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from hf_lossless.calibration.model_labels import scored_labels
from hf_lossless.data.batches import Batch


def log_probabilities(model: nn.Module, batches: Iterable[Batch]) -> list[Tensor] | None:
    """What a model predicts for every label of some batches, float32 [labels, classes] each.

    Args:
        model: In evaluation mode.
        batches: As for `batch_loss`.

    Returns:
        None where the model's loss is not a cross-entropy of scores that it returns.
    """
    found = []
    for batch in batches:
        labels = scored_labels(model, batch)
        if labels is None:
            return None
        found += [one.used_scores.log_softmax(-1) for one in labels.values()]
    return found


def divergence(before: list[Tensor], after: list[Tensor]) -> float:
    """`mean sum_c p_c log(p_c / q_c)` over all labels, p before and q after.

    Example:
        >>> even = torch.tensor([[0.5, 0.5]]).log()
        >>> divergence([even], [even])
        0.0
    """
    total = sum((p.exp() * (p - q)).sum(dtype=torch.float64).item() for p, q in zip(before, after, strict=True))
    return total / max(sum(len(one) for one in before), 1)
