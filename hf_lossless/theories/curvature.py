"""The curvature theory: the second order of the loss in a layer's Kronecker-factored metric.

    dL ~ 1/2 scale tr(R d C d')

with R and C the second moments of the layer's output gradients and inputs, all from the one calibration pass (see
`calibration.curvature`, which also says how much memory they take at most). No candidate needs a forward pass, so that
many can be compared. Values fitted to the data are judged on other rows: codes (see `fitted_rounding` and
`coded_rounding`) and ranks (see `rank_changes`).

The curvature is the empirical Fisher matrix: it orders layers and candidates well, but it is too small on rows that the
model has memorised (see `calibration.curvature`), and so are the predictions. Therefore a plan's loss is measured, and
the plan is remade where the loss rises by more than predicted (see `planning`).

The first-order term `<g, d>` of the mean gradient g is left out. A trained model's true gradient is near zero, so that
g is mostly the sampling noise of the calibration rows, and a knapsack that chooses among thousands of errors selects
those that this noise favours: with the term, the plans that keep 80 % of the parameters of resnet-fashion-mnist in
low-rank factors raised the loss of 1,500 other rows by 0.27, without it by less than 0.0001 (calibrated on 128 rows;
counting only what exceeds two standard errors of `<g, d>` gave 0.04 and less). LLC and LoD, which are first-order, keep
it.
"""

from torch import Tensor

from hf_lossless.calibration.curvature import second_order_change
from hf_lossless.candidates.grids import Candidate
from hf_lossless.candidates.parallel import for_each_layer
from hf_lossless.candidates.uniform import on_grid
from hf_lossless.storage.layers import Layer
from hf_lossless.storage.plan import CodedGrid, Grid
from hf_lossless.theories.coded_rounding import coded_changes
from hf_lossless.theories.fitted_rounding import feedback_changes
from hf_lossless.theories.problem import Prediction, Problem
from hf_lossless.theories.rank_changes import RankChanges, rounding_change


def predict(problem: Problem) -> dict[str, list[Prediction]]:
    """Predicts the loss change of every candidate, by layer; 0 for keeping a layer. Several layers at a time.

    Args:
        problem: The problem, with curvature in its statistics. Its model and batches are not used.
    """
    by_feedback = feedback_changes(problem)
    of_coded = coded_changes(problem)
    changes = for_each_layer(
        lambda layer: _changes(problem, layer, by_feedback.get(layer.name, {}), of_coded[layer.name]), problem.layers
    )
    return {name: [Prediction(change) for change in group] for name, group in changes.items()}


def _changes(
    problem: Problem, layer: Layer, by_feedback: dict[Grid, float], of_coded: dict[CodedGrid, float]
) -> list[float]:
    statistics = problem.calibration.layers[layer.name]
    assert statistics.curvature is not None
    candidates = problem.candidates[layer.name]
    ranks = RankChanges(statistics)
    changes_of_rank = {
        base: ranks.changes(_factored_matrix(layer, base), largest)
        for base, largest in _largest_ranks(candidates).items()
    }
    changes = []
    for candidate in candidates:
        if candidate.kind == "kept":
            changes.append(0.0)
        elif candidate.coded is not None:
            changes.append(of_coded[candidate.coded])
        elif candidate.kind == "grid" and candidate.grid in by_feedback:
            changes.append(by_feedback[candidate.grid])
        elif candidate.low_rank is None or candidate.factors is None:
            changes.append(second_order_change(candidate.error(layer.matrix), statistics.curvature))
        else:
            of_rank = changes_of_rank[candidate.grid][candidate.low_rank.rank].item()
            changes.append(of_rank + rounding_change(candidate.factors, candidate.low_rank, statistics.curvature))
        problem.advance()
    return changes


def _largest_ranks(candidates: list[Candidate]) -> dict[Grid | None, int]:
    """Finds the largest rank of the factors beside each grid, and of factors without a grid."""
    largest: dict[Grid | None, int] = {}
    for candidate in candidates:
        if candidate.low_rank is not None:
            largest[candidate.grid] = max(candidate.low_rank.rank, largest.get(candidate.grid, 0))
    return largest


def _factored_matrix(layer: Layer, base: Grid | None) -> Tensor:
    """Returns the matrix that the factors approximate: the layer's own, or a grid's remainder."""
    return layer.matrix if base is None else layer.matrix.detach().float() - on_grid(layer.matrix, base)
