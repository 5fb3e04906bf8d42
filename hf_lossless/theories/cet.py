"""CET, compression error theory: predictions from the sharp directions of each layer's Hessian.

"A General Error-Theoretical Analysis Framework for Constructing Compression Strategies", Zhang et al., ICML 2025, arXiv
2502.15802: Eq. 5 to 11 and step 1 of Algorithm 1; the other steps are in recipes/benchmarks/cet_allocation.py.

Notation: for one layer, w its weight [n], H the Hessian [n, n] of the mean loss f, d the error of the stored weight.

    Delta f = 1/2 d' H d                            (Eq. 8; the gradient of a trained model is neglected)
    y = P' d,  d' H d = sum_k lambda_k y_k^2        (Eq. 10; P: eigenvectors of H, "canonical transformation")
    R^n = V_long + V_short                          (Eq. 11; short axes of the ellipsoid: sharp directions)

How contradictions and gaps of the text are resolved:

* Step 4 picks "the m smallest eigenvalues". Sections 3.2 and 3.3 constrain the short axes of the ellipsoid, which are
  those of the largest eigenvalues; so do we, by absolute value, so that negative eigenvalues are included (next point).
* "Positive definite": every lambda_k > 0 is a cost. "Indefinite": a negative lambda_k is a direction of descent, the
  long axis of a hyperbolic paraboloid; a large y_k lowers the prediction there.
* 200 eigenpairs are computed with at most 100 iterations, but one start gives at most one pair for each iteration.

The paper solves for a free d and derives widths from it (`cet_allocation`). The knapsack needs the converse: the cost
of a given candidate's d. `predict` evaluates Eq. 8 on the computed eigenpairs, with the mean curvature of the remaining
directions:

    Delta f = 1/2 sum_(k<=m) lambda_k (v_k' d)^2 + 1/2 rest (||d||^2 - sum_(k<=m) (v_k' d)^2)
    rest = max(0, tr(Q H Q) / (n - m)),  Q = 1 - V V'                              (Hutchinson, in the complement)

With all n pairs this is Eq. 8 exactly. With few, the rest matters: a rounding error has about m/n of its squared length
in m of n directions. The rest is never negative, so that unresolved directions never count as a gain.

All of this is for one layer's diagonal block of H: errors of different layers are taken to be uncorrelated.
"""

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lossless.calibration.hessian import HessianProducts, hessian, random_signs, sub_sample
from hf_lossless.calibration.perturbation import seeded_number
from hf_lossless.calibration.units import unit_of
from hf_lossless.candidates.grids import Candidate
from hf_lossless.storage.layers import Layer
from hf_lossless.theories.lanczos import Eigenpairs, lanczos
from hf_lossless.theories.noise_limits import refuse_beyond, refuse_flat
from hf_lossless.theories.problem import Prediction, Problem, layers_with_a_choice, predictions_of_kept

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CurvatureSettings:
    """Limits on the computation for each layer.

    Attributes:
        num_eigenpairs: m, the sharp directions (the paper: 200).
        max_iterations: Lanczos iterations, each one Hessian-vector product (the paper: 100).
        starts: Random starts of Lanczos.
        tolerance: Residual, relative to the largest eigenvalue, at which a pair has converged.
        trace_probes: Further products for the mean curvature of the remaining directions; 0: these count as flat.
        max_rows: Rows of calibration data; their graphs are in memory together.
    """

    num_eigenpairs: int = 8
    max_iterations: int = 20
    starts: int = 2
    tolerance: float = 0.02
    trace_probes: int = 8
    max_rows: int = 32


@dataclass(frozen=True)
class LayerCurvature:
    """The eigenpairs of one layer's Hessian, and the mean curvature of the other directions.

    Attributes:
        eigenpairs: The sharp directions, within `support`.
        support: Indices into the flattened matrix [out * in] outside which H is zero (tokens that did not occur, kernel
            taps on padding only); None: all indices.
        num_weights: n, the number of weights of the layer.
        rest: Mean curvature of the other directions of the support, at least 0.
        rest_error: Standard error of `rest`.
        num_products: Hessian-vector products used in total.
    """

    eigenpairs: Eigenpairs
    support: Tensor | None
    num_weights: int
    rest: float
    rest_error: float
    num_products: int

    def restricted(self, error: Tensor) -> Tensor:
        """Returns an error [out, in] as a vector of the support's coordinates."""
        flat = error.flatten()
        return flat if self.support is None else flat[self.support]


