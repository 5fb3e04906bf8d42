"""Adam's minimum against closed forms, and both mappings to widths."""

import doctest
import math
from types import SimpleNamespace

import cet_allocation
import pytest
import torch
from cet_allocation import (
    allocate,
    real_errors,
    solve_errors,
    width_by_formula,
    width_by_matching,
    width_of,
)
from scipy.optimize import minimize

from hf_lossless.errors import UnreachableTargetError
from hf_lossless.storage.plan import KEPT_BITS
from hf_lossless.theories.cet import LayerSpectrum


def spectrum(values: tuple[float, ...], num_weights: int) -> LayerSpectrum:
    return LayerSpectrum(values, (0.0,) * len(values), num_weights, "converged", True, 0.0, 0.0, 0)


def lengths(solution, spectra) -> dict[str, float]:
    """|d| by layer."""
    return {
        name: math.sqrt((sharp.square().sum().item() + rest**2) / spectra[name].num_weights)
        for name, (sharp, rest) in solution.items()
    }


def mean_bits(errors: dict[str, float], spectra) -> float:
    total = sum(one.num_weights for one in spectra.values())
    return -sum(spectra[name].num_weights * math.log2(error) for name, error in errors.items()) / total


def test_docstring_examples():
    result = doctest.testmod(cet_allocation)
    assert result.attempted and not result.failed


def test_room_in_the_long_axes_makes_widths_uniform():
    """y = 0 and the same |d| everywhere: the eigenvalues have no say."""
    spectra = {"a": spectrum((900.0, 30.0), 1000), "b": spectrum((0.1,), 50), "c": spectrum((), 10)}
    solution = solve_errors(spectra, 3.0)
    for error in lengths(solution, spectra).values():
        assert error == pytest.approx(2**-3, rel=0.01)
    sharp, rest = solution["a"]
    assert sharp.square().sum().item() < 1e-4 * rest**2


def test_without_room_sharp_layers_get_less_error():
    """All directions known: mu |d|^2 is the same in every layer, mu its least curvature."""
    spectra = {"a": spectrum((8.0, 4.0, 3.0), 3), "b": spectrum((2.0, 1.0), 2)}
    solution = solve_errors(spectra, 2.5, norm_weight=0.5, num_steps=4000)
    errors = lengths(solution, spectra)
    curvatures = {"a": 3 / 8 + 0.5, "b": 1 / 8 + 0.5}
    assert mean_bits(errors, spectra) == pytest.approx(2.5, abs=1e-3)
    assert errors["a"] / errors["b"] == pytest.approx(math.sqrt(curvatures["b"] / curvatures["a"]), rel=0.01)


def test_against_scipy():
    """One layer without room, one with, one with a direction of descent."""
    spectra = {"a": spectrum((4.0, 2.0), 2), "b": spectrum((3.0,), 6), "c": spectrum((1.0, -2.0), 4)}
    curvatures = [torch.tensor([1.0, 0.5]), torch.tensor([0.75, 0.0]), torch.tensor([0.25, -0.5, 0.0])]
    weight, target = 1.25, 2.0
    sizes = [2, 6, 4]

    def split(flat):
        return torch.tensor(flat).split([len(one) for one in curvatures])

    def objective(flat):
        parts = zip(curvatures, split(flat), strict=True)
        return sum(((curvature + weight) * part.square()).sum().item() for curvature, part in parts)

    def bits(flat):
        mean_squares = [part.square().sum().item() / n for part, n in zip(split(flat), sizes, strict=True)]
        return -0.5 * sum(n * math.log2(value) for n, value in zip(sizes, mean_squares, strict=True)) / sum(sizes)

    best = min(
        (
            minimize(
                objective,
                torch.randn(7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).numpy(),
                constraints={"type": "eq", "fun": lambda flat: bits(flat) - target},
                options={"maxiter": 500, "ftol": 1e-12},
            )
            for seed in range(5)
        ),
        key=lambda result: result.fun,
    )
    solution = solve_errors(spectra, target, norm_weight=weight)
    ours = torch.cat(
        [
            torch.cat([sharp, torch.tensor([rest] if spectra[name].num_weights > len(sharp) else [])])
            for name, (sharp, rest) in solution.items()
        ]
    )
    assert bits(ours.tolist()) == pytest.approx(target, abs=1e-3)
    assert objective(ours.tolist()) == pytest.approx(best.fun, rel=1e-2)


