import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from hf_lossless.errors import ConfigurationError
from hf_lossless.planning import knapsack
from hf_lossless.planning.knapsack import Frontier, frontier

Rows = tuple[list[list[int]], list[list[float]]]

# Eighths sum without rounding, so that frontiers are compared with ==; the narrow range makes ties common.
EIGHTHS = st.integers(-40, 40).map(lambda eighths: eighths / 8)
SMALL = st.integers(0, 9)
HUGE = st.integers(0, 10**12)


@st.composite
def instances(draw: st.DrawFn, cost: st.SearchStrategy[int], loss: st.SearchStrategy[float] = EIGHTHS) -> Rows:
    row = st.lists(st.tuples(cost, loss), min_size=1, max_size=4)
    groups = draw(st.lists(row, max_size=5))
    return [[c for c, _ in group] for group in groups], [[p for _, p in group] for group in groups]


def brute_force(costs: list[list[int]], losses: list[list[float]]) -> list[tuple[int, float]]:
    """Every plan, sorted; a plan stays when it loses less than all that come before."""
    rows = [zip(*row, strict=True) for row in zip(costs, losses, strict=True)]
    plans = [(sum(c for c, _ in plan), sum((p for _, p in plan), 0.0)) for plan in itertools.product(*rows)]
    points: list[tuple[int, float]] = []
    for cost, loss in sorted(plans):
        if not points or loss < points[-1][1]:
            points.append((cost, loss))
    return points


def points_of(plans: Frontier) -> list[tuple[int, float]]:
    return list(zip(plans.cost_bytes.tolist(), plans.predicted_loss_change.tolist(), strict=True))


def assert_plans_are_true(plans: Frontier, costs: list[list[int]], losses: list[list[float]]) -> None:
    """Every reported cost and loss is that of the choices, and no point dominates another."""
    assert np.all(np.diff(plans.cost_bytes) > 0)
    assert np.all(np.diff(plans.predicted_loss_change) < 0)
    for point, (cost, loss) in enumerate(points_of(plans)):
        chosen = plans.choices(point).tolist()
        assert sum(row[j] for row, j in zip(costs, chosen, strict=True)) == cost
        assert math.fsum(row[j] for row, j in zip(losses, chosen, strict=True)) == pytest.approx(loss, abs=1e-12)


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch):
    """Set the limits by the name of the way that they force."""

    def force(way: str) -> None:
        lattice, states = {"dense": (10**9, 0), "sparse": (-1, 10**9), "coarse": (128, 0)}[way]
        monkeypatch.setattr(knapsack, "_MAX_LATTICE", lattice)
        monkeypatch.setattr(knapsack, "_MAX_STATES", states)

    return force


def layers(num_groups: int, num_candidates: int, seed: int, unit: int, jitter: int) -> Rows:
    """Layers of two sizes, widths 1, 2, ...; losses fall about twofold a bit from a random sensitivity."""
    rng = np.random.default_rng(seed)
    size = rng.choice([1, 4], (num_groups, 1))
    bits = np.arange(1, num_candidates + 1)
    costs = size * bits * unit + rng.integers(0, jitter + 1, (num_groups, num_candidates))
    noise = rng.normal(size=costs.shape)
    losses = size * np.exp(rng.normal(size=(num_groups, 1)) + 0.2 * noise) * 2.0**-bits
    return costs.tolist(), losses.tolist()


@settings(max_examples=200, deadline=None)
@given(instances(SMALL))
def test_dense_equals_brute_force(rows):
    plans = frontier(*rows)
    assert plans.resolution_bytes == 0
    assert points_of(plans) == brute_force(*rows)
    assert_plans_are_true(plans, *rows)


@settings(max_examples=200, deadline=None)
@given(instances(HUGE))
def test_huge_costs_equal_brute_force(rows):
    plans = frontier(*rows)
    assert plans.resolution_bytes == 0
    assert points_of(plans) == brute_force(*rows)
    assert_plans_are_true(plans, *rows)


