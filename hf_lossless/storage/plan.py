"""What is decided for every layer, and how it is written down.

A `CompressionPlan` is the whole decision: one `LayerPlan` for each compressible layer. It is what the knapsack
chooses, what `apply` carries out, and what config.json keeps, so that a checkpoint can be rebuilt without data. It
imports no torch. Every field is checked when a plan is read: a plan comes from a file that anyone may have edited.
"""

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from hf_lossless.errors import PlanError
from hf_lossless.storage.records import Record, read_record

QUANT_METHOD = "hf_lossless"
"""What transformers knows this package's checkpoints by: what has to be imported."""

QUANT_METHODS = (QUANT_METHOD, "lossless")
"""And what it knew older ones by."""

FORMAT_VERSION = 6
"""Version of the layout on disk; raised when an older release could not read a newer folder. 2 has low-rank factors, 3
quantised activations, 4 a certificate, 5 entropy-coded layers, 6 such layers in streams with lanes; older folders are
without.
"""

STORAGES = ("fixed", "entropy")
"""Kinds of grids: codes of whole bits, and steps shaped by the curvature with codes stored at their entropy."""

KEPT_BITS = 16
"""The width that stands for "keep this layer as it came, in its own dtype"."""

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
        rounding: How a weight goes to its level; "down" and "up" are the directions of LLC Eq. 7, "feedback" is
            `candidates.feedback`, which needs the calibration data.
        scale_dtype: How scales and zeros are stored; float32 only where float16 would lose them.
    """

    bits: Annotated[int, Field(ge=1, le=8)]
    group_size: Annotated[int, Field(ge=1)] | None = None
    symmetric: bool = True
    rounding: Rounding = "nearest"
    scale_dtype: Literal["float16", "float32"] = "float16"

    def num_groups(self, in_features: int) -> int:
        """Number of groups in a row of `in_features` weights."""
        return 1 if self.group_size is None else -(-in_features // self.group_size)


class LowRank(Record):
    """Two factors in place of a matrix: `W [out, in] ~ L [out, rank] @ R [rank, in]`.

    Attributes:
        rank: Columns of L and rows of R.
        shape: (out, in).
        left: The grid of L; None: in floating point, in the dtype that the layer computes in.
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
        """Numbers in the factors over those in the matrix: rank (out + in) / (out in)."""
        out_features, in_features = self.shape
        return self.rank * (out_features + in_features) / (out_features * in_features)


class Damping(Record):
    """Shares of the mean diagonals of a layer's metric that are added to them.

    Attributes:
        rows: For the second moments of the output gradients.
        columns: For those of the inputs.
    """

    rows: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    columns: Annotated[float, Field(gt=0, allow_inf_nan=False)]


class CodedGrid(Record):
    """A grid with a step for each row and each column, its codes stored at their entropy (see `coding`).

    Attributes:
        step: The number c: at full rate every weight is predicted to cost c^2 / 24 (see `candidates.shaped`).
        damping: Of the metric that shaped the steps.
        shape: (out, in).
    """

    step: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    damping: Damping
    shape: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]


class ActivationGrid(Record):
    """The grid of a layer's input: asymmetric, with a whole zero point, computed in floating point (see `modules`).

    Attributes:
        bits: Width of a code, 2 to 8.
        range: "static": one range for the tensor, found by calibration and stored. "dynamic": that of the values at
            hand, of each position for a linear layer, of each image for a convolution.
    """

    bits: Annotated[int, Field(ge=2, le=8)]
    range: Literal["static", "dynamic"]

    @property
    def stored_bytes(self) -> int:
        """Bytes of what is stored: a float32 scale and a uint8 zero for a static range."""
        return 5 if self.range == "static" else 0


class Regime(Record):
    """Whether LoD's first-order statistics decide the sign of a layer's loss change, or a measurement had to.

    Attributes:
        snr: Signal-to-noise ratio of the first-order change, `sqrt(k) |E[p] E[e]| / sqrt(V)` (LoD A.2.2).
        verdict: "analytic" where the Chebyshev bound is small enough, else "measured".
    """

    snr: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    verdict: Literal["analytic", "measured"]

    @property
    def chebyshev(self) -> float:
        """Bound of the chance that the change has not the sign of its mean: 1 / snr^2, at most 1."""
        return 1.0 if self.snr <= 1 else self.snr**-2

    @property
    def central_limit(self) -> float:
        """The same chance where the change is normal: Phi(-snr)."""
        return math.erfc(self.snr / math.sqrt(2)) / 2


