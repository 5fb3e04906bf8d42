"""Many matrices at once: all results, in order, and torch's threads as they were."""

import threading
from collections.abc import Iterable, Iterator

import pytest
import torch
from torch import nn

from hf_lossless.candidates.parallel import for_each_layer
from hf_lossless.storage.layers import Layer


@pytest.fixture(params=[1, 3])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def layers_of(sizes: Iterable[int]) -> list[Layer]:
    return [Layer(f"n{index}", nn.Linear(size, 1), "linear") for index, size in enumerate(sizes)]


def test_results_in_the_order_of_the_layers(num_threads):
    layers = layers_of([3, 9, 1, 9, 20, 2])
    assert list(for_each_layer(lambda layer: layer.name.upper(), iter(layers)).items()) == [
        (layer.name, layer.name.upper()) for layer in layers
    ]
    assert for_each_layer(lambda layer: layer.name, []) == {}
    assert torch.get_num_threads() == num_threads


def test_the_largest_layers_come_first():
    begun = []
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    for_each_layer(lambda layer: begun.append(layer.weight.numel()), layers_of([3, 9, 1, 20]))
    torch.set_num_threads(before)
    assert begun == [20, 9, 3, 1]


def test_as_many_threads_as_torch_has_each_with_one(num_threads):
    together = threading.Barrier(num_threads, timeout=20)

    def work(layer: Layer) -> int:
        together.wait()  # breaks, and so raises, where there are fewer
        return torch.get_num_threads()

    assert set(for_each_layer(work, layers_of(range(1, num_threads + 1))).values()) == {1}
    assert torch.get_num_threads() == num_threads


def test_an_error_comes_through_and_threads_come_back(num_threads):
    def work(layer: Layer) -> str:
        if layer.name == "n1":
            raise ValueError("stop")
        return layer.name

    with pytest.raises(ValueError, match="stop"):
        for_each_layer(work, layers_of([1, 2, 3]))
    assert torch.get_num_threads() == num_threads
