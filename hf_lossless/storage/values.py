"""`StoredLayer`: a layer's plan with the values of its compressed module, exactly as they are saved.

| kind                | values           | what they hold                                             |
|---------------------|------------------|------------------------------------------------------------|
| "grid"              | QuantisedMatrix  | codes, scales and zeros                                    |
| "low_rank", "sum"   | FactoredMatrix   | L and R, each in floating point or on a grid; and the base |
| "coded"             | EncodedMatrix    | codes and steps, and the bytes that they are coded to      |
| "kept"              | None             | the layer stays as it is                                   |

Applying a plan rounds nothing: the values in the model are those that were planned, measured and saved.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_lossless.storage.activation_grid import StaticGrid
from hf_lossless.storage.entropy.matrix import CodedMatrix
from hf_lossless.storage.grid import QuantisedMatrix
from hf_lossless.storage.plan import LayerPlan


@dataclass(frozen=True)
class FactoredMatrix:
    """A matrix as two factors, with an optional grid that is added to their product: `L [out, r] @ R [r, in] + base`.

    Attributes:
        left: L, on a grid or in the layer's dtype.
        right: R, the same.
        base: The grid [out, in]; None where there is none.
    """

    left: QuantisedMatrix | Tensor
    right: QuantisedMatrix | Tensor
    base: QuantisedMatrix | None = None

    @property
    def dense(self) -> Tensor:
        """Computes the product, with the base added, float32 [out, in]."""
        left, right = (
            one.dense if isinstance(one, QuantisedMatrix) else one.float() for one in (self.left, self.right)
        )
        product = left @ right
        return product if self.base is None else self.base.dense + product


@dataclass(frozen=True)
class EncodedMatrix:
    """A matrix of entropy-coded whole numbers, decoded and as bytes.

    Attributes:
        matrix: Codes and steps.
        stored: The bytes from `entropy.matrix.encode`, uint8.
    """

    matrix: CodedMatrix
    stored: NDArray[np.uint8]

    @property
    def dense(self) -> Tensor:
        """Computes the decoded matrix, float32 [out, in]."""
        levels = torch.from_numpy(self.matrix.codes).float()
        levels.view(-1)[torch.from_numpy(self.matrix.far_positions)] = torch.from_numpy(self.matrix.far_codes).float()
        row_steps, column_steps = (torch.from_numpy(one) for one in (self.matrix.row_steps, self.matrix.column_steps))
        return levels.mul_(column_steps).mul_(row_steps[:, None])


@dataclass(frozen=True)
class StoredLayer:
    """A layer's plan, with its values.

    Attributes:
        plan: The layer's plan.
        values: Values of the plan's kind; None: the layer is kept, or its values are loaded from a file later.
        static: Scale and zero point of its input, where the plan gives it a static range.
    """

    plan: LayerPlan
    values: QuantisedMatrix | FactoredMatrix | EncodedMatrix | None = None
    static: StaticGrid | None = None
