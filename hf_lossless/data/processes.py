"""Spreads calibration over processes, through Accelerate.

Every process holds the whole model and the same list of batches, takes each `num_processes`-th batch, and the sums are
added up. Batches are dealt out by hand and not by `Accelerator.prepare`, which pads uneven shares with repeated rows
and so biases sums.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, reduce
from torch import Tensor
from tqdm.auto import tqdm

from hf_lossless.data.batches import Batch
from hf_lossless.errors import CalibrationError

Item = TypeVar("Item")


def process_state() -> PartialState:
    """Returns the state of this group of processes; a group of one where none was launched.

    Raises:
        CalibrationError: Accelerate sees fewer processes than torch.distributed, so shares would be counted twice.
    """
    state = PartialState(cpu=not torch.cuda.is_available())
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        world_size = torch.distributed.get_world_size()
        if world_size != state.num_processes:
            raise CalibrationError(
                f"Accelerate was set up for {state.num_processes} process(es), torch.distributed runs {world_size}. "
                "On machines without a GPU create accelerate.PartialState(cpu=True) before anything else."
            )
    return state


def own_share(batches: list[Batch]) -> list[tuple[int, Batch]]:
    """Returns this process's batches, each with its index in the whole list."""
    state = process_state()
    return list(enumerate(batches))[state.process_index :: state.num_processes]


def same_in_every_process(batches: list[Batch]) -> list[Batch]:
    """Sends the first process's batches to all processes.

    A shuffling loader gives each process batches of its own, and the shares would overlap.
    """
    if process_state().num_processes == 1:
        return batches
    shared = [batches]
    broadcast_object_list(shared)
    return shared[0]


def gather_shares(own: list[Item]) -> list[Item]:
    """Gathers the items of all processes, each of which had every `num_processes`-th, in their original order."""
    state = process_state()
    if state.num_processes == 1:
        return own
    tagged = [(state.process_index + position * state.num_processes, item) for position, item in enumerate(own)]
    return [item for _, item in sorted(gather_object(tagged), key=lambda pair: pair[0])]


@contextmanager
def failing_together() -> Iterator[None]:
    """Raises an error of one process in all of them, which would otherwise wait for its sums for ever."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    failures = sum_over_processes(torch.tensor([float(failure is not None)])).item()
    if failure is not None:
        raise failure
    if failures:
        raise CalibrationError(
            f"{failures:.0f} other process(es) could not go on. Mend what their own messages name, and start again."
        )


def sum_over_processes(values: Tensor) -> Tensor:
    """Sums a tensor over all processes; every process gets the sum."""
    state = process_state()
    if state.num_processes == 1:
        return values
    total: Tensor = reduce(values.to(state.device), "sum")
    return total.to(values.device)


def max_over_processes(values: Tensor) -> Tensor:
    """Computes the element-wise maximum over all processes.

    Each process writes its row of a table of zeros, and the table is summed.
    """
    state = process_state()
    table = torch.zeros(state.num_processes, *values.shape, dtype=values.dtype)
    table[state.process_index] = values.clamp(min=torch.finfo(values.dtype).min)
    return sum_over_processes(table).amax(0)


@contextmanager
def progress_bar(total: int, what: str) -> Iterator[Callable[[], object]]:
    """Opens a progress bar that shows the time left, on the main process only."""
    silent = {} if process_state().is_main_process else {"disable": True}  # None would override TQDM_DISABLE
    with tqdm(total=total, desc=what, **silent) as bar:
        yield bar.update