@dataclass(frozen=True)
class LayerSpectrum:
    """A report on one layer's spectrum, for logs and for `cet_allocation`.

    Attributes:
        values: Eigenvalues lambda_k.
        residuals: Residuals of the eigenpairs.
        num_weights: n.
        status: Status of Lanczos, in words.
        converged: Whether every pair was found to the tolerance, or the spectrum has no more pairs.
        rest: Mean curvature of the other directions.
        rest_error: Standard error of `rest`.
        num_products: Hessian-vector products used.
    """

    values: tuple[float, ...]
    residuals: tuple[float, ...]
    num_weights: int
    status: str
    converged: bool
    rest: float
    rest_error: float
    num_products: int

    @property
    def definite(self) -> bool:
        """Tells whether no direction of descent was found (ellipsoid, else hyperbolic paraboloid)."""
        return all(value >= -residual for value, residual in zip(self.values, self.residuals, strict=True))


def canonical(vectors: Tensor, error: Tensor) -> Tensor:
    """Computes `y = P' d` (Eq. 10): the error [n] in the coordinates of the eigenvectors [n, m], float64 [m].

    Args:
        vectors: Eigenvectors [n, m].
        error: d [n].
    """
    return (error.to(vectors) @ vectors).double().cpu()


def quadratic_change(values: Tensor, coordinates: Tensor, squared_error: float, rest: float) -> float:
    """Computes Eq. 8 on the eigenpairs, with the mean curvature of the other directions.

    Args:
        values: lambda [m], nats per squared unit of weight.
        coordinates: y [m].
        squared_error: ||d||^2 of the same d.
        rest: Mean curvature of the other directions.

    Returns:
        1/2 sum_k lambda_k y_k^2 + 1/2 rest (||d||^2 - ||y||^2), nats; negative along directions of descent.

    Example:
        >>> quadratic_change(torch.tensor([4.0, -2.0]), torch.tensor([1.0, 1.0]), squared_error=12.0, rest=0.1)
        1.5
    """
    squares = coordinates.double().square()
    outside = max(squared_error - squares.sum().item(), 0.0)
    return 0.5 * (values.double() * squares).sum().item() + 0.5 * rest * outside


def curvature_of(product: HessianProducts, layer: Layer, settings: CurvatureSettings, seed: int = 0) -> LayerCurvature:
    """Computes the eigenpairs of one layer's Hessian block and the rest's mean curvature (Algorithm 1, step 1).

    Args:
        product: Hessian products, opened for this layer.
        layer: The layer.
        settings: Limits on the computation.
        seed: Seed of the random vectors.

    Returns:
        The curvature, at a cost of at most 1 + max_iterations + trace_probes products.
    """
    before = product.num_products
    shape, num_weights = layer.matrix.shape, layer.matrix.numel()
    generator = torch.Generator().manual_seed(seed)
    like = layer.matrix.detach()
    # A random vector is orthogonal to no nonzero row of H: where its image is exactly zero, so is H's row.
    image = product({layer.name: random_signs(shape, generator).to(like)})[layer.name].flatten()
    if unit_of(image) not in (0.0, 1.0):  # in float32 the squares could underflow or overflow
        image = image.double()
    nonzero = image.nonzero().flatten()
    size = len(nonzero)
    support = nonzero if size < num_weights else None

    def within(vector: Tensor) -> Tensor:
        """H [size, size] times a vector of the support's coordinates."""
        full_vector = vector
        if support is not None:
            full_vector = torch.zeros(num_weights, dtype=vector.dtype, device=vector.device)
            full_vector[support] = vector
        result = product({layer.name: full_vector.view(shape)})[layer.name].flatten()
        return result if support is None else result[support]

    eigenpairs = lanczos(
        within,
        size,
        count=settings.num_eigenpairs,
        which="magnitude",
        max_iterations=settings.max_iterations,
        starts=settings.starts,
        tolerance=settings.tolerance,
        seed=seeded_number(seed, 0),
        like=image,
    )
    samples = []
    remaining = size - len(eigenpairs.values)
    if remaining:
        for _ in range(settings.trace_probes):
            probe = random_signs(torch.Size([size]), generator).to(image)
            probe -= eigenpairs.vectors @ (probe @ eigenpairs.vectors)
            samples.append((probe * within(probe)).sum(dtype=torch.float64).item() / remaining)
    rest = torch.tensor(samples or [0.0], dtype=torch.float64)
    return LayerCurvature(
        eigenpairs=eigenpairs,
        support=support,
        num_weights=num_weights,
        rest=max(rest.mean().item(), 0.0),
        rest_error=rest.std().item() / math.sqrt(len(rest)) if len(rest) > 1 else 0.0,
        num_products=product.num_products - before,
    )


