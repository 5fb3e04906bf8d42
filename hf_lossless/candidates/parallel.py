"""Linear algebra on many matrices at once."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")


def for_each(work: Callable[[str], Result], names: Iterable[str]) -> dict[str, Result]:
    """What `work` gives for each name, computed by as many threads as torch uses, each with one core.

    LAPACK gains more from several matrices at a time than from several cores on one, and torch's batched SVD takes one
    after the other: two cores did 8 SVDs of 384 x 384 in 0.109 s this way, in 0.137 s as a batch, and 16 of 64 x 576 in
    0.013 s against 0.047 s.
    """
    names = list(names)
    num_threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(num_threads, initializer=lambda: torch.set_num_threads(1)) as pool:
            return dict(zip(names, pool.map(work, names), strict=True))
    finally:
        torch.set_num_threads(num_threads)
