"""`CompressionPlan`: how every layer of a model is stored, as config.json keeps it.

A plan has one `LayerPlan` for each compressible layer. The knapsack chooses it, `apply` applies it, and config.json
keeps it, so that a checkpoint can be rebuilt without data. This module imports no torch. Every field is validated when
a plan is read, because it comes from a file that anyone may have edited.
"""

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from hf_lossless.errors import PlanError
from hf_lossless.storage.records import Record, read_record

QUANT_METHOD = "hf_lossless"
"""The name of this package's checkpoints in transformers; it is the module that must be imported."""

QUANT_METHODS = (QUANT_METHOD, "lossless")
"""The names that are read: the current one, and that of older checkpoints."""

FORMAT_VERSION = 6
"""Version of the layout on disk; raised whenever older releases cannot read the new layout. Version 2 has low-rank
factors, 3 quantised activations, 4 a certificate, 5 entropy-coded layers, 6 such layers in streams with lanes; folders
of older versions have none of what came later.
"""

STORAGES = ("fixed", "entropy")
"""Kinds of grids: codes of a whole number of bits, and steps shaped by the curvature with entropy-coded codes."""

KEPT_BITS = 16
"""The width that stands for a layer that is kept unchanged, in its own dtype."""

Rounding = Literal["nearest", "down", "up", "feedback"]
Activations = Literal["float", "quantised"]
LayerPlanKind = Literal["kept", "grid", "low_rank", "sum", "coded"]


class Grid(Record):
    """A uniform grid: the levels `scale * (code - zero)`, with code in 0 .. 2^bits - 1.

    Attributes:
        bits: Width of a code, 1 to 8.
        group_size: Consecutive inputs of one output row that share a scale; None: the whole row (per output channel).
        symmetric: True: `zero` is the constant 2^(bits-1) (1 bit: 1/2, so that the two levels are +-scale/2).
            False: one `zero` per group is stored beside the scale.
        rounding: How weights are rounded; "down" and "up" are the directions of LLC Eq. 7, "feedback" is
            `candidates.feedback`, which needs the calibration data.
        scale_dtype: Dtype of scales and zeros; float32 only where float16 would overflow or underflow.
    """

    bits: Annotated[int, Field(ge=1, le=8)]
    group_size: Annotated[int, Field(ge=1)] | None = None
    symmetric: bool = True
    rounding: Rounding = "nearest"
    scale_dtype: Literal["float16", "float32"] = "float16"

    def num_groups(self, in_features: int) -> int:
        """Computes the number of groups in a row of `in_features` weights."""
        return 1 if self.group_size is None else -(-in_features // self.group_size)


class LowRank(Record):
    """Two factors in place of a matrix: `W [out, in] ~ L [out, rank] @ R [rank, in]`.

    Attributes:
        rank: Columns of L and rows of R.
        shape: (out, in).
        left: The grid of L; None: floating point, in the layer's dtype.
        right: The grid of R; None: the same.
        lookup: Whether rows are looked up (an embedding), which takes no multiplications without factors.
    """

    rank: Annotated[int, Field(ge=1)]
    shape: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
    left: Grid | None = None
    right: Grid | None = None
    lookup: bool = False

    @model_validator(mode="after")
    def _rank_fits(self) -> "LowRank":
        if self.rank > min(self.shape):
            raise ValueError(f"rank {self.rank} is above the sides {list(self.shape)} of the matrix")
        return self

    @property
    def numbers_share(self) -> float:
        """Computes the numbers in the factors over those in the matrix: rank (out + in) / (out in)."""
        out_features, in_features = self.shape
        return self.rank * (out_features + in_features) / (out_features * in_features)


class Damping(Record):
    """Dampings of a layer's metric, as shares of its mean diagonals.

    Attributes:
        rows: Damping of the second moments of the output gradients.
        columns: Damping of the second moments of the inputs.
    """

    rows: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    columns: Annotated[float, Field(gt=0, allow_inf_nan=False)]


class CodedGrid(Record):
    """A grid with a step for each row and each column and entropy-coded codes (see `storage.entropy`).

    Attributes:
        step: The number c; the predicted cost of every weight at full rate is c^2 / 24 (see `candidates.shaped`).
        damping: Dampings of the metric that shaped the steps.
        shape: (out, in).
    """

    step: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    damping: Damping
    shape: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]


