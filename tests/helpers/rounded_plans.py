"""Rounds the layers of a model to hand-made plans, and puts them in."""

from collections.abc import Mapping

from torch import nn

from hf_lossless.candidates.low_rank import Factors
from hf_lossless.candidates.stored import stored_layer
from hf_lossless.storage.activation_grid import StaticGrid
from hf_lossless.storage.apply import apply, resolve
from hf_lossless.storage.grid import QuantisedMatrix
from hf_lossless.storage.plan import LayerPlan
from hf_lossless.storage.values import EncodedMatrix


def apply_rounded(
    model: nn.Module,
    layer_plans: Mapping[str, LayerPlan],
    factors: Mapping[str, Factors] = {},
    rounded: Mapping[str, QuantisedMatrix | EncodedMatrix] = {},
    static_grids: Mapping[str, StaticGrid] = {},
) -> nn.Module:
    """Carries out plans on real weights, in place."""
    stored = {
        name: stored_layer(
            resolve(model, name, plan),
            plan,
            factors=factors.get(name),
            rounded=rounded.get(name),
            static=static_grids.get(name),
        )
        for name, plan in layer_plans.items()
    }
    return apply(model, stored)