class LayerPlan(Record):
    """How one layer is stored.

    Attributes:
        kind: "kept": as it came. "grid": codes on a uniform grid. "low_rank": two factors. "sum": a grid plus two
            factors for what the grid leaves. "coded": codes at their entropy, on a grid shaped by the curvature.
        grid: The grid, for the kinds "grid" and "sum".
        low_rank: The factors, for the kinds "low_rank" and "sum".
        coded: The shaped grid, for the kind "coded".
        activation: The grid of the layer's input; None: it stays in floating point, as a kept or tied layer's does.
        cost_bytes: Bytes of the layer's weight as stored: codes, scales, zeros and factors, or the dense tensor; and of
            a static range of its input.
        predicted_loss_change: Change of the mean loss that the theory predicts, in the loss's own unit (nats).
        regime: LoD's verdict on what it predicted; None for other theories.
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
        """Bytes of the weight as stored, without those of its input's range."""
        return self.cost_bytes - (0 if self.activation is None else self.activation.stored_bytes)

    @property
    def multiplications_share(self) -> float | None:
        """Multiplications of the layer's product over those of the dense `W x`.

        `W x` is out in, `L (R x)` is rank (out + in), and a sum does both. None where the dense layer has none to save:
        it looks up rows.
        """
        if self.low_rank is None:
            return 1.0
        if self.low_rank.lookup:
            return None
        return self.low_rank.numbers_share + (self.grid is not None)

    @property
    def bits(self) -> float:
        """Width of a stored weight, the wider factor's without a grid; `KEPT_BITS` stands for floating point.

        Of coded weights, what they take on average, all that goes with them included.
        """
        if self.coded is not None:
            out_features, in_features = self.coded.shape
            return 8 * self.cost_bytes / (out_features * in_features)
        if self.grid is not None:
            return self.grid.bits
        factors = () if self.low_rank is None else (self.low_rank.left, self.low_rank.right)
        return max((KEPT_BITS if factor is None else factor.bits for factor in factors), default=KEPT_BITS)


def kind_of_parts(grid: Grid | None, low_rank: LowRank | None, coded: CodedGrid | None) -> LayerPlanKind | None:
    """The kind of a layer plan with these parts; None where they do not go together."""
    if coded is not None:
        return "coded" if grid is None and low_rank is None else None
    if low_rank is None:
        return "kept" if grid is None else "grid"
    return "low_rank" if grid is None else "sum"


def activations_of(layers: Mapping[str, LayerPlan]) -> Activations:
    """What happens to activations in a model with these layers."""
    return "quantised" if any(layer.activation is not None for layer in layers.values()) else "float"


class CompressionPlan(Record):
    """One choice for every compressible layer of a model.

    Attributes:
        theory: What predicted the loss changes.
        layers: Layer plans by module name, in the model's own order.
        other_bytes: Bytes of every tensor that no layer plan covers (biases, norms, positions, buffers).
        original_bytes: Bytes of all the original model's tensors in their own dtype, shared ones once.
        activations: What happens to activations at run time: "float", they stay in floating point; "quantised", those
            of some layers do not (see `LayerPlan.activation`). It is that of the layers, said at the top for a reader.
        activation_noise: Whether the theory counted their quantisation noise all the same when it compared widths.
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
        """Bytes of all tensors of the compressed model."""
        return self.other_bytes + sum(layer.cost_bytes for layer in self.layers.values())

    @property
    def predicted_loss_change(self) -> float:
        """Sum of the layers' predicted loss changes (LLC Eq. 9 takes them as independent)."""
        return sum(layer.predicted_loss_change for layer in self.layers.values())

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready values; layers' fields at their default are left out, for they cost bytes too."""
        return {**self.model_dump(mode="json", exclude_defaults=True), "activations": self.activations}

    @classmethod
    def from_dict(cls, values: Any) -> "CompressionPlan":
        """Reads a plan back.

        Args:
            values: What `to_dict` gave, perhaps by way of a JSON file.

        Raises:
            PlanError: A field is missing, unknown, or of the wrong type or range.
        """
        remedy = "Take config.json again from where the checkpoint came from."
        return read_record(cls, values, "the compression plan", PlanError, remedy)


def entry_values(plan: CompressionPlan, certificate: dict[str, Any] | None = None) -> dict[str, Any]:
    """The entry "quantization_config" of a checkpoint that this release writes, as JSON values."""
    beside = {} if certificate is None else {"certificate": certificate}
    return {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION, "plan": plan.to_dict(), **beside}


def checkpoint_bytes(plan: CompressionPlan, certificate: dict[str, Any] | None = None) -> int:
    """Bytes of the whole checkpoint that this release writes: all tensors, and the entry in config.json."""
    return plan.tensor_bytes + json_bytes(entry_values(plan, certificate))


def json_bytes(values: dict[str, Any]) -> int:
    """Bytes by which `values` lengthen a config.json, as the entry "quantization_config" laid out by transformers."""
    text = json.dumps({"quantization_config": values}, indent=2, sort_keys=True)
    return len(text.encode()) - len("{\n\n}") + len(",\n")
