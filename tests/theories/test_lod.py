"""LoD's regime test against Monte Carlo and the paper's own numbers; its verdicts and its neighbourhood."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_lossless import LosslessCompressionConfig
from hf_lossless.calibration.statistics import calibrate
from hf_lossless.candidates.grids import Candidate
from hf_lossless.candidates.low_rank import Factors
from hf_lossless.candidates.propose import propose
from hf_lossless.candidates.ranks import ranks_by_layer
from hf_lossless.data.batches import batch_loss
from hf_lossless.storage.layers import find_layers
from hf_lossless.storage.plan import LowRank, Regime
from hf_lossless.theories import lod
from hf_lossless.theories.lod import LOSS_TOLERANCE, SURE, predict, regime_test
from hf_lossless.theories.problem import Prediction, Problem


def with_moments(mean: float, variance: float, size: int, seed: int) -> Tensor:
    """Values with exactly this mean and variance."""
    values = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    values = (values - values.mean()) / values.std(correction=0)
    return mean + math.sqrt(variance) * values


def test_the_papers_example():
    """A.2.2: E[p] = 0.1, E[e] = 3.9e-3, Var(p) = 1e-2, Var(e) = 5.17e-6, k = 1e4."""
    mean_p, mean_e, var_p, var_e, k = 0.1, 3.9e-3, 1e-2, 5.17e-6, 10_000
    variance = var_p * var_e + var_p * mean_e**2 + var_e * mean_p**2
    assert variance == pytest.approx(2.555e-7, rel=1e-3)
    chebyshev = variance / (k * mean_p**2 * mean_e**2)
    assert chebyshev == pytest.approx(1.7e-4, rel=0.02)
    assert math.sqrt(k) * mean_p * mean_e / math.sqrt(variance) == pytest.approx(77, rel=0.005)
    regime = regime_test(with_moments(mean_p, var_p, k, 0), with_moments(-mean_e, var_e, k, 1))
    assert regime.verdict == "analytic"
    assert regime.snr == pytest.approx(77.2, abs=0.05)
    assert regime.chebyshev == pytest.approx(chebyshev, rel=0.01)
    assert regime.central_limit < 1e-300


@given(
    *(st.floats(-1, 1), st.floats(-1, 1), st.floats(1e-3, 1), st.floats(1e-3, 1), st.integers(4, 400)),
    st.integers(0, 100),
)
def test_the_formulas(mean_p, mean_e, var_p, var_e, k, seed):
    gradient, error = with_moments(mean_p, var_p, k, seed), with_moments(mean_e, var_e, k, seed + 1)
    variance = var_p * var_e + var_p * mean_e**2 + var_e * mean_p**2
    snr = math.sqrt(k) * abs(mean_p * mean_e) / math.sqrt(variance)
    regime = regime_test(gradient.view(2, -1) if k % 2 == 0 else gradient, error.view(2, -1) if k % 2 == 0 else error)
    assert regime.snr == pytest.approx(snr, rel=0.006, abs=1e-9)  # three digits are kept
    assert regime.chebyshev == pytest.approx(min(1.0, 1 / regime.snr**2 if regime.snr else 1.0))
    assert (regime.verdict == "analytic") == (1 / max(regime.snr, 1e-9) ** 2 <= SURE)


@pytest.mark.parametrize(("mean_p", "mean_e"), [(0.2, -0.1), (0.05, -0.02), (-0.3, 0.3)])
def test_the_moments_by_monte_carlo(mean_p, mean_e):
    """X = <p, e> of independent draws has the mean k E[p] E[e] and the variance k V; the bounds hold."""
    k, trials = 60, 20_000
    generator = torch.Generator().manual_seed(0)
    p = mean_p + 0.3 * torch.randn(trials, k, dtype=torch.float64, generator=generator)
    e = mean_e + 0.4 * (torch.rand(trials, k, dtype=torch.float64, generator=generator) - 0.5)
    var_p, var_e = 0.3**2, 0.4**2 / 12
    V = var_p * var_e + var_p * mean_e**2 + var_e * mean_p**2
    X = (p * e).sum(1)
    assert X.mean().item() == pytest.approx(k * mean_p * mean_e, abs=4 * math.sqrt(k * V / trials))
    assert X.var().item() == pytest.approx(k * V, rel=0.05)
    snr = math.sqrt(k) * abs(mean_p * mean_e) / math.sqrt(V)
    wrong = (X >= 0).double().mean().item()
    regime = Regime(snr=snr, verdict="measured")
    assert wrong <= regime.chebyshev
    assert wrong == pytest.approx(regime.central_limit, abs=0.02)


def test_extremes_are_finite():
    """A plan is JSON."""
    assert regime_test(torch.ones(10), torch.ones(10)) == Regime(snr=1e9, verdict="analytic")  # no variance at all
    assert regime_test(torch.zeros(10), torch.zeros(10)) == Regime(snr=0.0, verdict="measured")
    assert regime_test(torch.zeros(3, 4), torch.randn(3, 4)).snr == 0
    assert regime_test(torch.tensor([[2.0]]), torch.tensor([[-1.0]])).verdict == "analytic"
    tiny = regime_test(torch.full((9,), 1e-30), torch.full((9,), 1e-30))
    assert math.isfinite(tiny.snr)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_threshold_of_the_verdict(sign):
    """1 / SNR^2 <= 0.05 from SNR = 4.47 on."""
    k = 400
    for snr, verdict in ((4.45, "measured"), (4.49, "analytic")):
        # With Var(e) = 0: SNR = sqrt(k) |E[p]| / std(p)
        gradient = with_moments(snr / math.sqrt(k), 1.0, k, 0)
        regime = regime_test(gradient, torch.full((k,), sign * 0.25, dtype=torch.float64))
        assert regime.verdict == verdict and regime.snr == pytest.approx(snr, abs=0.01)


# Predictions.


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.first, self.last = nn.Linear(20, 32), nn.Linear(32, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(inputs)))


def prepared(gradient: Tensor | None = None, loss=batch_loss, **keywords) -> Problem:
    """A problem; with the first layer's gradient set where one is given."""
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(rows, 20, generator=generator), torch.arange(rows) % 3) for rows in (9, 6)]
    model = Model().eval()
    layers = find_layers(model)
    calibration = calibrate(model, batches, layers, batch_loss, gradients=True)
    if gradient is not None:
        calibration.layers["first"] = replace(calibration.layers["first"], gradient=gradient)
    return Problem(model, batches, loss, layers, calibration, {}, **keywords)