def predicted_loss_change(curvature: LayerCurvature, error: Tensor) -> float:
    """Predicts the loss change of a candidate's error [out, in] by `quadratic_change`.

    Args:
        curvature: Eigenpairs of the layer's Hessian.
        error: d [out, in].
    """
    within = curvature.restricted(error)
    return quadratic_change(
        curvature.eigenpairs.values,
        canonical(curvature.eigenpairs.vectors, within),
        within.double().square().sum().item(),
        curvature.rest,
    )


def predict(problem: Problem) -> dict[str, list[Prediction]]:
    """Predicts the loss change of every candidate, by layer; 0 for keeping a layer.

    Args:
        problem: Model, data, statistics and candidates.

    Returns:
        One prediction for each candidate, the same in every process. See `examine` for the cost.

    Raises:
        CalibrationError: The loss has no second derivative, or it is not finite.
    """
    predictions, _ = examine(problem)
    return predictions


def examine(
    problem: Problem, settings: CurvatureSettings | None = None
) -> tuple[dict[str, list[Prediction]], dict[str, LayerSpectrum]]:
    """Predicts the loss change of every candidate, and reports how well each layer's spectrum is known.

    Costs one forward-backward pass over `max_rows` rows, and for each layer `1 + max_iterations + trace_probes`
    products at most, each half such a pass on average. Eigenvectors, [n, m], are freed when a layer's candidates are
    predicted.

    Args:
        problem: Model, data, statistics and candidates.
        settings: Limits on the computation; None: the defaults.

    Returns:
        Predictions by layer, infinity for noise beyond the second order and where every second derivative is zero (see
        `noise_limits`), and reports by layer for those that have a choice.

    Raises:
        CalibrationError: The loss has no second derivative, or it is not finite.
    """
    settings = settings or CurvatureSettings()
    batches = sub_sample(problem.batches, settings.max_rows)
    layers = layers_with_a_choice(problem)
    predictions: dict[str, list[Prediction]] = {}
    spectra: dict[str, LayerSpectrum] = {}
    with hessian(problem.model, batches if layers else [], layers, problem.loss) as product:
        for position, layer in enumerate(layers):
            curvature = curvature_of(product, layer, settings, seeded_number(problem.seed, position))
            spectra[layer.name] = _spectrum(curvature)
            predictions[layer.name] = []
            for candidate in problem.candidates[layer.name]:
                predictions[layer.name].append(_judge(curvature, candidate, layer))
                problem.advance()
            predictions[layer.name] = refuse_beyond(layer, problem.candidates[layer.name], predictions[layer.name])
    _logger.info(
        "CET: %d Hessian-vector products; %d of %d layers' eigenpairs not within %g; %d indefinite",
        sum(spectrum.num_products for spectrum in spectra.values()),
        sum(not spectrum.converged for spectrum in spectra.values()),
        len(spectra),
        settings.tolerance,
        sum(not spectrum.definite for spectrum in spectra.values()),
    )
    flat = [name for name, spectrum in spectra.items() if not spectrum.values]
    return refuse_flat(problem, predictions, flat) | predictions_of_kept(problem), spectra


def _judge(curvature: LayerCurvature, candidate: Candidate, layer: Layer) -> Prediction:
    if candidate.kind == "kept":
        return Prediction(0.0)
    change = predicted_loss_change(curvature, candidate.error(layer.matrix.detach()))
    return Prediction(change if math.isfinite(change) else math.inf)


def _spectrum(curvature: LayerCurvature) -> LayerSpectrum:
    pairs = curvature.eigenpairs
    return LayerSpectrum(
        values=tuple(pairs.values.tolist()),
        residuals=tuple(pairs.residuals.tolist()),
        num_weights=curvature.num_weights,
        status=pairs.describe(),
        converged=pairs.status != "not converged",
        rest=curvature.rest,
        rest_error=curvature.rest_error,
        num_products=curvature.num_products,
    )
