"""Many matrices at once: all results, in order, and torch's threads as they were."""

import threading
from collections.abc import Iterator

import pytest
import torch

from hf_lossless.candidates.parallel import for_each


@pytest.fixture(params=[1, 3])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_in_the_order_of_names(num_threads):
    names = [f"n{index}" for index in reversed(range(20))]
    assert list(for_each(str.upper, iter(names)).items()) == [(name, name.upper()) for name in names]
    assert for_each(str.upper, []) == {}
    assert torch.get_num_threads() == num_threads


def test_as_many_threads_as_torch_has_each_with_one(num_threads):
    together = threading.Barrier(num_threads, timeout=20)

    def work(name: str) -> int:
        together.wait()  # breaks, and so raises, where there are fewer
        return torch.get_num_threads()

    assert set(for_each(work, map(str, range(num_threads))).values()) == {1}
    assert torch.get_num_threads() == num_threads


def test_an_error_comes_through_and_threads_come_back(num_threads):
    def work(name: str) -> str:
        if name == "b":
            raise ValueError("stop")
        return name

    with pytest.raises(ValueError, match="stop"):
        for_each(work, "abc")
    assert torch.get_num_threads() == num_threads
