"""Kronecker-factored curvature of the mean loss, layer by layer (K-FAC).

Notation: a layer `y_t = W x_t`, `W [out, in]`, is used at positions t: rows, times tokens or pixels, times calls.
`x_t` [in] is its input there and `g_t` [out] the gradient of the row's own loss with respect to its output. For N rows

    H  ~  1/N sum_t (g_t g_t') (x) (x_t x_t')  ~  T/N (mean_t g_t g_t') (x) (mean_t x_t x_t')

is the empirical Fisher matrix, an estimate of the Hessian with respect to W where the model's probabilities are those
of the labels. On rows that the model has memorised it vanishes as the square of their loss, the Hessian only as the
loss itself: calibrate on rows that the model was not trained on. The first step takes every position as an example of
its own, the second takes g and x to be independent. T counts the positions with g_t != 0: the loss does not depend on
the others, such as padding and all but the first token in a classifier's last block. Where one output serves all rows
of a batch (positions looked up once), only the sum of their gradients is seen: its square stands for the sum of
squares, with the rows' cross terms, whose mean is zero where the loss is at a minimum.

| layer              | x_t                     | g_t                          | factors                              |
|--------------------|-------------------------|------------------------------|--------------------------------------|
| Linear, Conv1D     | input of a token        | gradient of its output       | rows g g', columns x x'              |
| Conv2d             | patch under the kernel  | gradient of one output pixel | the same                             |
| Conv2d with groups | that of each group      | the same                     | see `CurvatureSums`                  |
| Embedding          | which token: one-hot    | gradient of its vector       | rows: shares of tokens, columns g g' |

Tokens that the calibration rows do not have are not free. By the Good-Turing estimate the next token is an unseen one
with probability n1 / T, with n1 the number of tokens that were seen once (at least 1). The unseen tokens share this
mass evenly; the seen ones give it up in proportion to their counts, at most half of them.

Sources: Martens & Grosse 2015 (arXiv 1503.05671), Eq. 1; for convolutions Grosse & Martens 2016 (arXiv 1602.01407); for
layers used at many positions the "expand" setting of Eschenhagen et al. 2023 (arXiv 2311.00636).
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_lossless.calibration.units import in_unit, unit_of
from hf_lossless.data.batches import Batch, num_examples
from hf_lossless.data.processes import max_over_processes, sum_over_processes
from hf_lossless.storage.layers import Layer, kind_of, modules_of

LARGEST_FACTOR = 4096
"""Longest dimension with a full factor; a longer one keeps only the diagonal. A full factor of 4,096 takes 64 MiB, one
of 50,257 takes 9.4 GiB. So a layer takes at most 128 MiB, and 64 MiB more while a Linear's weight is tied to an
embedding."""

PATCH_BYTES = 64 * 2**20
"""Memory for the unfolded patches of a convolution: as many images at once as fit, at least one."""


@dataclass(frozen=True, eq=False)
class KroneckerFactors:
    """Kronecker factors of a layer's Hessian; a weight error `d [out, in]` costs `1/2 scale tr(R d C d')`.

    The diagonal of both factors has mean one (or they are zero, where the loss does not depend on the layer), so that
    `scale` is the mean of the estimated Hessian's diagonal.

    Attributes:
        rows: R, [out, out] or the diagonal [out], float32.
        columns: C, [in, in] or the diagonal [in], float32.
        scale: Mean second derivative of the mean loss with respect to one weight.
        mean_input: Mean of the inputs x_t, [in], unscaled; None where they are one-hot or in groups.
    """

    rows: Tensor
    columns: Tensor
    scale: float
    mean_input: Tensor | None = None

    @property
    def is_finite(self) -> bool:
        """Tells whether all numbers of the factors are finite."""
        tensors = bool(torch.isfinite(self.rows).all()) and bool(torch.isfinite(self.columns).all())
        return math.isfinite(self.scale) and tensors

    def damped(self, share: float) -> "KroneckerFactors":
        """Adds `share` of their mean diagonal to the factors' diagonals, so that they are positive definite.

        Calibration rows span only a part of the space; damping gives errors outside of it a cost too. Where the loss
        does not depend on the layer, the factors are the identity and the scale stays 0.

        Example:
            >>> KroneckerFactors(torch.tensor([2.0, 0.0]), torch.zeros(2), scale=1.0).damped(0.5).rows
            tensor([2.5000, 0.5000])
        """
        return replace(self, rows=_damped(self.rows, share), columns=_damped(self.columns, share))


def second_order_change(error: Tensor, curvature: KroneckerFactors) -> float:
    """Predicts the change of the mean loss caused by a weight error: `1/2 scale tr(R d C d')`.

    Matrix products are in float32 and sums over their elements in float64; needs the memory of three `[out, in]`.

    Args:
        error: d, [out, in]: new weights minus old weights.
        curvature: R, C and the scale.

    Returns:
        The change, in the unit of the loss.

    Example:
        >>> factors = KroneckerFactors(torch.ones(2), torch.eye(3), scale=0.5)
        >>> second_order_change(torch.ones(2, 3), factors)
        1.5
    """
    unit = unit_of(error)
    error = in_unit(error.float(), unit)
    # tr(R d C d') = <R d, d C>, for C = C'
    left = curvature.rows @ error if curvature.rows.ndim == 2 else curvature.rows[:, None] * error
    right = error @ curvature.columns if curvature.columns.ndim == 2 else error * curvature.columns
    return 0.5 * curvature.scale * left.mul_(right).sum(dtype=torch.float64).item() * unit * unit


def damping_term(diagonals: Tensor, share: float) -> Tensor:
    """Computes what damping adds to the diagonals of metrics: a share of their mean, or one where they are zero.

    Args:
        diagonals: Diagonals of a batch of metrics, [batch, n].
        share: Share of the mean.

    Returns:
        The term of each metric, [batch, 1].
    """
    return torch.where(diagonals.any(1), share * diagonals.mean(1), 1.0)[:, None]


def _damped(factor: Tensor, share: float) -> Tensor:
    damped = factor.clone()
    diagonal = _diagonal(damped)
    diagonal += damping_term(diagonal[None], share)[0]
    return damped


@dataclass
class _Sums:
    """Sums over the positions of one kind of use (lookups or products).

    Attributes:
        rows: Sum of r r' for the row-side vectors r, [out, out], or of their squares, [out].
        columns: The same sum for each group's column-side vectors, [groups, in, in] or [groups, in].
        inputs: Sum of each group's column-side vectors, [groups, in].
        positions: Number of positions, [1], float64.
        row_unit: The unit of r: that of the largest r so far, or 0 before the first.
        column_unit: The same for the column-side vectors.
    """

    rows: Tensor
    columns: Tensor
    inputs: Tensor
    positions: Tensor
    row_unit: float = 0.0
    column_unit: float = 0.0

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.rows, self.columns, self.inputs, self.positions

    @property
    def units(self) -> tuple[float, float]:
        return self.row_unit, self.column_unit

    def in_units(self, row_unit: float, column_unit: float) -> "_Sums":
        """Rescales the sums to vectors in larger (or equal) units."""
        rows = self.row_unit / row_unit if self.row_unit else 1.0
        columns = self.column_unit / column_unit if self.column_unit else 1.0
        return _Sums(
            _times(self.rows, rows * rows),
            _times(self.columns, columns * columns),
            _times(self.inputs, columns),
            self.positions,
            row_unit,
            column_unit,
        )


def _times(values: Tensor, factor: float) -> Tensor:
    return values if factor == 1 else values * factor


class CurvatureSums:
    """Running sums over all uses of one layer's weight, and the Kronecker factors computed from them.

    Inputs and gradients are cast to float32, and multiplied and added in it: the terms of the diagonals are never
    negative, so that their relative error stays near 1e-6 at half the memory of float64. They are divided by the unit
    of the largest of them, so that their squares fit float32; see `units`.

    Where H is a sum of several Kronecker products, the factors are those that keep its partial traces: an error spread
    evenly over the columns, or over the rows, has the curvature that the sum gives it. There are two such cases. A
    weight tied between an embedding and a Linear has one product for each. A convolution with groups has one for each
    group, whose R is taken to be diagonal and is zero outside of the group's rows; so `rows` is a row's mean g^2 times
    the mean x^2 in its group, and `columns` the groups' mean x x', weighted by their mean g^2. A module that runs
    several times, or several Linears with one weight, make one product: their positions are taken together.
    """

    def __init__(self, layer: Layer, modules: list[nn.Module], num_examples: int) -> None:
        """Starts at zero for all uses of the layer's weight, on the weight's device.

        Args:
            layer: The layer.
            modules: All modules that use its weight.
            num_examples: N, over all batches and processes.
        """
        self.shape = layer.matrix.shape
        self.device = layer.weight.device
        self.num_examples = num_examples
        self.groups = layer.module.groups if isinstance(layer.module, nn.Conv2d) else 1
        kinds = {kind_of(module) for module in modules}
        self.lookups = self._zeros(diagonal_rows=True) if "embedding" in kinds else None
        self.products = self._zeros(diagonal_rows=self.groups > 1) if kinds - {"embedding"} else None

    def _zeros(self, diagonal_rows: bool) -> _Sums:
        num_rows, num_columns = self.shape
        rows = (num_rows,) if diagonal_rows or num_rows > LARGEST_FACTOR else (num_rows, num_rows)
        columns = (num_columns,) if num_columns > LARGEST_FACTOR else (num_columns, num_columns)
        return _Sums(
            torch.zeros(rows, device=self.device),
            torch.zeros((self.groups, *columns), device=self.device),
            torch.zeros((self.groups, num_columns), device=self.device),
            torch.zeros(1, dtype=torch.float64, device=self.device),
        )

    def add(self, module: nn.Module, inputs: Tensor, gradient: Tensor) -> None:
        """Adds one call of a module.

        Args:
            module: The module that was called.
            inputs: Its input.
            gradient: Gradient of `value * share` (see `calibrate`) with respect to the module's output: 1/N of each
                row's own gradient.
        """
        gradient = gradient.detach()
        if isinstance(module, nn.Embedding):
            assert self.lookups is not None
            vectors = gradient.reshape(-1, gradient.shape[-1])
            used = vectors.any(1)
            vectors = vectors[used].float()
            self.lookups = self.lookups.in_units(1.0, max(self.lookups.column_unit, unit_of(vectors)))
            self.lookups.rows += torch.bincount(inputs.reshape(-1)[used], minlength=self.shape[0])
            _add_columns(self.lookups.columns, in_unit(vectors, self.lookups.column_unit).T[None])
            self.lookups.positions += len(vectors)
        elif isinstance(module, nn.Conv2d):
            for patches, pixels in _patches(module, inputs, gradient):
                self._add_product(patches, pixels)
        else:
            self._add_product(inputs.reshape(-1, inputs.shape[-1]).T[None], gradient.reshape(-1, gradient.shape[-1]))

    def _add_product(self, inputs: Tensor, gradients: Tensor) -> None:
        """Adds positions: inputs [groups, in, positions], gradients [positions, out]."""
        assert self.products is not None
        used = gradients.any(1)
        if not used.all():
            inputs, gradients = inputs[:, :, used], gradients[used]
        gradients, inputs = gradients.float(), inputs.float()
        row_unit, column_unit = self.products.units
        self.products = self.products.in_units(max(row_unit, unit_of(gradients)), max(column_unit, unit_of(inputs)))
        gradients, inputs = in_unit(gradients, self.products.row_unit), in_unit(inputs, self.products.column_unit)
        if self.products.rows.ndim == 2:
            self.products.rows.addmm_(gradients.T, gradients)
        else:
            self.products.rows += gradients.square().sum(0)
        _add_columns(self.products.columns, inputs)
        self.products.inputs += inputs.sum(2)
        self.products.positions += len(gradients)

    def over_processes(self) -> "CurvatureSums":
        """Adds up the sums of all processes; every process gets the total."""

        def summed(sums: _Sums) -> _Sums:
            units = max_over_processes(torch.tensor(sums.units, dtype=torch.float64)).tolist()
            rows, columns, inputs, positions = map(sum_over_processes, sums.in_units(*units).parts)
            return _Sums(rows, columns, inputs, positions, *units)

        return self._with(summed)

    def plus(self, other: "CurvatureSums") -> "CurvatureSums":
        """Adds the sums of another set of batches for the same layer."""
        others = iter([sums for sums in (other.lookups, other.products) if sums is not None])

        def added(sums: _Sums) -> _Sums:
            other = next(others)
            units = tuple(map(max, sums.units, other.units))
            pairs = zip(sums.in_units(*units).parts, other.in_units(*units).parts, strict=True)
            rows, columns, inputs, positions = (a + b for a, b in pairs)
            return _Sums(rows, columns, inputs, positions, *units)

        return self._with(added)

    def _with(self, change: Callable[[_Sums], _Sums]) -> "CurvatureSums":
        twin = copy.copy(self)
        twin.lookups = None if self.lookups is None else change(self.lookups)
        twin.products = None if self.products is None else change(self.products)
        return twin

    def factors(self, num_rows: int | None = None) -> KroneckerFactors:
        """Computes the Kronecker factors from the sums.

        Args:
            num_rows: How many of the N rows were added; None: all.
        """
        # The gradients are 1/N of each row's own, and the mean is over the rows that were added.
        row_weight = self.num_examples**2 / (self.num_examples if num_rows is None else num_rows)
        lookups = None if self.lookups is None else replace(self.lookups, rows=smoothed_counts(self.lookups.rows))
        terms = [_factors(sums, row_weight) for sums in (lookups, self.products) if sums is not None]
        scale = sum(term.scale for term in terms)
        rows, columns = terms[0].rows, terms[0].columns
        if len(terms) > 1 and scale:  # partial traces add: scale R = sum_u scale_u R_u, and so for C
            weights = [term.scale / scale for term in terms]
            rows = weights[1] * terms[1].rows
            diagonal = rows if rows.ndim == 1 else rows.diagonal()
            diagonal += weights[0] * terms[0].rows
            columns = weights[0] * terms[0].columns + weights[1] * terms[1].columns
        return KroneckerFactors(rows, columns, scale, self._mean_input())

    def _mean_input(self) -> Tensor | None:
        if self.products is None or self.lookups is not None or self.groups > 1:
            return None
        mean = self.products.inputs[0] / self.products.positions.clamp(min=1)
        return (mean * self.products.column_unit).float()


def smoothed_counts(counts: Tensor) -> Tensor:
    """Computes Good-Turing counts of tokens, with a share for unseen ones and the same total (Good 1953, Eq. 9).

    Args:
        counts: How often each token was seen, [tokens].

    Example:
        >>> smoothed_counts(torch.tensor([6.0, 1.0, 1.0, 0.0, 0.0]))
        tensor([4.5000, 0.7500, 0.7500, 1.0000, 1.0000])
    """
    unseen = counts == 0
    total, num_once = counts.sum(), (counts == 1).sum().clamp(min=1)
    if not unseen.any() or not total:
        return counts
    share = (num_once / total).clamp(max=0.5)
    return torch.where(unseen, share * total / unseen.sum(), (1 - share) * counts)


def _factors(sums: _Sums, row_weight: float) -> KroneckerFactors:
    """Computes one Kronecker product with the partial traces of the sum over groups; exact for one group."""
    groups = len(sums.columns)
    rows = _diagonal(sums.rows).double()  # sum_t r^2
    squares = sums.columns.diagonal(dim1=1, dim2=2) if sums.columns.ndim == 3 else sums.columns
    energy = squares.double().mean(1)  # sum_t c^2 of each group, a mean over its columns
    mean = (rows.view(groups, -1).mean(1) * energy).mean().item()
    if mean == 0:
        return KroneckerFactors(torch.zeros_like(sums.rows), torch.zeros_like(sums.columns[0]), 0.0)
    # With the gradients of 1/N of each row: N/T (sum r r') (x) (sum c c') = T/N (mean r r') (x) (mean c c')
    unit = sums.row_unit * sums.column_unit
    scale = row_weight * mean / sums.positions.item() * unit * unit
    if groups == 1:
        return KroneckerFactors(sums.rows / rows.mean().float(), sums.columns[0] / energy[0].float(), scale)
    group_rows = rows.view(groups, -1)
    rows = group_rows * energy[:, None] / mean
    weights = (group_rows.mean(1) / groups / mean).float()
    # The sums of a group whose inputs are tiny beside the others' underflow float32.
    weights = torch.where(energy < torch.finfo(torch.float32).tiny, 0.0, weights)
    columns = torch.einsum("g,g...->...", weights, sums.columns)
    return KroneckerFactors(rows.flatten().float(), columns, scale)


def _diagonal(factor: Tensor) -> Tensor:
    return factor if factor.ndim == 1 else factor.diagonal()


def _add_columns(columns: Tensor, vectors: Tensor) -> None:
    """Adds x x', or its diagonal, for the columns x of each group's [in, positions]."""
    if columns.ndim == 3:
        columns.baddbmm_(vectors, vectors.mT)
    else:
        columns += vectors.square().sum(2)


def _patches(module: nn.Conv2d, images: Tensor, gradient: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the kernel's patches, [groups, in, positions], and gradients [positions, out], some images at a time."""
    if images.ndim == 3:
        images, gradient = images[None], gradient[None]
    bytes_per_image = 4 * images.shape[1] * module.weight[0, 0].numel() * gradient.shape[2] * gradient.shape[3]
    at_once = max(1, PATCH_BYTES // bytes_per_image)
    for start in range(0, len(images), at_once):
        part, pixels = images[start : start + at_once], gradient[start : start + at_once]
        padded = F.pad(part.float(), _padding(module))
        columns = F.unfold(padded, module.kernel_size, module.dilation, 0, module.stride)  # [images, channels, pixels]
        grouped = columns.view(len(part), module.groups, -1, columns.shape[-1]).permute(1, 2, 0, 3)
        yield grouped.flatten(2), pixels.permute(0, 2, 3, 1).flatten(0, 2)


def _padding(module: nn.Conv2d) -> list[int]:
    """Returns the zero padding to the left, right, top and bottom."""
    if isinstance(module.padding, str):  # "valid", or "same": the odd one to the right, as torch has it
        reach = [dilation * (size - 1) for dilation, size in zip(module.dilation, module.kernel_size, strict=True)]
        totals = reach if module.padding == "same" else [0, 0]
        return [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
    height, width = module.padding
    return [width, width, height, height]


class HalvedCurvature:
    """Curvature sums of the even and of the odd batches.

    Attributes:
        sums: The sums of both halves, by layer name.
        now: Half, 0 or 1, of the current batch.
    """

    def __init__(self, model: nn.Module, layers: list[Layer], batches: list[Batch], halves: Sequence[int]) -> None:
        """Starts at zero for all layers.

        Args:
            model: The model.
            layers: The layers whose curvature is wanted; may be empty.
            batches: All batches, the same in every process.
            halves: Half of each batch, 0 or 1.
        """
        sizes = [num_examples(batch) for batch in batches]
        even, odd = (sum(size for size, own in zip(sizes, halves, strict=True) if own == half) for half in range(2))
        self.num_examples = even, odd
        self.sums = {
            layer.name: tuple(CurvatureSums(layer, modules_of(model, layer), sum(sizes)) for _ in range(2))
            for layer in layers
        }
        self.now = 0

    def add(self, name: str, module: nn.Module, inputs: Tensor, gradient: Tensor) -> None:
        """Adds one call to the half of the current batch; see `CurvatureSums.add`."""
        self.sums[name][self.now].add(module, inputs, gradient)

    def curvature_of(self, name: str) -> dict[str, Any]:
        """Computes the curvature fields of a layer's statistics over all processes, and frees the layer's sums."""
        if name not in self.sums:
            return {}
        even, odd = (half.over_processes() for half in self.sums.pop(name))
        found: dict[str, Any] = {"curvature": even.plus(odd).factors()}
        if all(self.num_examples):
            pairs = zip((even, odd), self.num_examples, strict=True)
            found["halves"] = tuple(half.factors(num_examples) for half, num_examples in pairs)
        return found