def candidate_of(problem: Problem, error: Tensor, rank: int = 20) -> Candidate:
    """A candidate of kind "low_rank" with this very error."""
    stored = (problem.layers[0].matrix.detach() + error).float()
    left, right = stored, torch.eye(20)
    return Candidate(None, 1, low_rank=LowRank(rank=rank, shape=(32, 20)), factors=Factors(left, right))


def asked(problem: Problem, *errors: Tensor) -> list[Prediction]:
    """What LoD says of candidates with these errors."""
    candidates = {"first": [candidate_of(problem, error) for error in errors], "last": [Candidate(None, 1)]}
    found = predict(replace(problem, candidates=candidates))
    assert found["last"] == [Prediction(0.0)]
    return found["first"]


def measured(problem: Problem, error: Tensor) -> float:
    weight, total = problem.layers[0].weight.data, 0.0
    problem.layers[0].module.weight.data = weight + error
    with torch.no_grad():
        total = sum(batch_loss(problem.model, batch).item() * len(batch[1]) for batch in problem.batches) / 15
    problem.layers[0].module.weight.data = weight
    return total - problem.calibration.loss


SHAPE = (32, 20)
BIASED, UNBIASED = -1e-3 * torch.ones(SHAPE), 1e-3 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
CLEAR = 1e-3 * (1 + 0.1 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(4)))  # a gradient of one sign


def test_a_sure_sign_is_taken_at_its_first_order_word():
    passes = []

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        passes.append(1)
        return batch_loss(model, batch)

    problem = prepared(CLEAR, loss)
    (found,) = asked(problem, BIASED)
    assert found.regime.verdict == "analytic" and not passes
    assert found.loss_change == pytest.approx((CLEAR * BIASED).sum().item(), rel=1e-3) and found.loss_change < 0
    (up,) = asked(problem, -BIASED)
    assert up.loss_change == pytest.approx(-found.loss_change, rel=1e-3)  # the sign is kept either way
    assert not passes


