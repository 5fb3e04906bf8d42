"""Draws labels from the model's own predictions, for the true Fisher matrix.

The curvature of a loss that is a negative log-likelihood is estimated by second moments of its gradient. With the
data's labels this gives the empirical Fisher matrix, which is small on rows that the model has memorised; with labels
drawn from the model's predictions it gives the Fisher matrix itself, which is also the second derivative of the
divergence from the model's predictions (Kunstner et al. 2019, arXiv 1905.12558). Several draws for each row reduce the
noise, at one backward pass each: on a ViT four draws for 128 rows were worth as much as 2,048 rows with the data's
labels.

Labels are drawn for classes of rows or of tokens, and for the two ends of an answer. A label belongs to the scores of
its own token, or of the token before in causal language models: the choice is the one that reproduces the model's loss.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_lossless.data.batches import Batch, loss_of_outputs, model_device, to_device

DRAWS = 4
"""Number of labels drawn for each row."""

_IGNORED = -100
"""The label that losses ignore."""

_ENDS = {"start_positions": "start_logits", "end_positions": "end_logits"}


@dataclass(frozen=True)
class ScoredLabels:
    """Labels of a batch with the scores that predict them.

    Attributes:
        scores: Scores of the labels, [..., classes], float32.
        labels: The batch's labels, [...].
        skipped: Labels [:, :skipped] have no scores.
        ignored: The label that the loss ignores.
    """

    scores: Tensor
    labels: Tensor
    skipped: int = 0
    ignored: int = _IGNORED

    @property
    def loss(self) -> Tensor:
        """Computes the labels' mean cross-entropy."""
        return F.cross_entropy(self.scores.flatten(0, -2), self._scored.flatten(), ignore_index=self.ignored)

    @property
    def used_scores(self) -> Tensor:
        """Returns the scores of the labels that the loss does not ignore, [labels, classes]."""
        return self.scores.flatten(0, -2)[self._scored.flatten() != self.ignored]

    @property
    def _scored(self) -> Tensor:
        return self.labels[:, self.skipped :] if self.skipped else self.labels

    def drawn(self, generator: torch.Generator) -> Tensor:
        """Draws new labels from the scores' probabilities; ignored labels stay ignored."""
        probabilities = self.scores.flatten(0, -2).softmax(-1).cpu()
        new = torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(self.labels)
        drawn = self.labels.clone()
        place = drawn[:, self.skipped :] if self.skipped else drawn
        place.copy_(torch.where(place == self.ignored, place, new.view(place.shape)))
        return drawn


def with_drawn_labels(batch: Batch, labels: Mapping[str, ScoredLabels], generator: torch.Generator) -> list[Batch]:
    """Makes `DRAWS` copies of a batch, each with labels drawn from what the model predicts.

    Args:
        batch: As for `batch_loss`.
        labels: Of `scored_labels`.
        generator: On the CPU.

    Example:
        >>> batch = torch.zeros(2, 3), torch.tensor([0, 1])
        >>> certain = nn.Linear(3, 2).requires_grad_(False)
        >>> _ = certain.bias.copy_(torch.tensor([100.0, 0.0]))
        >>> with_drawn_labels(batch, scored_labels(certain, batch), torch.Generator().manual_seed(0))[0][1]
        tensor([0, 0])
    """
    if isinstance(batch, Mapping):
        return [{**batch, **{name: one.drawn(generator) for name, one in labels.items()}} for _ in range(DRAWS)]
    return [(batch[0], labels["targets"].drawn(generator)) for _ in range(DRAWS)]


def scored_labels(model: nn.Module, batch: Batch) -> dict[str, ScoredLabels] | None:
    """Finds the labels of a batch and their scores, by name ("targets" of a pair); one forward pass.

    Args:
        model: In evaluation mode.
        batch: A batch, as for `batch_loss`.

    Returns:
        The labels by name; None where the model's loss is not a cross-entropy of scores that it returns.
    """
    batch = to_device(batch, model_device(model))
    with torch.no_grad():
        if not isinstance(batch, Mapping):
            return _of_pair(model, batch)
        outputs = model(**batch)
        loss = loss_of_outputs(model, outputs, batch).float()
        found = [(one, _mean_loss(one)) for one in _candidates(outputs, batch)]
        # Of an uninformative model, the scores of the own token and of the one before give similar losses.
        labels, mean = min(found, key=lambda one: abs(one[1] - loss), default=(None, loss))
        # to within the rounding of half precision
        return labels if bool(mean.isfinite()) and torch.isclose(mean, loss, rtol=0.02, atol=0.01) else None


def _of_pair(model: nn.Module, batch: Batch) -> dict[str, ScoredLabels] | None:
    """Finds the targets of a pair with their scores (classes in the outputs' second dimension); None for others."""
    if not isinstance(batch, tuple) or len(batch) != 2:
        return None
    outputs, targets = model(batch[0]), batch[1]
    if not isinstance(outputs, Tensor) or outputs.ndim < 2 or outputs.shape[1] < 2 or targets.is_floating_point():
        return None
    labels = ScoredLabels(outputs.float().movedim(1, -1), targets)
    return {"targets": labels} if labels.loss.isfinite() else None


def _mean_loss(candidate: dict[str, ScoredLabels]) -> Tensor:
    return torch.stack([one.loss for one in candidate.values()]).mean()


def _candidates(outputs: Any, batch: Mapping[str, Any]) -> Iterator[dict[str, ScoredLabels]]:
    """Yields possible labels of a batch with their scores, by name."""
    if all(name in batch and hasattr(outputs, scores) for name, scores in _ENDS.items()):
        ends = {name: (getattr(outputs, scores).float(), batch[name]) for name, scores in _ENDS.items()}
        # A position behind the last token is ignored.
        yield {
            name: ScoredLabels(scores, labels.clamp(0, scores.shape[1]), ignored=scores.shape[1])
            for name, (scores, labels) in ends.items()
        }
        return
    scores, labels = getattr(outputs, "logits", None), batch.get("labels")
    if not isinstance(scores, Tensor) or not isinstance(labels, Tensor) or labels.is_floating_point():
        return
    if scores.shape[:-1] == labels.shape and scores.shape[-1] > 1:
        yield {"labels": ScoredLabels(scores.float(), labels)}
        if labels.ndim == 2:
            yield {"labels": ScoredLabels(scores[:, :-1].float(), labels, skipped=1)}


def log_probabilities(model: nn.Module, batches: Iterable[Batch]) -> list[Tensor] | None:
    """Computes the log-probabilities of every label's classes, float32 [labels, classes] for each batch's labels.

    Args:
        model: In evaluation mode.
        batches: As for `batch_loss`.

    Returns:
        The log-probabilities; None where the model's loss is not a cross-entropy of scores that it returns.
    """
    found = []
    for batch in batches:
        labels = scored_labels(model, batch)
        if labels is None:
            return None
        found += [one.used_scores.log_softmax(-1) for one in labels.values()]
    return found


def divergence(before: list[Tensor], after: list[Tensor]) -> float:
    """Computes the mean divergence `mean sum_c p_c log(p_c / q_c)` over all labels, p before and q after.

    Example:
        >>> even = torch.tensor([[0.5, 0.5]]).log()
        >>> divergence([even], [even])
        0.0
    """
    total = sum((p.exp() * (p - q)).sum(dtype=torch.float64).item() for p, q in zip(before, after, strict=True))
    return total / max(sum(len(one) for one in before), 1)
