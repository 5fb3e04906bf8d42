"""One process and two give the same statistics, predictions and plan."""

import dataclasses
import json

import pytest
import torch
from torch import Tensor, nn
from two_processes import in_two_processes

from hf_lossless import LosslessCompressionConfig, compress
from hf_lossless.data.processes import (
    failing_together,
    max_over_processes,
    own_share,
    process_state,
    same_in_every_process,
    sum_over_processes,
)
from hf_lossless.errors import CalibrationError, DataError
from hf_lossless.storage.layers import find_layers
from hf_lossless.theories.neighbourhood import neighbourhood

SIZES = {"uneven": (6, 1, 4, 4, 2), "one-batch": (5,)}  # batches; with one only, the second process has none


class Model(nn.Module):
    """An embedding, a convolution, layers that share an input, and one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embedding = nn.Embedding(20, 16)
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.left, self.right, self.idle = nn.Linear(128, 48), nn.Linear(128, 48), nn.Linear(48, 48)
        self.head = nn.Linear(48, 3)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.conv(self.embedding(ids).unsqueeze(1)).mean(2).flatten(1)
        return self.head(torch.tanh(self.left(hidden)) * self.right(hidden))


def batches_of(sizes: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randint(0, 20, (rows, 6), generator=generator), torch.randint(0, 3, (rows,), generator=generator))
        for rows in sizes
    ]


def outcome(sizes: tuple[int, ...]) -> dict:
    """Everything that is to agree, JSON-ready."""
    config = LosslessCompressionConfig(
        ratio=3, bits=(2, 3, 4, 8, 16), group_size=8, theory="llc", activation_noise=True
    )
    result = compress(Model(), batches_of(sizes), config)
    return {
        "calibration": dataclasses.asdict(result.calibration),
        "layers": {name: (layer.kind, layer.bits) for name, layer in result.plan.layers.items()},
        "predicted": {name: layer.predicted_loss_change for name, layer in result.plan.layers.items()},
        "size_bytes": result.size_bytes,
        "codes": {name: value.tolist() for name, value in result.model.state_dict().items() if "codes" in name},
    }


class WithNorm(Model):
    """With a norm whose statistics follow what is compressed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(self.conv, nn.BatchNorm2d(8))


def by_default(sizes: tuple[int, ...]) -> dict:
    """The default theory: rounding by feedback, a plan that is checked, biases and norms that follow."""
    config = LosslessCompressionConfig(ratio=3, bits=(2, 3, 4, 8, 16), group_size=8)
    result = compress(WithNorm(), batches_of(sizes), config)
    state = result.model.state_dict()
    return {
        "layers": {name: (layer.kind, repr(layer.grid)) for name, layer in result.plan.layers.items()},
        "predicted": {name: layer.predicted_loss_change for name, layer in result.plan.layers.items()},
        "measured": result.measured_loss_change,
        "batch_losses": result.calibration.batch_losses,
        "codes": {name: value.tolist() for name, value in state.items() if "codes" in name},
        "scales": {name: value.flatten().tolist() for name, value in state.items() if "scales" in name},
        "biases": {name: value.tolist() for name, value in state.items() if "bias" in name or "running" in name},
    }


def activations(sizes: tuple[int, ...]) -> dict:
    """Quantised inputs: what was chosen, and where static levels lie."""
    widths = (None, 3, 4, 8) if len(sizes) > 1 else (3, 4, 8)  # one batch cannot say what feedback costs other rows
    config = LosslessCompressionConfig(
        ratio=3, bits=(2, 3, 4, 8, 16), group_size=8, theory="curvature", activation_bits=widths
    )
    result = compress(Model(), batches_of(sizes), config)
    return {
        "grids": {name: repr(layer.activation) for name, layer in result.plan.layers.items()},
        "levels": {name: value.item() for name, value in result.model.state_dict().items() if "activation" in name},
    }


def gaps(sizes: tuple[int, ...]) -> list[tuple[float, float, float]]:
    """Measured, first and second order of strong noise in every layer's weight and input."""
    model = Model().eval()
    found = neighbourhood(model, batches_of(sizes), find_layers(model), sizes=[0.1])
    responses = [response for layer in found.layers for response in (layer.weight, layer.inputs)]
    return [(gap.measured, gap.first, gap.second) for response in responses if response for gap in response.gaps]


def collectives() -> dict:
    """What the sums and maxima are, and which batches are whose."""
    index = process_state().process_index
    values = torch.tensor([1.0 + index, -3.0 - index, -torch.inf if index else 7.0])
    return {
        "share": [place for place, _ in own_share(["a", "b", "c"])],
        "sum": sum_over_processes(values[:2]).tolist(),
        "max": max_over_processes(values).tolist(),
        "untouched": values.tolist(),
        "batches": same_in_every_process([index, index + 1]),
        "failure": _failure(index),
    }


def _failure(index: int) -> str:
    """What each process is told when only the second one fails."""
    try:
        with failing_together():
            if index == 1:
                raise DataError("a broken row")
    except (DataError, CalibrationError) as error:
        return str(error)
    return ""