def test_else_the_loss_is_measured():
    passes = []

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        passes.append(1)
        return batch_loss(model, batch)

    problem = prepared(None, loss)
    for sign in (1, -1):
        (found,) = asked(problem, sign * UNBIASED)
        assert found.regime.verdict == "measured" and found.regime.chebyshev > SURE
        assert found.loss_change == pytest.approx(measured(problem, sign * UNBIASED), abs=1e-6)
    assert len(passes) == 2 * 2  # two batches, one pass for each candidate


def test_a_sure_sign_outside_the_first_order_neighbourhood_is_measured():
    problem = prepared(CLEAR)
    error = 9 * BIASED  # every element within 1e-2, the root mean square above 8e-3
    assert regime_test(CLEAR, error).verdict == "analytic"
    (found,) = asked(problem, error)
    assert found.regime.verdict == "measured" and found.regime.snr > 4.5
    assert found.loss_change == pytest.approx(measured(problem, error), abs=1e-6)


def test_the_tolerance_of_each_weight():
    """A.2.1: for low rank, |delta_ij| <= 1e-2 element by element; one weight is enough."""
    problem = prepared()
    inside, outside = torch.zeros(SHAPE), torch.zeros(SHAPE)
    inside[3, 5], outside[3, 5] = 0.0099, -0.0101
    found = asked(problem, inside, outside)
    assert [one.usable for one in found] == [True, False]
    assert found[1] == Prediction(math.inf)


def grid_problem(bits=(1, 2, 4, 8, 16)) -> Problem:
    problem = prepared()
    config = LosslessCompressionConfig(ratio=2, bits=bits, group_size=None)
    return replace(problem, candidates=propose(problem.layers, problem.calibration, config.choices, {}, "descent"))


def test_a_width_need_not_keep_to_that_tolerance():
    problem = grid_problem()
    found = predict(problem)["first"]
    matrix = problem.layers[0].matrix
    errors = [one.error(matrix).abs().max().item() for one in problem.candidates["first"]]
    assert any(error > 1e-2 and one.usable for error, one in zip(errors, found, strict=True))


def test_what_leaves_the_neighbourhood_is_refused(monkeypatch):
    """More than 1e-2 nats, as 2 bits for layer 4 in Table 1."""
    assert LOSS_TOLERANCE == 1e-2
    problem = grid_problem()
    changes = [0.5, 0.0100001, 0.0099, -3.0]
    stated = iter(changes * 2)
    monkeypatch.setattr(lod, "measured_change", lambda *arguments: next(stated))
    for group in predict(problem).values():
        assert [one.usable for one in group] == [False, False, True, True, True]
        assert group[2].loss_change == 0.0099 and group[3].loss_change == -3.0 and group[4] == Prediction(0.0)
        assert all(one.regime is not None for one in group[2:4])


def test_the_least_change_stays_where_all_are_refused(monkeypatch):
    problem = grid_problem((1, 2, 4))
    stated = iter([0.5, 0.3, math.nan, math.inf, math.nan, 7.0])
    monkeypatch.setattr(lod, "measured_change", lambda *arguments: next(stated))
    found = predict(problem)
    assert [one.usable for one in found["first"]] == [False, True, False]
    assert found["first"][1].loss_change == 0.3 and found["first"][1].regime.verdict == "measured"
    assert [one.usable for one in found["last"]] == [False, False, True]


def test_nothing_stays_where_nothing_is_finite(monkeypatch):
    monkeypatch.setattr(lod, "measured_change", lambda *arguments: math.nan)
    assert not any(one.usable for group in predict(grid_problem((1, 2))).values() for one in group)


def test_the_model_is_as_it_was_and_every_candidate_counted():
    calls = []
    problem = replace(grid_problem(), advance=lambda: calls.append(1))
    config = LosslessCompressionConfig(ratio=2, ranks="auto")
    ranks = ranks_by_layer(problem.layers, "auto")
    problem = replace(
        problem, candidates=propose(problem.layers, problem.calibration, config.choices, ranks, "descent")
    )
    state = {name: value.clone() for name, value in problem.model.state_dict().items()}
    found = predict(problem)
    assert all(torch.equal(value, state[name]) for name, value in problem.model.state_dict().items())
    assert len(calls) == sum(map(len, problem.candidates.values()))
    for name, group in found.items():
        assert len(group) == len(problem.candidates[name])
        kept = [one.kind == "kept" for one in problem.candidates[name]]
        assert [one for one, is_kept in zip(group, kept, strict=True) if is_kept] == [Prediction(0.0)]