@settings(max_examples=100, deadline=None)
@given(instances(SMALL, st.floats(-1e3, 1e3)))
def test_any_losses_equal_brute_force_to_within_rounding(rows):
    plans = frontier(*rows)
    assert_plans_are_true(plans, *rows)
    for cost, loss in brute_force(*rows):
        point = plans.within_bytes(cost)
        assert plans.predicted_loss_change[point] == pytest.approx(loss, abs=1e-11)


def test_dense_and_sparse_agree_to_the_last_choice(limits):
    @settings(max_examples=100, deadline=None)
    @given(instances(SMALL))
    def check(rows):
        limits("dense")
        by_array = frontier(*rows)
        limits("sparse")
        by_list = frontier(*rows)
        assert points_of(by_array) == points_of(by_list)
        for point in range(len(by_array)):
            assert by_array.choices(point).tolist() == by_list.choices(point).tolist()

    check()


def test_coarse_is_feasible_and_within_its_bound(limits):
    @settings(max_examples=200, deadline=None)
    @given(instances(HUGE))
    def check(rows):
        exact = brute_force(*rows)
        plans = frontier(*rows)
        assert_plans_are_true(plans, *rows)
        assert plans.cost_bytes[0] == exact[0][0]
        assert plans.predicted_loss_change[-1] == exact[-1][1]
        for cost, loss in exact:
            assert plans.predicted_loss_change[plans.within_bytes(cost)] >= loss
            # The exact optimum of C - groups * unit is found within C.
            slack_bytes = len(rows[0]) * plans.resolution_bytes
            assert plans.predicted_loss_change[plans.within_bytes(cost + slack_bytes)] <= loss

    limits("coarse")
    check()


def test_coarse_reports_its_unit(limits):
    costs, losses = layers(20, 4, seed=0, unit=1000, jitter=99)
    assert frontier(costs, losses).resolution_bytes == 0
    limits("coarse")
    plans = frontier(costs, losses)
    span_bytes = sum(map(max, costs)) - sum(map(min, costs))
    assert plans.resolution_bytes == math.ceil(span_bytes / (128 - 20))  # each of 20 groups rounds up by < 1 unit
    assert_plans_are_true(plans, costs, losses)


@pytest.mark.parametrize("jitter", [0, 99], ids=["lattice", "arbitrary-bytes"])
def test_equals_an_integer_programme(jitter):
    costs, losses = layers(40, 6, seed=1, unit=10_000, jitter=jitter)
    plans = frontier(costs, losses)
    assert plans.resolution_bytes == 0

    num_groups, num_candidates = np.shape(costs)
    one_each = sparse.kron(sparse.eye(num_groups), np.ones((1, num_candidates)))
    for share in [0.0, 0.1, 0.35, 0.7, 1.0]:
        max_bytes = int(plans.cost_bytes[0] + share * (plans.cost_bytes[-1] - plans.cost_bytes[0]))
        solution = milp(
            np.ravel(losses),
            integrality=np.ones(num_groups * num_candidates),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(np.ravel(costs)[None], ub=max_bytes)],
            options={"mip_rel_gap": 0},
        )
        assert solution.success
        assert plans.predicted_loss_change[plans.within_bytes(max_bytes)] == pytest.approx(solution.fun, rel=1e-6)


@pytest.mark.parametrize("way", ["dense", "sparse", "coarse"])
def test_loss_falls_strictly_as_bytes_rise(way, limits):
    limits(way)
    costs, losses = layers(60, 8, seed=2, unit=7, jitter=30)
    plans = frontier(costs, losses)
    assert_plans_are_true(plans, costs, losses)
    assert plans.cost_bytes[0] == sum(map(min, costs))
    assert plans.predicted_loss_change[-1] == pytest.approx(sum(map(min, losses)))


