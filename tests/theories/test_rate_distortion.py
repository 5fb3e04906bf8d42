"""The rate-distortion bound of the quadratic model."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from hf_lossless.calibration.curvature import KroneckerFactors, second_order_change
from hf_lossless.calibration.statistics import calibrate
from hf_lossless.candidates.damping import SHAPED
from hf_lossless.candidates.inverse_roots import InverseRoots
from hf_lossless.candidates.round_coded import round_coded
from hf_lossless.candidates.shaped import step_at
from hf_lossless.candidates.two_sided import round_two_sided
from hf_lossless.data.batches import batch_loss
from hf_lossless.storage.layers import find_layers, tensor_bytes
from hf_lossless.storage.plan import CodedGrid, Damping
from hf_lossless.theories.problem import Problem
from hf_lossless.theories.rate_distortion import Signals, eigenvalues, rate_distortion


def _factors(seed, out_features, in_features, *, diagonal_rows=False):
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (
        torch.randn(size, 2 * size, generator=generator) * torch.linspace(0.1, 2, size)[:, None]
        for size in (out_features, in_features)
    )
    R, C = rows @ rows.T, columns @ columns.T
    R, C = R / R.diagonal().mean(), C / C.diagonal().mean()
    return KroneckerFactors(R.diagonal().clone() if diagonal_rows else R, C, 0.3)


@pytest.mark.parametrize("diagonal_rows", [False, True], ids=["full", "diagonal rows"])
def test_a_slow_sum_over_all_components(diagonal_rows):
    factors = _factors(0, 7, 5, diagonal_rows=diagonal_rows)
    W = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    R = torch.diag(factors.rows) if diagonal_rows else factors.rows
    metric = torch.kron(R.double(), factors.columns.double())  # of d laid out row by row
    components = 0.5 * factors.scale * W.square().mean().double() * torch.linalg.eigvalsh(metric)
    thetas = torch.tensor([1e-5, 1e-3, 0.02, 0.1, 10.0], dtype=torch.float64)
    bits, losses = Signals.of(W, factors).at_levels(thetas)
    for theta, rate, loss in zip(thetas, bits, losses, strict=True):
        assert rate.item() == pytest.approx((0.5 * (components / theta).log2()).clamp(min=0).sum().item(), rel=1e-5)
        assert loss.item() == pytest.approx(torch.minimum(components, theta).sum().item(), rel=1e-5)


def test_white_spectra_have_the_closed_form():
    """D = out in s 4^(-bits per weight)."""
    W = torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
    signals = Signals.of(W, KroneckerFactors(torch.eye(6), torch.ones(4), 2.0))
    s = W.square().mean().item()
    thetas = s * torch.tensor([1.0, 0.25, 1 / 64], dtype=torch.float64)
    bits, losses = signals.at_levels(thetas)
    assert (bits / 24).tolist() == pytest.approx([0, 1, 3], abs=1e-6)
    assert losses.tolist() == pytest.approx([24 * s, 24 * s / 4, 24 * s / 64])


def test_damping_is_that_of_shaped_grids():
    """Eigenvalues of the damped factors."""
    factors, W = _factors(5, 6, 4), torch.ones(6, 4)
    signals = Signals.of(W, factors, Damping(rows=0.3, columns=0.1))
    torch.testing.assert_close(signals.columns, eigenvalues(factors.damped(0.1).columns), rtol=1e-5, atol=0)
    rows = 0.5 * factors.scale * eigenvalues(factors.damped(0.3).rows)
    torch.testing.assert_close(signals.rows, rows, rtol=1e-5, atol=0)


def test_uniform_steps_take_a_quarter_of_a_bit_more():
    """At high rate, in the damped metric that shapes them: 1/2 log2(pi e / 6) bits for normal weights."""
    generator = torch.Generator().manual_seed(6)
    W, factors = torch.randn(256, 128, generator=generator), _factors(7, 256, 128)
    roots = InverseRoots.of(factors, SHAPED)
    step = step_at(8.0, W, roots)
    rows, columns = roots.row_steps(step), roots.column_steps
    codes = round_two_sided(W[None], rows[None], columns[None], [roots.rows], [roots.columns])[0]
    damped = replace(factors, rows=factors.damped(SHAPED.rows).rows, columns=factors.damped(SHAPED.columns).columns)
    loss = second_order_change(codes * rows[:, None] * columns - W, damped)
    theta = torch.tensor([loss / W.numel()], dtype=torch.float64)  # above the water everywhere
    bits, bound = Signals.of(W, factors, SHAPED).at_levels(theta)
    assert bound.item() == pytest.approx(loss, rel=1e-3)
    spread = codes.abs().mean(0, keepdim=True) * codes.abs().mean(1, keepdim=True) / codes.abs().mean()
    deviation = spread * math.sqrt(math.pi / 2)
    entropy = _entropy_of_rounded_normal(deviation).mean().item()
    assert entropy - bits.item() / W.numel() == pytest.approx(0.2546, abs=0.03)


def _entropy_of_rounded_normal(deviation):
    """Bits of a normal number rounded to whole ones."""
    whole = torch.arange(-400, 401.0, dtype=torch.float64)[:, None, None]
    normal = torch.distributions.Normal(0.0, 1.0)
    deviation = deviation.double()
    chance = normal.cdf((whole + 0.5) / deviation) - normal.cdf((whole - 0.5) / deviation)
    return -torch.special.xlogy(chance, chance).sum(0) / math.log(2)


def test_what_is_no_more_than_rounding_error_has_no_eigenvalue():
    vector = torch.randn(50, generator=torch.Generator().manual_seed(3))
    found = eigenvalues(torch.outer(vector, vector))
    assert (found > 0).sum() == 1
    assert found.max().item() == pytest.approx(vector.square().sum().item(), rel=1e-5)


@pytest.fixture(scope="module")
def problem():
    """An embedding, a Linear, and a layer that no gradient reaches."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.hidden, self.head = nn.Embedding(40, 16), nn.Linear(16, 24), nn.Linear(24, 3)
            self.unused = nn.Linear(8, 8)

        def forward(self, tokens):
            return self.head(self.hidden(self.embedding(tokens)).relu().mean(1))

    torch.manual_seed(4)
    model = Model().eval()
    batches = [(torch.randint(0, 40, (16, 6)), torch.randint(0, 3, (16,))) for _ in range(4)]
    layers = find_layers(model)
    calibration = calibrate(model, batches, layers, batch_loss, curvature=True)
    return Problem(model, batches, batch_loss, layers, calibration, {})


