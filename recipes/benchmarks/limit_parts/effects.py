"""What single choices are worth: each is varied alone, at equal bytes, with one c for all layers (see `trial`).

All else is as in `_USUAL` and `_USUAL_EMBEDDING`, with the data's labels: what the package had before these trials.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_lossless.calibration.curvature import KroneckerFactors
from hf_lossless.calibration.statistics import Calibration
from hf_lossless.data.batches import Batch
from hf_lossless.storage.layers import Layer
from hf_lossless.storage.plan import Damping
from limit_parts.rate_aware import rounding_with
from limit_parts.trial import Bench, DampingOf, Variant, with_factors

Effects = Iterator[tuple[str, dict[str, Any]]]
"""Variants, each with what it comes to by ratio."""

_ROW_DAMPINGS = (0.03, 0.1, 1.0, 3.0)
_COLUMN_DAMPINGS = (0.01, 0.03, 0.3, 1.0)
_EMBEDDING_ROW_DAMPINGS = (0.03, 0.3, 1.0)
_USUAL = Damping(rows=0.3, columns=0.1)
_USUAL_EMBEDDING = Damping(rows=0.3, columns=0.2)


def usual_damping(layer: Layer) -> Damping:
    """Of what is not varied."""
    return _USUAL_EMBEDDING if layer.kind == "embedding" else _USUAL


def at_ratios(variant: Variant, ratios: tuple[float, ...]) -> dict[str, Any]:
    """A variant at each ratio."""
    return {str(ratio): variant.row(ratio) for ratio in ratios}


def damping(bench: Bench, calibration: Calibration, ratios: tuple[float, ...]) -> Effects:
    """A ladder for rows, and one for columns; the embeddings keep theirs."""
    ladder = [Damping(rows=rows, columns=_USUAL.columns) for rows in _ROW_DAMPINGS]
    ladder += [Damping(rows=_USUAL.rows, columns=columns) for columns in _COLUMN_DAMPINGS]
    for one in ladder:
        variant = Variant(bench, calibration, _damped(one, _USUAL_EMBEDDING))
        yield f"rows {one.rows:g}, columns {one.columns:g}", at_ratios(variant, ratios)


def one_sided(bench: Bench, calibration: Calibration, ratios: tuple[float, ...]) -> Effects:
    """Feedback along the columns only: rows with the diagonal of their factor."""

    def diagonal_rows(factors: KroneckerFactors) -> KroneckerFactors:
        return factors if factors.rows.ndim == 1 else replace(factors, rows=factors.rows.diagonal().clone())

    variant = Variant(bench, with_factors(calibration, diagonal_rows), usual_damping)
    yield "columns only", at_ratios(variant, ratios)


def rate_aware(bench: Bench, calibration: Calibration, ratios: tuple[float, ...]) -> Effects:
    """Rounding that counts bits, with shares of the high-rate lambda."""
    for share in (0.5, 1.0):
        with rounding_with(share):
            yield f"lambda {share:g}", at_ratios(Variant(bench, calibration, usual_damping), ratios)


def calibration_rows(
    bench: Bench, batches_of: Callable[[int], list[Batch]], counts: tuple[int, ...], ratios: tuple[float, ...]
) -> Effects:
    """The curvature of fewer or more rows."""
    for count in counts:
        calibration = bench.calibrated(batches_of(count))
        yield f"{calibration.num_examples} rows", at_ratios(Variant(bench, calibration, usual_damping), ratios)


def true_fisher(bench: Bench, draws: tuple[int, ...], ratios: tuple[float, ...]) -> Effects:
    """Labels drawn from the model's own predictions, in place of the data's."""
    for number in draws:
        generator = torch.Generator().manual_seed(0)

        def loss(model: nn.Module, batch: Batch, generator: torch.Generator = generator) -> Tensor:
            logits: Tensor = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
            labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            return F.cross_entropy(logits, labels)

        calibration = bench.calibrated(bench.problem.batches * number, loss)
        yield f"{number} draws", at_ratios(Variant(bench, calibration, usual_damping), ratios)


def embedding_floor(bench: Bench, calibration: Calibration, ratios: tuple[float, ...]) -> Effects:
    """Row damping of the embeddings, and what it does to rows with tokens that calibration did not see."""
    seen = torch.cat([batch["input_ids"].flatten() for batch in bench.problem.batches]).unique()
    unseen = torch.cat(
        [
            (~torch.isin(batch["input_ids"], seen) & batch["attention_mask"].bool()).sum(1)
            for batch in bench.test_batches
        ]
    )
    before = bench.original.double().log_softmax(-1)
    for rows in _EMBEDDING_ROW_DAMPINGS:
        variant = Variant(bench, calibration, _damped(_USUAL, Damping(rows=rows, columns=_USUAL_EMBEDDING.columns)))
        found = {}
        for ratio in ratios:
            _, coded = variant.at_ratio(ratio)
            logits = bench.scores_of(coded)
            kl = (before.exp() * (before - logits.double().log_softmax(-1))).sum(-1)
            groups = {"none": unseen == 0, "1 to 3": (unseen > 0) & (unseen <= 3), "more": unseen > 3}
            embeddings = [layer for layer in bench.layers if layer.kind == "embedding"]
            found[str(ratio)] = {
                **bench.judged(logits),
                "kl_by_unseen_tokens": {
                    name: [int(group.sum()), kl[group].mean().item()] for name, group in groups.items() if group.any()
                },
                "embedding_bits_per_weight": {
                    layer.name: 8 * len(coded[layer.name].values.stored) / layer.weight.numel() for layer in embeddings
                },
                "zero_rows_of_embedding": {
                    layer.name: float((coded[layer.name].values.dense == 0).all(1).float().mean())
                    for layer in embeddings
                },
            }
        yield f"rows {rows:g}", found


def _damped(others: Damping, embeddings: Damping) -> DampingOf:
    def damping_of(layer: Layer) -> Damping:
        return embeddings if layer.kind == "embedding" else others

    return damping_of


def usual(bench: Bench, calibration: Calibration, ratios: tuple[float, ...]) -> Effects:
    """What the others are compared with."""
    yield "usual", at_ratios(Variant(bench, calibration, usual_damping), ratios)
