"""Truncated SVDs against Eckart and Young's theorem, plain and in a metric."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_lossless.calibration.curvature import KroneckerFactors
from hf_lossless.candidates import low_rank
from hf_lossless.candidates.low_rank import Factorisation, Whitening, excess_bound, factorise
from hf_lossless.candidates.parallel import for_each_layer
from hf_lossless.storage.layers import Layer

SHAPES = [(7, 11), (11, 7), (8, 8), (1, 6), (6, 1), (1, 1)]


def random_matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def definite(size: int, seed: int) -> Tensor:
    """A second moment of fewer vectors than it has sides, damped."""
    vectors = random_matrix(max(1, size // 2), size, seed)
    moment = vectors.T @ vectors
    return moment / moment.diagonal().mean() + 0.1 * torch.eye(size)


def metric_of(kind: str, rows: int, columns: int, seed: int = 1) -> KroneckerFactors | None:
    left, right = definite(rows, seed), definite(columns, seed + 1)
    if kind == "unreached":
        return KroneckerFactors(torch.zeros(rows), torch.zeros(columns, columns), 0.0).damped(0.1)
    return {
        "plain": None,
        "full-full": KroneckerFactors(left, right, 1.0),
        "diagonal-full": KroneckerFactors(left.diagonal(), right, 1.0),
        "full-diagonal": KroneckerFactors(left, right.diagonal(), 1.0),
        "diagonal-diagonal": KroneckerFactors(left.diagonal(), right.diagonal(), 1.0),
    }[kind]


def in_metric(matrix: Tensor, metric: KroneckerFactors | None, largest: int | None = None) -> Factorisation:
    return factorise(matrix, None if metric is None else Whitening.of(metric, damping=0.0), largest=largest)


METRICS = ["plain", "full-full", "diagonal-full", "full-diagonal", "diagonal-diagonal", "unreached"]


def dense(side: Tensor | None, size: int) -> Tensor:
    if side is None:
        return torch.eye(size).double()
    return (side.diag() if side.ndim == 1 else side).double()


def sides(metric: KroneckerFactors | None, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    if metric is None:
        return dense(None, rows), dense(None, columns)
    return dense(metric.rows, rows), dense(metric.columns, columns)


def cost(error: Tensor, metric: KroneckerFactors | None) -> float:
    """tr(R d C d'), from its definition."""
    error = error.double()
    R, C = sides(metric, *error.shape)
    return (R @ error @ C @ error.T).trace().item()


def whitened_values(matrix: Tensor, metric: KroneckerFactors | None) -> Tensor:
    """Singular values of R^1/2 W C^1/2, by symmetric roots."""

    def root(side: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(side)
        return vectors @ values.clamp(min=0).sqrt().diag() @ vectors.T

    R, C = sides(metric, *matrix.shape)
    return torch.linalg.svdvals(root(R) @ matrix.double() @ root(C))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_plain_truncation_is_eckart_and_youngs(shape):
    matrix = random_matrix(*shape)
    U, S, Vt = torch.linalg.svd(matrix, full_matrices=False)
    factorisation = factorise(matrix)
    torch.testing.assert_close(factorisation.singular_values.float(), S)
    assert factorisation.excess == 0
    for rank in range(1, min(shape) + 1):
        factors = factorisation.truncated(rank)
        assert factors.rank == rank and factors.left.dtype == factors.right.dtype == torch.float32
        product = factors.left @ factors.right
        torch.testing.assert_close(product, U[:, :rank] * S[:rank] @ Vt[:rank], rtol=1e-4, atol=1e-5)
        assert (product - matrix).square().sum().item() == pytest.approx(S[rank:].square().sum().item(), abs=1e-5)
        # A grid's groups run along the rows of L, across its columns: these have one size.
        torch.testing.assert_close(factors.left.square().mean(0), torch.ones(rank))


@pytest.mark.parametrize("kind", METRICS)
@pytest.mark.parametrize("shape", [(9, 6), (6, 9)], ids=str)
def test_truncation_is_the_best_in_the_metric(kind, shape):
    matrix, metric = random_matrix(*shape), metric_of(kind, *shape)
    factorisation = in_metric(matrix, metric)
    values = whitened_values(matrix, metric)
    torch.testing.assert_close(factorisation.singular_values, values, rtol=1e-6, atol=1e-6)
    generator = torch.Generator().manual_seed(5)
    for rank in (1, 3, 5):
        factors = factorisation.truncated(rank)
        best = cost(factors.left @ factors.right - matrix, metric)
        assert best == pytest.approx(values[rank:].square().sum().item(), rel=1e-4)
        for attempt in range(200):
            step = 10.0 ** -(attempt % 4)
            left = factors.left + step * torch.randn(factors.left.shape, generator=generator)
            right = factors.right + step * torch.randn(factors.right.shape, generator=generator)
            assert cost(left @ right - matrix, metric) >= best * (1 - 1e-5)


def test_the_metric_matters():
    matrix, metric = random_matrix(9, 6), metric_of("full-full", 9, 6)
    plain, weighted = (in_metric(matrix, one).truncated(2) for one in (None, metric))
    assert cost(weighted.left @ weighted.right - matrix, metric) < 0.9 * cost(plain.left @ plain.right - matrix, metric)


def test_where_the_loss_never_reaches_the_metric_is_plain():
    matrix = random_matrix(9, 6)
    plain, unreached = (in_metric(matrix, metric_of(kind, 9, 6)).factors for kind in ("plain", "unreached"))
    torch.testing.assert_close(plain.left @ plain.right, unreached.left @ unreached.right)


@pytest.mark.parametrize("kind", METRICS)
@pytest.mark.parametrize("rank", [0, 1, 4])
def test_the_numerical_rank_is_exact_in_any_metric(kind, rank):
    matrix = random_matrix(12, rank, 3) @ random_matrix(rank, 10, 4)
    factors = in_metric(matrix, metric_of(kind, 12, 10)).truncated(max(rank, 1))
    torch.testing.assert_close(factors.left @ factors.right, matrix, rtol=0, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.sampled_from(METRICS), st.integers(0, 1000))
def test_any_shape_and_rank(rows, columns, rank, kind, seed):
    matrix, metric = random_matrix(rows, columns, seed), metric_of(kind, rows, columns, seed)
    factorisation = in_metric(matrix, metric, rank)
    factors = factorisation.truncated(rank)
    assert factors.rank == min(rank, rows, columns) == len(factorisation.singular_values)
    assert factors.left.shape == (rows, factors.rank) and factors.right.shape == (factors.rank, columns)
    values = whitened_values(matrix, metric)
    tail, whole = values[factors.rank :].square().sum().item(), values.square().sum().item()
    assert cost(factors.left @ factors.right - matrix, metric) == pytest.approx(tail, rel=1e-3, abs=1e-8 * whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_and_parameters(dtype):
    parameter = torch.nn.Parameter(random_matrix(6, 8).to(dtype))
    factors = factorise(parameter).truncated(6)
    assert factors.left.dtype == torch.float32 and not factors.left.requires_grad
    torch.testing.assert_close(factors.left @ factors.right, parameter.detach().float(), rtol=1e-5, atol=1e-5)


# Randomised.


def with_spectrum(values: Tensor, rows: int, columns: int) -> Tensor:
    U, _ = torch.linalg.qr(random_matrix(rows, len(values), 7).double())
    V, _ = torch.linalg.qr(random_matrix(columns, len(values), 8).double())
    return U * values @ V.T


DECAYING = 0.5 ** torch.arange(40).double()
SPECTRA = {
    "decaying": DECAYING,
    "slowly": 0.9 ** torch.arange(40).double(),
    "flat": torch.ones(40).double(),
    "low-rank": torch.cat([torch.ones(5), torch.zeros(35)]).double(),
    "zero": torch.zeros(40).double(),
}


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every matrix counts as wide, and little is oversampled; gives the rank that was asked of each randomised SVD."""
    calls: list[int] = []
    randomised = low_rank._randomised

    def watched(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        calls.append(rank)
        return randomised(matrix, rank)

    monkeypatch.setattr(low_rank, "WIDE", 16)
    monkeypatch.setattr(low_rank, "OVERSAMPLING", 2)
    monkeypatch.setattr(low_rank, "_randomised", watched)
    return calls


@pytest.mark.parametrize("shape", [(40, 60), (60, 40)], ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_bound_holds(spectrum, shape):
    values = SPECTRA[spectrum]
    matrix = with_spectrum(values, *shape)
    for computed in (4, 8):
        U, S, V = low_rank._randomised(matrix, computed)
        bound = excess_bound(matrix, S)
        whole = max(values.square().sum().item(), 1e-300)
        for rank in range(1, computed + 1):
            left = matrix - U[:, :rank] * S[:rank] @ V[:, :rank].T
            excess = (left.square().sum() - values[rank:].square().sum()).item() / whole
            assert bound >= excess - 1e-12


@pytest.mark.parametrize(
    ("spectrum", "full"),
    [("decaying", False), ("low-rank", False), ("zero", False), ("flat", True), ("slowly", True)],
)
def test_the_full_svd_is_taken_where_the_bound_is_too_large(wide, spectrum, full, caplog):
    values = SPECTRA[spectrum]
    matrix = with_spectrum(values, 40, 60)
    with caplog.at_level("INFO", logger="hf_lossless"):
        factorisation = factorise(matrix, largest=8)
    assert wide == [10]
    assert "randomised SVD of a 40 x 60 matrix to rank 8" in caplog.text
    assert ("a full one follows" in caplog.text) == full
    assert factorisation.excess <= low_rank.LARGEST_EXCESS and factorisation.factors.rank == 8
    if full:
        assert factorisation.excess == 0
        torch.testing.assert_close(factorisation.singular_values, values[:8])
    for rank in (1, 4, 8):
        factors = factorisation.truncated(rank)
        left = (factors.left.double() @ factors.right.double() - matrix).square().sum().item()
        best, whole = values[rank:].square().sum().item(), values.square().sum().item()
        assert left <= best + (factorisation.excess + 1e-6) * whole


def test_randomised_in_a_metric(wide):
    matrix, metric = with_spectrum(DECAYING, 40, 60).float(), metric_of("full-full", 40, 60)
    factorisation = in_metric(matrix, metric, 9)
    assert wide and 0 < factorisation.excess <= low_rank.LARGEST_EXCESS
    factors, values = factorisation.truncated(6), whitened_values(matrix, metric)
    best = values[6:].square().sum().item() + factorisation.excess * values.square().sum().item()
    assert cost(factors.left @ factors.right - matrix, metric) <= best * (1 + 1e-6)


@pytest.mark.parametrize("largest", [None, 10, 40])
def test_not_randomised_where_many_are_asked(wide, largest):
    factorise(random_matrix(40, 60), largest=largest)
    assert not wide
    factorise(random_matrix(16, 600), largest=1)  # not wide
    assert not wide


def test_randomness_leaves_the_global_state_alone(wide):
    matrix = with_spectrum(DECAYING, 40, 60)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = factorise(matrix, largest=5)
    assert wide and torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    assert torch.equal(factorise(matrix, largest=5).factors.left, first.factors.left)


def test_randomness_of_several_threads(wide):
    matrices = [with_spectrum(DECAYING, 40, 60 + index) for index in range(12)]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda matrix: factorise(matrix, largest=5), matrices))
    assert len(wide) == 12 and torch.equal(torch.get_rng_state(), state)
    for matrix, one in zip(matrices, found, strict=True):
        assert torch.equal(one.factors.left, factorise(matrix, largest=5).factors.left)


def test_several_at_a_time_equal_one_by_one(wide):
    matrices = {f"m{index}": random_matrix(20 + index, 30, index) for index in range(5)}
    matrices["wide"] = with_spectrum(DECAYING, 40, 60).float()
    metrics = {"m1": metric_of("full-full", 21, 30), "m3": metric_of("diagonal-full", 23, 30)}

    def work(layer: Layer) -> Factorisation:
        return in_metric(matrices[layer.name], metrics.get(layer.name), 5)

    layers = [Layer(name, nn.Linear(*matrix.T.shape), "linear") for name, matrix in matrices.items()]
    found = for_each_layer(work, layers)
    assert list(found) == list(matrices) and wide
    for layer, one in zip(layers, found.values(), strict=True):
        expected = work(layer)
        assert one.factors.rank == 5 and one.excess == pytest.approx(expected.excess)
        torch.testing.assert_close(one.factors.left @ one.factors.right, expected.factors.left @ expected.factors.right)


@pytest.mark.parametrize("kind", METRICS[1:])
def test_whitening_is_a_root_of_the_metric(kind):
    metric = metric_of(kind, 9, 6)
    whitening = Whitening.of(metric, damping=0.0)
    for root, side in ((whitening.rows, metric.rows), (whitening.columns, metric.columns)):
        assert root.dtype == torch.float64 and root.ndim == side.ndim
        full = root.diag() if root.ndim == 1 else root
        assert torch.equal(full, full.tril())
        torch.testing.assert_close(full @ full.T, dense(side, len(side)), rtol=1e-6, atol=1e-7)