class ActivationGrid(Record):
    """The grid of a layer's input: asymmetric, with an integer zero point, computed in floating point (see `modules`).

    Attributes:
        bits: Width of a code, 2 to 8.
        range: "static": one range for the tensor, found by calibration and stored. "dynamic": the range of the current
            input, of each position for a linear layer, of each image for a convolution.
    """

    bits: Annotated[int, Field(ge=2, le=8)]
    range: Literal["static", "dynamic"]

    @property
    def stored_bytes(self) -> int:
        """Returns the stored bytes: a float32 scale and a uint8 zero for a static range."""
        return 5 if self.range == "static" else 0


class Regime(Record):
    """Whether LoD's first-order statistics determine the sign of a layer's loss change, or it had to be measured.

    Attributes:
        snr: Signal-to-noise ratio of the first-order change, `sqrt(k) |E[p] E[e]| / sqrt(V)` (LoD A.2.2).
        verdict: "analytic" where the Chebyshev bound is small enough, else "measured".
    """

    snr: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    verdict: Literal["analytic", "measured"]

    @property
    def chebyshev(self) -> float:
        """Computes the Chebyshev bound, 1 / snr^2, at most 1, of the chance that change and mean differ in sign."""
        return 1.0 if self.snr <= 1 else self.snr**-2

    @property
    def central_limit(self) -> float:
        """Computes the same chance for a normally distributed change: Phi(-snr)."""
        return math.erfc(self.snr / math.sqrt(2)) / 2


class LayerPlan(Record):
    """How one layer is stored.

    Attributes:
        kind: "kept": unchanged. "grid": codes on a uniform grid. "low_rank": two factors. "sum": a grid, and two
            factors for the residual. "coded": entropy-coded codes, on a grid shaped by the curvature.
        grid: The grid, for the kinds "grid" and "sum".
        low_rank: The factors, for the kinds "low_rank" and "sum".
        coded: The shaped grid, for the kind "coded".
        activation: The grid of the layer's input; None: it stays in floating point, as a kept or tied layer's does.
        cost_bytes: Bytes of the layer's weight as stored (codes, scales, zeros and factors, or the dense tensor) and of
            a static range of its input.
        predicted_loss_change: Change of the mean loss that the theory predicts, in the loss's own unit (nats).
        regime: LoD's verdict on its prediction; None for other theories.
        tied: Names of other modules that share this weight and are stored with it.
    """

    kind: LayerPlanKind
    grid: Grid | None = None
    low_rank: LowRank | None = None
    coded: CodedGrid | None = None
    activation: ActivationGrid | None = None
    cost_bytes: Annotated[int, Field(ge=0)]
    predicted_loss_change: Annotated[float, Field(allow_inf_nan=False)]
    regime: Regime | None = None
    tied: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _kind_has_its_parts(self) -> "LayerPlan":
        wanted = kind_of_parts(self.grid, self.low_rank, self.coded)
        if self.kind != wanted:
            what = "go with no kind" if wanted is None else f"make the kind {wanted!r}"
            raise ValueError(f"kind {self.kind!r} does not go with its parts, which {what}")
        if self.activation is not None and (self.kind == "kept" or self.tied):
            raise ValueError("the input of a layer that is kept, or tied to others, stays in floating point")
        return self

    @property
    def weight_bytes(self) -> int:
        """Returns the bytes of the weight as stored, without those of its input's range."""
        return self.cost_bytes - (0 if self.activation is None else self.activation.stored_bytes)

    @property
    def multiplications_share(self) -> float | None:
        """Computes the multiplications of the layer's product over those of the dense `W x`.

        `W x` takes out in multiplications, `L (R x)` rank (out + in), and a sum both. None where the dense layer takes
        none, because it looks up rows.
        """
        if self.low_rank is None:
            return 1.0
        if self.low_rank.lookup:
            return None
        return self.low_rank.numbers_share + (self.grid is not None)

    @property
    def bits(self) -> float:
        """Returns the bits of a stored weight, the wider factor's without a grid; `KEPT_BITS` for floating point.

        Of coded weights, it is the average, with everything that is stored beside the codes.
        """
        if self.coded is not None:
            out_features, in_features = self.coded.shape
            return 8 * self.cost_bytes / (out_features * in_features)
        if self.grid is not None:
            return self.grid.bits
        factors = () if self.low_rank is None else (self.low_rank.left, self.low_rank.right)
        return max((KEPT_BITS if factor is None else factor.bits for factor in factors), default=KEPT_BITS)


