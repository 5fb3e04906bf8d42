"""Curvature of the even and of the odd calibration batches: what is fitted to one half is judged by the other."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from hf_lossless.calibration.curvature import CurvatureSums
from hf_lossless.data.batches import Batch, num_examples
from hf_lossless.storage.layers import Layer, modules_of


class HalvedCurvature:
    """Curvature sums of the even and of the odd batches.

    Attributes:
        sums: Both, by layer name.
        now: Which of them the present batch belongs to.
    """

    def __init__(self, model: nn.Module, layers: list[Layer], batches: list[Batch], halves: Sequence[int]) -> None:
        """Zeros for these layers.

        Args:
            model: The model.
            layers: The layers whose curvature is wanted; there may be none.
            batches: All batches, the same in every process.
            halves: Of each batch, 0 or 1.
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
        """Adds one call to the present batch's half; see `CurvatureSums.add`."""
        self.sums[name][self.now].add(module, inputs, gradient)

    def curvature_of(self, name: str) -> dict[str, Any]:
        """The fields of a layer's statistics, summed over processes; forgets the sums."""
        if name not in self.sums:
            return {}
        even, odd = (half.over_processes() for half in self.sums.pop(name))
        found: dict[str, Any] = {"curvature": even.plus(odd).factors()}
        if all(self.num_examples):
            pairs = zip((even, odd), self.num_examples, strict=True)
            found["halves"] = tuple(half.factors(num_examples) for half, num_examples in pairs)
        return found