def close(expected: dict) -> dict:
    """The same with numbers replaced by comparisons; below 1e-10, as a softmax head's mean gradient, is rounding."""
    if isinstance(expected, dict):
        return {key: close(value) for key, value in expected.items()}
    return pytest.approx(expected, rel=1e-4, abs=1e-10) if isinstance(expected, float) else expected


def everything() -> dict:
    """All of these, in one process of two."""
    return {
        **{name: outcome(sizes) for name, sizes in SIZES.items()},
        "gaps": {name: gaps(sizes) for name, sizes in SIZES.items()},
        "by_default": {name: by_default(sizes) for name, sizes in SIZES.items()},
        "activations": {name: activations(sizes) for name, sizes in SIZES.items()},
        "collectives": collectives(),
    }


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of two processes found."""
    return in_two_processes(everything, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("sizes", SIZES)
def test_two_processes_agree_with_one(two_processes, sizes):
    one = json.loads(json.dumps(outcome(SIZES[sizes])))
    assert len({tuple(choice) for choice in one["layers"].values()}) > 1  # a plan with a choice in it
    assert one["layers"]["idle"] == ["kept", 16]
    for found in two_processes:
        assert found[sizes]["calibration"] == close(one["calibration"])
        assert found[sizes]["layers"] == one["layers"]
        assert found[sizes]["codes"] == one["codes"]
        assert found[sizes]["predicted"] == pytest.approx(one["predicted"], rel=1e-2, abs=1e-6)


@pytest.mark.parametrize("sizes", SIZES)
def test_two_processes_agree_by_default(two_processes, sizes):
    """The very same in both; and as in one process, but for codes on a border, as sums are in another order there."""
    one = json.loads(json.dumps(by_default(SIZES[sizes])))
    assert any("feedback" in grid for _, grid in one["layers"].values())
    first, second = (found["by_default"][sizes] for found in two_processes)
    assert first == second
    assert first["layers"] == one["layers"]
    assert first["predicted"] == pytest.approx(one["predicted"], rel=0.02, abs=1e-8)
    assert first["measured"] == pytest.approx(one["measured"], abs=1e-4)
    assert first["batch_losses"] == pytest.approx(one["batch_losses"], rel=1e-5)
    assert first["biases"].keys() == one["biases"].keys() and "conv.1.running_mean" in first["biases"]
    for name, values in one["biases"].items():
        assert first["biases"][name] == pytest.approx(values, rel=1e-2, abs=1e-3)
    for name, codes in one["codes"].items():
        pairs = list(zip(torch.tensor(codes).flatten(), torch.tensor(first["codes"][name]).flatten(), strict=True))
        assert sum(int(a != b) for a, b in pairs) <= 0.02 * len(pairs) + 1


@pytest.mark.parametrize("sizes", SIZES)
def test_two_processes_quantise_the_same_inputs(two_processes, sizes):
    one = json.loads(json.dumps(activations(SIZES[sizes])))
    wanted = "range='static'" if sizes == "uneven" else "ActivationGrid"
    assert any(wanted in grid for grid in one["grids"].values()) and one["grids"]["embedding"] == "None"
    for found in two_processes:
        assert found["activations"][sizes] == close(one)


@pytest.mark.parametrize("sizes", SIZES)
def test_two_processes_find_the_same_neighbourhood(two_processes, sizes):
    one = gaps(SIZES[sizes])
    assert len(one) == 6 + 4  # the embedding's input is no real number, one layer never runs
    for found in two_processes:
        for gap, expected in zip(found["gaps"][sizes], one, strict=True):
            assert gap == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert two_processes[0]["gaps"] == two_processes[1]["gaps"]


@pytest.mark.parametrize("sizes", SIZES)
def test_both_processes_have_the_very_same_result(two_processes, sizes):
    assert two_processes[0][sizes] == two_processes[1][sizes]


def test_collectives(two_processes):
    first, second = (found["collectives"] for found in two_processes)
    assert (first["share"], second["share"]) == ([0, 2], [1])
    for found in (first, second):
        assert found["sum"] == [3, -7]
        assert found["max"] == [2, -3, 7]
    assert second["untouched"] == [2, -4, -torch.inf]


def test_batches_are_those_of_the_first_process(two_processes):
    """A shuffling loader gives each process its own."""
    assert [found["collectives"]["batches"] for found in two_processes] == [[0, 1], [0, 1]]


def test_an_error_in_one_process_is_raised_in_all(two_processes):
    first, second = (found["collectives"]["failure"] for found in two_processes)
    assert first.startswith("1 other process(es) could not go on")
    assert second == "a broken row"


def test_alone():
    found = collectives()
    assert found["share"] == [0, 1, 2]
    assert found["sum"] == [1, -3] and found["max"] == [1, -3, 7]


def test_fewer_processes_in_accelerate_than_in_torch(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    with pytest.raises(
        CalibrationError, match=r"set up for 1 process\(es\), torch.distributed runs 4.*PartialState\(cpu"
    ):
        own_share([])