def kind_of_parts(grid: Grid | None, low_rank: LowRank | None, coded: CodedGrid | None) -> LayerPlanKind | None:
    """Returns the kind of a layer plan with these parts; None where they do not go together."""
    if coded is not None:
        return "coded" if grid is None and low_rank is None else None
    if low_rank is None:
        return "kept" if grid is None else "grid"
    return "low_rank" if grid is None else "sum"


def activations_of(layers: Mapping[str, LayerPlan]) -> Activations:
    """Returns whether a model with these layers has quantised activations."""
    return "quantised" if any(layer.activation is not None for layer in layers.values()) else "float"


class CompressionPlan(Record):
    """How every compressible layer of a model is stored.

    Attributes:
        theory: The theory that predicted the loss changes.
        layers: Layer plans by module name, in the model's own order.
        other_bytes: Bytes of every tensor that no layer plan covers (biases, norms, positions, buffers).
        original_bytes: Bytes of all the original model's tensors in their own dtype, shared ones once.
        activations: Activations at run time: "float": all stay in floating point; "quantised": those of some layers are
            quantised (see `LayerPlan.activation`). It follows from the layers, and is repeated at the top for readers.
        activation_noise: Whether the theory included their quantisation noise anyway when it compared widths.
    """

    theory: str
    layers: dict[str, LayerPlan]
    other_bytes: Annotated[int, Field(ge=0)]
    original_bytes: Annotated[int, Field(ge=0)]
    activations: Activations = "float"
    activation_noise: bool = False

    @model_validator(mode="after")
    def _activations_are_those_of_the_layers(self) -> "CompressionPlan":
        if self.activations != activations_of(self.layers):
            raise ValueError(f"activations {self.activations!r} does not go with the layers")
        return self

    @property
    def tensor_bytes(self) -> int:
        """Computes the bytes of all tensors of the compressed model."""
        return self.other_bytes + sum(layer.cost_bytes for layer in self.layers.values())

    @property
    def predicted_loss_change(self) -> float:
        """Computes the sum of the layers' predicted loss changes (LLC Eq. 9 assumes them independent)."""
        return sum(layer.predicted_loss_change for layer in self.layers.values())

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as JSON values; layers' fields at their default are omitted, to save bytes."""
        return {**self.model_dump(mode="json", exclude_defaults=True), "activations": self.activations}

    @classmethod
    def from_dict(cls, values: Any) -> "CompressionPlan":
        """Reads a plan from JSON values.

        Args:
            values: The result of `to_dict`, possibly read from a JSON file.

        Raises:
            PlanError: A field is missing, unknown, or of the wrong type or range.
        """
        remedy = "Take config.json again from where the checkpoint came from."
        return read_record(cls, values, "the compression plan", PlanError, remedy)


def entry_values(plan: CompressionPlan, certificate: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns the entry "quantization_config" of a checkpoint that this release writes, as JSON values."""
    beside = {} if certificate is None else {"certificate": certificate}
    return {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION, "plan": plan.to_dict(), **beside}


def checkpoint_bytes(plan: CompressionPlan, certificate: dict[str, Any] | None = None) -> int:
    """Computes the bytes of the whole checkpoint that this release writes: tensors, and entry in config.json."""
    return plan.tensor_bytes + json_bytes(entry_values(plan, certificate))


def json_bytes(values: dict[str, Any]) -> int:
    """Computes how many bytes "quantization_config": `values` adds to a config.json that transformers writes."""
    text = json.dumps({"quantization_config": values}, indent=2, sort_keys=True)
    return len(text.encode()) - len("{\n\n}") + len(",\n")
