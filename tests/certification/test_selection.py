"""The chance to pass against simulated certifications; the ladder and the order of proposals."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hf_lossless.certification.comparison import Outputs
from hf_lossless.certification.non_inferiority import loss_test
from hf_lossless.certification.proportions import non_inferiority_p_value
from hf_lossless.certification.selection import CLOSE, chance_to_pass, next_ratio, order_of_proposals

ASKED = {"tolerance": 0.01, "metric_margin": 0.005, "confidence": 0.95}


def outputs(losses: np.ndarray, scores: np.ndarray) -> Outputs:
    return Outputs(torch.tensor(losses), torch.tensor(scores), scores)


def pair(n: int, generator: np.random.Generator, rise: float, spread: float, lost: float) -> tuple[Outputs, Outputs]:
    """An original, and a model whose loss rises by `rise` +- `spread` a row, and that gets `lost` of the rows wrong."""
    losses = generator.exponential(0.3, n)
    scores = np.ones(n)
    worse = (generator.random(n) >= lost).astype(float)
    return outputs(losses, scores), outputs(losses + rise + generator.normal(0, spread, n), worse)


@pytest.mark.parametrize(
    ("rise", "spread", "lost"), [(0.0, 0.05, 0.0), (0.0, 0.02, 0.0), (0.001, 0.03, 0.0), (0.0, 0.001, 0.002)]
)
def test_the_mean_chance_is_how_often_plans_pass(rise: float, spread: float, lost: float) -> None:
    generator = np.random.default_rng(0)
    rounds, rows = 80, 1000
    chances, passed = [], 0
    for _ in range(rounds):
        chances.append(chance_to_pass(*pair(500, generator, rise, spread, lost), rows, **ASKED))
        one, two = pair(rows, generator, rise, spread, lost)
        held = non_inferiority_p_value(int((two.scores < one.scores).sum()), 0, rows, 0.005) < 0.05
        passed += loss_test(one.losses, two.losses, 0.01, 0.95).passed and held
    assert np.mean(chances) == pytest.approx(passed / rounds, abs=0.2)


def test_a_worse_plan_has_less_chance() -> None:
    def chance(rise: float = 0.0, lost: float = 0.0, rows: int = 2000, **asked: float) -> float:
        models = pair(500, np.random.default_rng(0), rise, 0.02, lost)
        return chance_to_pass(*models, rows, **{**ASKED, **asked})

    assert chance() > chance(rise=0.002) > chance(rise=0.004)
    assert chance() > chance(lost=0.01)
    assert chance() > chance(rows=600)
    assert chance() > chance(tolerance=0.0)
    assert chance() > chance(confidence=0.999)
    assert chance(rise=-0.1, tolerance=0.0) > 0.5  # superiority is within reach


def test_the_same_model_is_likely_to_pass_where_rows_are_enough() -> None:
    one, _ = pair(150, np.random.default_rng(0), 0.0, 0.0, 0.0)
    assert chance_to_pass(one, one, 700, **ASKED) > 0.5
    assert chance_to_pass(one, one, 50, **ASKED) < 0.5  # half a point of accuracy cannot be seen


def test_the_ladder_has_its_rungs_where_the_chance_falls() -> None:
    edge = 5.0
    chances = {2.0: 1.0, 12.0: 0.0}
    for _ in range(6):
        ratio = next_ratio(chances)
        chances[ratio] = 1.0 if ratio < edge else 0.0
    below = max(ratio for ratio, chance in chances.items() if chance)
    above = min(ratio for ratio, chance in chances.items() if not chance)
    assert below < edge < above < 1.05 * below

    smooth = {2.0: 1.0, 12.0: 0.0}
    for _ in range(8):
        ratio = next_ratio(smooth)
        smooth[ratio] = 1 / (1 + (ratio / edge) ** 8)
    steps = -np.diff([smooth[ratio] for ratio in sorted(smooth)])
    assert steps.max() < 0.35  # no bold step


def test_where_all_is_hopeless_the_ladder_is_even() -> None:
    chances = {2.0: 0.0, 32.0: 0.0}
    for _ in range(3):
        chances[next_ratio(chances)] = 0.0
    assert sorted(chances) == pytest.approx([2, 4, 8, 16, 32])
    assert next_ratio({2.0: 1.0, 2.0 * CLOSE: 0.0}) is None


@pytest.mark.parametrize(
    ("chances", "order"),
    [
        ([0.9, 0.7, 0.2], [0.9, 0.7, 0.2]),
        ([0.9, 0.7, 0.01], [0.9, 0.7]),
        ([0.6, 0.9, 0.3, 0.7, 0.1], [0.6, 0.9, 0.7, 0.1]),
        ([0.01, 0.3, 0.02], [0.3]),
        ([0.02, 0.01, 0.0], [0.02]),
        ([0.0], [0.0]),
    ],
)
def test_order(chances: list[float], order: list[float]) -> None:
    plans = [SimpleNamespace(chance=chance) for chance in chances]
    assert [plan.chance for plan in order_of_proposals(plans)] == order
