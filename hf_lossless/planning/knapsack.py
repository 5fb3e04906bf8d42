"""The grouped knapsack of LLC, solved for every budget at once: the whole Pareto frontier of cost and loss.

Every group i (a layer) takes exactly one of its candidates j, at cost `W[i][j]` (bytes) and loss `P[i][j]`:

    min  sum_i P[i][j_i]    such that    sum_i W[i][j_i] <= C                       (LLC, Eq. 9)

Source: LLC, "Compression for Better", Eq. 9. The method is dynamic programming with dominance (Kellerer, Pferschy &
Pisinger, *Knapsack Problems*, 2004, ch. 11). Write `D[i][w]` for the least loss of the first i groups at cost w:

    D[i][w] = min_j  D[i-1][w - W[i][j]] + P[i][j],    D[0][0] = 0

A plan is dominated when another has at most its cost and its loss, and less of one of the two. The undominated plans
are the frontier; each answers Eq. 9 for a range of budgets C. Costs count from each group's cheapest candidate, in
units of the greatest common divisor of them all, so that w runs over the lattice 0, 1, ..., span.

- Dense, when the lattice has at most 2**18 units: D is one array, each candidate a shifted copy of it. Exact.
- Sparse, otherwise: D is the sorted list of its undominated states, each candidate a shifted copy of that. Exact, and
  mostly far smaller: 41 layers x 5 candidates leave a few thousand states on a lattice of a million.
- Coarse, when that list passes 2**17 states: dense, every cost rounded up to a larger unit. The plans are feasible and
  their exact costs and losses are reported, but better plans may exist: for a budget C the loss is at most the exact
  one at C - groups * unit.

With G groups, K candidates and S lattice units or states, time is O(G K S) dense, O(G K S log K) sparse. Backtracking
keeps, for every group, a byte for each unit reached or nine for each state (one more above 256 candidates): at most
G * 2**17 bytes dense (groups come by rising span, so half the lattice is reached on average), 9 * G * 2**17 sparse.
Scratch is about 60 bytes for each lattice unit, or for each of the K S states that a sparse step merges.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_lossless.errors import ConfigurationError

_MAX_LATTICE = 2**18  # units of the dense way; 1,000 groups x 16 candidates then take about 2 s
_MAX_STATES = 2**17  # states of the sparse way; 1,000 groups x 16 candidates of arbitrary cost give up after about 3 s
_MAX_COST = 2**48  # bytes of a candidate; the sum over 2**15 groups fits int64
_MAX_LOSS = 1e300  # |loss| of a candidate; sums stay finite

_Ints = NDArray[np.int64]
_Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class _Group:
    """The undominated candidates of one group: costs strictly ascending from 0, losses strictly descending."""

    index: int
    cheapest_bytes: int
    extra_bytes: _Ints  # of each candidate, above the cheapest
    loss: _Floats
    caller_index: NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class _Step:
    """The choice of each state in `group`. A state of D is identified by its cost in units."""

    group: _Group
    units: _Ints  # of each candidate, above the cheapest
    choice: NDArray[Any]  # of each state: a candidate
    states: _Ints | None  # ascending; None: 0, 1, 2, ...


_Table = tuple[list[_Step], _Ints, _Floats]  # the steps; the undominated states after the last one; their losses


@dataclass(frozen=True, eq=False)
class Frontier:
    """The undominated plans, from the cheapest to the one of least loss. `len()` is their number.

    Losses are sums of the chosen losses to within rounding: at most `groups * 2**-53` of the sum of their sizes. Of
    plans equal in cost and loss one is kept, the same on every run: among equal candidates of a group the one of lowest
    index is chosen; among equal plans the group with the widest range of costs takes the cheapest candidate it can,
    then the next group.

    Attributes:
        cost_bytes: Cost of each plan, int64 `[points]`, strictly ascending.
        predicted_loss_change: Loss of each plan, float64 `[points]`, strictly descending.
        resolution_bytes: 0: the frontier is exact. Otherwise the unit to which the search rounded costs up
            (`cost_bytes` is not rounded).
    """

    cost_bytes: _Ints
    predicted_loss_change: _Floats
    resolution_bytes: int
    _steps: list[_Step] = field(repr=False)
    _states: _Ints = field(repr=False)  # of each point, after the last step

    def __len__(self) -> int:
        return len(self.cost_bytes)

    def choices(self, point: int) -> NDArray[np.intp]:
        """Returns the candidate of each group in the plan at index `point`, int `[groups]`, by backtracking.

        Args:
            point: Index of a plan, from 0 for the cheapest.
        """
        chosen = np.empty(len(self._steps), np.intp)
        for group, candidate in _backtrack(self._steps, self._states[[point]]):
            chosen[group.index] = group.caller_index[candidate[0]]
        return chosen

    def within_bytes(self, max_bytes: int) -> int | None:
        """Finds the point of least loss that costs at most `max_bytes`; None when even the cheapest costs more."""
        num_affordable = int(np.searchsorted(self.cost_bytes, max_bytes, side="right"))
        return num_affordable - 1 if num_affordable else None

    def within_loss(self, loss_budget: float) -> int | None:
        """Finds the cheapest point that loses at most `loss_budget`; None when even the least loss is more."""
        num_too_lossy = int(np.searchsorted(-self.predicted_loss_change, -loss_budget, side="left"))
        return num_too_lossy if num_too_lossy < len(self) else None


def frontier(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]]) -> Frontier:
    """Solves LLC Eq. 9, one candidate per group at the least total loss, for every budget in one run.

    Args:
        costs: Bytes of each candidate, `[groups][candidates]`, whole, from 0 to 2**48. Groups may differ in their
            number of candidates. Without groups the frontier is one empty plan of cost 0 and loss 0.
        losses: Predicted change of the loss by each candidate, of the same shape; finite, may be negative.

    Returns:
        The frontier, exact when its `resolution_bytes` is 0 (the module's docstring says when).

    Raises:
        ConfigurationError: A group is empty, costs and losses differ in number, or a value is out of range.

    Example:
        >>> plans = frontier(costs=[[4, 2], [8, 4]], losses=[[0.0, 1.0], [0.0, 3.0]])
        >>> plans.cost_bytes.tolist(), plans.predicted_loss_change.tolist()
        ([6, 8, 10, 12], [4.0, 3.0, 1.0, 0.0])
        >>> plans.choices(plans.within_bytes(11)).tolist()  # 10 bytes: 2 and 8
        [1, 0]
    """
    groups = _read_groups(costs, losses)
    groups.sort(key=lambda group: int(group.extra_bytes[-1]))  # keeps the early steps short
    cheapest_bytes = sum(group.cheapest_bytes for group in groups)
    span_bytes = sum(int(group.extra_bytes[-1]) for group in groups)
    unit_bytes = math.gcd(*(extra for group in groups for extra in group.extra_bytes.tolist())) or 1

    table = _dense(groups, unit_bytes) if span_bytes // unit_bytes <= _MAX_LATTICE else _sparse(groups, unit_bytes)
    if table is not None:
        steps, states, loss = table
        return Frontier(cheapest_bytes + states * unit_bytes, loss, 0, steps, states)

    # Coarse: rounding up adds less than a unit per group. A cost above the cheapest rounds to at least one unit, so
    # state 0 is still the cheapest plan.
    unit_bytes = -(-span_bytes // max(1, _MAX_LATTICE - len(groups)))
    steps, states, loss = _dense(groups, unit_bytes)
    cost_bytes = np.full(len(states), cheapest_bytes, np.int64)
    for group, candidate in _backtrack(steps, states):
        cost_bytes += group.extra_bytes[candidate]
    kept = _undominated(cost_bytes, loss)  # rounding may have hidden that one plan dominates another
    return Frontier(cost_bytes[kept], loss[kept], unit_bytes, steps, states[kept])


def _dense(groups: list[_Group], unit_bytes: int) -> _Table:
    """Runs the programme with D as an array over the lattice; costs are rounded up to units."""
    units = [-(-group.extra_bytes // unit_bytes) for group in groups]
    size = 1 + sum(int(u[-1]) for u in units)
    choice_type = np.min_scalar_type(max((len(u) - 1 for u in units), default=0))
    before, after, trial = (np.full(size, np.inf) for _ in range(3))  # D[i-1], D[i], one candidate's D[i]
    is_better, mark = np.empty(size, np.bool_), np.empty(size, choice_type)
    before[0], reach = 0.0, 1
    steps = []
    for group, shifts in zip(groups, units, strict=True):
        new_reach = reach + int(shifts[-1])
        after[:new_reach] = np.inf
        choice = np.zeros(new_reach, choice_type)
        for j, shift in enumerate(shifts.tolist()):
            target, chosen = after[shift : shift + reach], choice[shift : shift + reach]
            np.add(before[:reach], group.loss[j], out=trial[:reach])
            # Where the trial is better, D takes it and the choice becomes j. j exceeds every earlier choice, so the
            # latter is a maximum too: both are vector instructions, ten times as fast as a masked copy.
            np.less(trial[:reach], target, out=is_better[:reach])
            np.minimum(trial[:reach], target, out=target)
            np.multiply(is_better[:reach], choice_type.type(j), out=mark[:reach])
            np.maximum(chosen, mark[:reach], out=chosen)
        steps.append(_Step(group, shifts, choice, states=None))
        before, after, reach = after, before, new_reach
    states = _undominated(np.arange(reach), before[:reach])
    return steps, states, before[states]


def _sparse(groups: list[_Group], unit_bytes: int) -> _Table | None:
    """Runs the programme with D as the list of its undominated states; None when there are more than the limit."""
    states, loss = np.zeros(1, np.int64), np.zeros(1)
    steps = []
    for group in groups:
        units = group.extra_bytes // unit_bytes
        merged_states = (units[:, None] + states).ravel()  # [candidates * states], each candidate's run is sorted
        merged_loss = (group.loss[:, None] + loss).ravel()
        kept = _undominated(merged_states, merged_loss)
        if len(kept) > _MAX_STATES:
            return None
        choice = (kept // len(states)).astype(np.min_scalar_type(len(units) - 1))
        states, loss = merged_states[kept], merged_loss[kept]
        steps.append(_Step(group, units, choice, states))
    return steps, states, loss


def _backtrack(steps: list[_Step], states: _Ints) -> Iterator[tuple[_Group, NDArray[Any]]]:
    """Yields each group with the candidate it has in the plans that end in `states`, last group first."""
    for step in reversed(steps):
        candidate = step.choice[states if step.states is None else np.searchsorted(step.states, states)]
        yield step.group, candidate
        states = states - step.units[candidate]  # undoes the choice


def _undominated(cost: _Ints, loss: _Floats) -> NDArray[np.intp]:
    """Returns the indices of the undominated entries by ascending cost; of equal entries the first."""
    order = np.argsort(cost, kind="stable")  # a timsort: it merges the sorted runs of the sparse way
    least_loss = np.minimum.accumulate(loss[order])
    order = order[np.r_[True, least_loss[1:] < least_loss[:-1]]]  # loses less than all that are cheaper
    return order[np.r_[cost[order[1:]] != cost[order[:-1]], True]]  # of equal cost the last loses least


def _read_groups(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]]) -> list[_Group]:
    """Checks the caller's rows and prunes the dominated candidates of each group."""
    if len(costs) != len(losses):
        raise ConfigurationError(f"{len(costs)} groups of costs but {len(losses)} of losses: give both for every group")
    groups = []
    for i, (cost_row, loss_row) in enumerate(zip(costs, losses, strict=True)):
        if len(cost_row) != len(loss_row):
            raise ConfigurationError(
                f"group {i} has {len(cost_row)} costs but {len(loss_row)} losses: give both for every candidate"
            )
        if len(cost_row) == 0:
            raise ConfigurationError(f"group {i} has no candidates: give it one, or leave the group out")
        for j, (cost, loss) in enumerate(zip(cost_row, loss_row, strict=True)):
            if not isinstance(cost, int | np.integer) or not 0 <= cost <= _MAX_COST:
                raise ConfigurationError(
                    f"group {i}, candidate {j} costs {cost!r}: give a whole number of bytes from 0 to 2**48"
                )
            if not abs(float(loss)) <= _MAX_LOSS:  # also catches nan
                raise ConfigurationError(
                    f"group {i}, candidate {j} has loss {loss!r}: give a finite number (at most 1e300 in size), "
                    "or leave the candidate out"
                )
        cost_bytes, loss_change = np.array(cost_row, np.int64), np.array(loss_row, np.float64)
        kept = _undominated(cost_bytes, loss_change)
        cheapest_bytes = int(cost_bytes[kept[0]])
        groups.append(_Group(i, cheapest_bytes, cost_bytes[kept] - cheapest_bytes, loss_change[kept], kept))
    return groups