@pytest.mark.parametrize("way", ["dense", "sparse", "coarse"])
def test_same_input_same_plans(way, limits):
    limits(way)
    rows = layers(30, 5, seed=3, unit=5, jitter=2)
    first, second = frontier(*rows), frontier(*rows)
    assert points_of(first) == points_of(second)
    for point in range(len(first)):
        assert first.choices(point).tolist() == second.choices(point).tolist()


@pytest.mark.parametrize("way", ["dense", "sparse"])
def test_ties(way, limits):
    limits(way)
    # Equal candidates: the lowest index.
    plans = frontier([[3] * 64 + [5] * 64], [[1.0] * 64 + [0.0] * 64])
    assert [plans.choices(0).tolist(), plans.choices(1).tolist()] == [[0], [64]]
    # 1 byte more in either group gains the same: the group of the wider range of costs takes its cheapest.
    plans = frontier([[0, 1, 2], [0, 1]], [[2.0, 1.0, 0.0], [2.0, 1.0]])
    assert plans.choices(1).tolist() == [0, 1]


def test_no_groups_is_one_empty_plan():
    plans = frontier([], [])
    assert points_of(plans) == [(0, 0.0)]
    assert plans.choices(0).tolist() == []
    assert plans.resolution_bytes == 0


def test_within_bytes_and_within_loss():
    plans = frontier([[10, 20, 30]], [[3.0, 1.0, -0.5]])
    assert len(plans) == 3
    assert [plans.within_bytes(b) for b in (9, 10, 19, 20, 30, 2**70)] == [None, 0, 0, 1, 2, 2]
    assert [plans.within_loss(p) for p in (-0.6, -0.5, 0.9, 1.0, 3.0, math.inf)] == [None, 2, 2, 1, 0, 0]
    assert plans.within_loss(math.nan) is None
    with pytest.raises(IndexError):
        plans.choices(3)


@pytest.mark.parametrize("way", ["dense", "sparse", "coarse"])
def test_more_than_256_candidates(way, limits):
    limits(way)
    costs = [list(range(300)), list(range(0, 600, 2))]
    losses = [[math.exp(-c / 100) for c in row] for row in costs]
    plans = frontier(costs, losses)
    assert plans.choices(len(plans) - 1).tolist() == [299, 299]
    assert_plans_are_true(plans, costs, losses)


def test_accepts_numpy_rows():
    plans = frontier(np.array([[4, 2], [8, 4]]), np.array([[0.0, 1.0], [0.0, 3.0]], np.float32))
    assert points_of(plans) == [(6, 4.0), (8, 3.0), (10, 1.0), (12, 0.0)]


@pytest.mark.parametrize(
    ("costs", "losses", "message"),
    [
        ([[1]], [], r"1 groups of costs but 0 of losses: give both"),
        ([[1], []], [[0.0], []], r"group 1 has no candidates: give it one, or leave the group out"),
        ([[1], [1, 2]], [[0.0], [0.0]], r"group 1 has 2 costs but 1 losses: give both"),
        ([[1], [1, -2]], [[0.0], [0.0, 0.0]], r"group 1, candidate 1 costs -2: give a whole number of bytes from 0"),
        ([[1.5]], [[0.0]], r"group 0, candidate 0 costs 1\.5: give a whole number"),
        ([[2**48 + 1]], [[0.0]], r"costs 281474976710657: give a whole number of bytes from 0 to 2\*\*48"),
        ([[1, 1]], [[0.0, math.nan]], r"group 0, candidate 1 has loss nan: give a finite number"),
        ([[1]], [[-math.inf]], r"group 0, candidate 0 has loss -inf: give .* or leave the candidate out"),
        ([[1]], [[1e301]], r"has loss 1e\+301: give a finite number \(at most 1e300 in size\)"),
    ],
    ids=["groups", "empty", "lengths", "negative", "fraction", "cost-range", "nan", "inf", "loss-range"],
)
def test_errors_name_the_group_the_value_and_the_remedy(costs, losses, message):
    with pytest.raises(ConfigurationError, match=message):
        frontier(costs, losses)