def _other_bytes(problem):
    return tensor_bytes(problem.model) - sum(layer.weight.nbytes for layer in problem.layers)


def test_loss_falls_and_convexly_as_bytes_grow(problem):
    points = rate_distortion(problem, _other_bytes(problem))
    (num_bytes, losses) = (torch.tensor(values, dtype=torch.float64) for values in zip(*points, strict=True))
    assert (num_bytes.diff() > 0).all()
    assert (losses.diff() < 0).all()
    slopes = losses.diff() / num_bytes.diff()
    assert (slopes.diff() > -1e-9 * slopes[1:].abs()).all()


def test_the_ends_of_the_bound(problem):
    """All layers forgotten cost 1/2 scale sigma^2 out in; one that no gradient reaches is counted as it is."""
    (num_bytes, loss), *_ = rate_distortion(problem, 1000)
    assert num_bytes == 1000 + 8 * 8 * 4
    curvatures = {layer.name: problem.calibration.layers[layer.name].curvature for layer in problem.layers}
    wanted = sum(0.5 * curvatures[one.name].scale * one.matrix.square().sum().item() for one in problem.layers)
    assert loss == pytest.approx(wanted, rel=1e-4)
    levels = [1e-9, 1e-12]
    (fine_bytes, fine_loss), (finest_bytes, finest_loss) = rate_distortion(problem, 1000, levels)
    assert finest_bytes > fine_bytes
    assert finest_loss < fine_loss < loss * 1e-3


def test_layers_rounded_on_shaped_grids_lie_above_it(problem):
    """At the bytes that their codes take they cost more than the bound says, on the rows that they were fitted to."""
    layers = [layer for layer in problem.layers if layer.name != "unused"]
    bound = rate_distortion(problem, 0)
    unused = 8 * 8 * 4
    for step in (1e-3, 1e-2, 0.1):
        grids = {layer.name: CodedGrid(step=step, damping=SHAPED, shape=tuple(layer.matrix.shape)) for layer in layers}
        coded = round_coded(layers, grids, problem.calibration)
        num_bytes = unused + sum(one.cost_bytes for one in coded.values())
        loss = sum(one.cost for one in coded.values())
        assert math.isfinite(loss)
        below = [bound_loss for bound_bytes, bound_loss in bound if bound_bytes >= num_bytes]
        assert loss > below[0]