def test_a_direction_of_descent_takes_the_error():
    spectra = {"flat": spectrum((1.0,), 100), "descent": spectrum((1.0, -1.0), 100)}
    solution = solve_errors(spectra, 4.0)
    errors = lengths(solution, spectra)
    assert errors["descent"] > 1.2 * errors["flat"]
    sharp, rest = solution["descent"]
    assert sharp[1].item() > 10 * sharp[0].item() and sharp[1].item() > 10 * rest


def test_the_seed_decides():
    spectra = {"a": spectrum((9.0, 1.0), 40), "b": spectrum((2.0,), 3)}
    first, second = (solve_errors(spectra, 3.0, num_steps=50, seed=0)["a"] for _ in range(2))
    other = solve_errors(spectra, 3.0, num_steps=50, seed=1)["a"]
    assert torch.equal(first[0], second[0]) and not torch.equal(first[0], other[0])


def test_formula():
    assert width_by_formula(2**-5, alpha=0.0) == 5
    assert width_by_formula(0.0, alpha=2**-20) == 20


@pytest.mark.parametrize(
    ("error", "expected"), [(0.2, 2), (0.03, 4), (0.02, 4), (0.002, 8), (1e-9, 8), (5.0, 2)], ids=str
)
def test_matching(error, expected):
    assert width_by_matching(error, {2: 0.1, 4: 0.025, 8: 0.0015, 16: 0.0}) == expected


def test_matching_with_nothing_but_keeping():
    assert width_by_matching(0.1, {16: 0.0}) == 16


@pytest.mark.parametrize(
    ("error", "real", "expected"),
    [
        (0.06, {2: 0.25, 4: 0.06, 8: 0.004}, (4, "formula")),
        (0.06, {2: 0.25, 4: 0.119, 8: 0.03}, (4, "formula")),
        (0.06, {2: 0.25, 4: 0.5, 8: 0.03}, (8, "matching")),  # outliers: a wide range, larger errors
        (0.06, {2: 0.05, 4: 0.01, 8: 0.001}, (2, "matching")),  # a narrow range
    ],
    ids=["as-the-formula-says", "within-a-bit", "outliers", "narrow"],
)
def test_which_mapping(error, real, expected):
    assert width_of(error, real) == expected


def candidate(kind: str, bits: int = 0, noise: float = 0.0, low_rank: object = None) -> SimpleNamespace:
    return SimpleNamespace(kind=kind, grid=SimpleNamespace(bits=bits) if bits else None, noise=noise, low_rank=low_rank)


def test_real_errors():
    candidates = [candidate("grid", 2, 0.3), candidate("grid", 2, 0.2), candidate("sum", 4, 0.1, "factors")]
    assert real_errors([*candidates, candidate("kept")]) == {2: 0.2, KEPT_BITS: 0.0}


SPECTRA = {"plain": spectrum((5.0,), 1000), "outliers": spectrum((0.1,), 1000)}
CANDIDATES = {
    "plain": [candidate("grid", bits, 2.0**-bits) for bits in (2, 3, 4, 8)],
    "outliers": [candidate("grid", bits, 4 * 2.0**-bits) for bits in (2, 3, 4, 6, 8)],
}


def test_allocate():
    """The same |d| in both layers; the one with outliers is given more bits."""
    result = allocate(SPECTRA, CANDIDATES, 5.0)
    assert (result["plain"].bits, result["plain"].mapping) == (4, "formula")
    assert (result["outliers"].bits, result["outliers"].mapping) == (6, "matching")
    assert result["plain"].error == pytest.approx(result["outliers"].error, rel=0.02)
    assert result["plain"].formula_bits == pytest.approx(4, abs=0.6)
    assert result["plain"].sharp_share < 1e-3


@pytest.mark.parametrize("mean_bits", [2.0, 3.5, 30.0])
def test_allocate_keeps_to_the_size(mean_bits):
    result = allocate(SPECTRA, CANDIDATES, mean_bits)
    assert mean_bits - 1.5 <= sum(one.bits for one in result.values()) / 2 <= mean_bits or mean_bits > 8


def test_allocate_below_the_smallest_widths():
    with pytest.raises(UnreachableTargetError, match=r"mean_bits=1\.5.*Raise mean_bits"):
        allocate(SPECTRA, CANDIDATES, 1.5)
