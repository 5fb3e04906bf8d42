"""Bias correction: the mean of a layer's output on the calibration rows, and what it takes to be made at all."""

import copy

import pytest
import torch
from rounded_plans import apply_rounded
from tiny_models import TINY_MODELS
from tiny_plans import by_hand
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from hf_lossless import LosslessCompressionConfig, compress
from hf_lossless.calibration.biases import bias_corrections, correct_biases
from hf_lossless.calibration.curvature import KroneckerFactors
from hf_lossless.calibration.statistics import Calibration, LayerStatistics, Moments, calibrate
from hf_lossless.candidates.uniform import on_grid
from hf_lossless.storage.layers import Layer, find_layers
from hf_lossless.storage.modules.base import CompressedModule
from hf_lossless.storage.plan import Grid


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Model(nn.Module):
    """Layers of each kind, on inputs that are far from zero; some without a bias, or with a shared weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.grouped = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 6, 3, groups=3)
        self.conv1d, self.linear = Conv1D(8, 6), nn.Linear(8, 8)
        self.bare, self.embedding = nn.Linear(8, 8, bias=False), nn.Embedding(11, 8)
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.second.weight = self.first.weight
        self.idle = nn.Linear(8, 8)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, ids = batch
        hidden = torch.sigmoid(self.grouped(torch.sigmoid(self.conv(images))))
        hidden = torch.sigmoid(self.conv1d(hidden.flatten(2).mT.contiguous()))
        hidden = torch.sigmoid(self.bare(torch.sigmoid(self.linear(hidden)))).mean(1) + self.embedding(ids)
        return self.head(torch.sigmoid(self.second(torch.sigmoid(self.first(hidden)))))


def loss_of(model: nn.Module, batch: tuple) -> Tensor:
    return F.cross_entropy(model(batch[:2]), batch[2])


def batches_of(number: int = 4, rows: int = 8) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [
        (
            random(rows, 2, 5, 5, seed=seed) + 1,
            torch.randint(0, 11, (rows,), generator=torch.Generator().manual_seed(seed)),
            torch.arange(rows) % 3,
        )
        for seed in range(number)
    ]


def coarse(layer: Layer) -> Tensor:
    return on_grid(layer.matrix, Grid(bits=2)) - layer.matrix.detach().float()


def prepared(number: int = 4, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[Layer], Calibration, list]:
    model = Model().eval().to(dtype)
    batches = [(images.to(dtype), ids, targets) for images, ids, targets in batches_of(number)]
    layers = find_layers(model)
    return model, layers, calibrate(model, batches, layers, loss_of, curvature=True), batches


def outputs_of(model: nn.Module, name: str, inputs: list[Tensor]) -> Tensor:
    """The outputs of one layer on inputs of the original, [positions, out]."""
    module = model.get_submodule(name)
    with torch.no_grad():
        outputs = [module(one) for one in inputs]
    return torch.cat([one.movedim(1, -1).flatten(0, -2) if "conv" == name else one.flatten(0, -2) for one in outputs])


def test_the_mean_output_comes_back():
    """Exactly, over all positions of the calibration rows; of every layer that has a bias of its own."""
    model, layers, calibration, batches = prepared()
    corrections = bias_corrections(model, layers, calibration, coarse)
    assert list(corrections) == ["conv", "conv1d", "linear", "head"]
    twin = copy.deepcopy(model)
    inputs: dict[str, list[Tensor]] = {name: [] for name in corrections}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, arguments, name=name: inputs[name].append(arguments[0])
        )
        for name in corrections
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch[:2])
        for layer in find_layers(twin):
            error = coarse(layer)
            layer.weight.add_(error.T if layer.kind == "conv1d" else error.view(layer.weight.shape))
    for handle in handles:
        handle.remove()
    shifts = {}
    for place in ("rounded", "corrected"):
        if place == "corrected":
            correct_biases(twin, corrections)
        for name, values in inputs.items():
            shift = outputs_of(twin, name, values).mean(0) - outputs_of(model, name, values).mean(0)
            shifts[place, name] = shift.norm().item()
    for name, correction in corrections.items():
        assert correction.shape == model.get_submodule(name).bias.shape
        assert shifts["rounded", name] == pytest.approx(correction.norm().item(), rel=1e-3)
        assert shifts["corrected", name] < 1e-4 * shifts["rounded", name]


def statistics_of(mean: Tensor | None, halves: tuple | None, rows: Tensor) -> LayerStatistics:
    columns = torch.eye(3)
    factors = [
        KroneckerFactors(rows, columns, 1.0, one if one is None else torch.tensor(one))
        for one in (mean, *(halves or ()))
    ]
    return LayerStatistics(
        1, None, Moments(0.0, 1.0, 1), curvature=factors[0], halves=tuple(factors[1:]) if halves else None
    )


ROWS = {"full": torch.eye(2), "diagonal": torch.ones(2)}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    ("halves", "taken"),
    [
        (([1.0, 1.0, 0.0], [1.0, 1.0, 0.0]), True),
        (([1.0, 1.0, 0.0], [1.5, 1.0, 0.0]), True),
        (([1.0, 1.0, 0.0], [-1.0, -1.0, 0.0]), False),
        (([1.0, 1.0, 0.0], [0.1, 0.1, 0.0]), False),  # of a tenth the tenfold is no better than nothing
        (([0.1, 0.1, 0.0], [1.0, 1.0, 0.0]), False),
        (([1.0, 0.0, 0.0], [0.0, 1.0, 0.0]), False),
        (([0.0, 0.0, 0.0], [0.0, 0.0, 0.0]), False),
        (None, False),
    ],
    ids=["same", "near", "opposed", "first-large", "second-large", "across", "zero", "one-batch"],
)
def test_only_where_the_halves_agree(halves, taken, rows):
    model = nn.Sequential(nn.Linear(3, 2))
    whole = [0.5, 0.5, 0.0]
    calibration = Calibration({"0": statistics_of(whole, halves, ROWS[rows])}, 1.0, 8)
    error = torch.tensor([[1.0, 0.5, 9.0], [-0.5, 1.0, 9.0]])
    corrections = bias_corrections(model, find_layers(model), calibration, lambda layer: error)
    if taken:
        torch.testing.assert_close(corrections, {"0": torch.tensor([-0.75, -0.25])})
    else:
        assert corrections == {}


def test_rows_count_as_the_loss_sees_them():
    """The halves agree in the first row and not in the second."""
    model = nn.Sequential(nn.Linear(3, 2))
    error = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    halves = [1.0, 1.0, 0.0], [1.0, -1.0, 0.0]
    for rows, taken in ((torch.tensor([1.9, 0.1]), True), (torch.tensor([0.1, 1.9]), False)):
        for one in (rows, torch.diag(rows)):
            calibration = Calibration({"0": statistics_of([1.0, 0.0, 0.0], halves, one)}, 1.0, 8)
            found = bias_corrections(model, find_layers(model), calibration, lambda layer: error)
            assert ("0" in found) == taken


def test_nothing_without_curvature_or_error():
    model, layers, calibration, batches = prepared()
    assert bias_corrections(model, layers, calibration, lambda layer: torch.zeros(layer.matrix.shape)) == {}
    without = calibrate(model, batches, layers, loss_of)
    assert bias_corrections(model, layers, without, coarse) == {}
    assert bias_corrections(model, [], calibration, coarse) == {}
    _, layers, one_batch, _ = prepared(1)
    assert bias_corrections(model, layers, one_batch, coarse) == {}


def test_the_correction_is_that_of_its_formula():
    model, layers, calibration, _ = prepared()
    for name, correction in bias_corrections(model, layers, calibration, coarse).items():
        [layer] = [layer for layer in layers if layer.name == name]
        torch.testing.assert_close(correction, -coarse(layer) @ calibration.layers[name].curvature.mean_input)
        assert correction.dtype == torch.float32 and not correction.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_biases_in_other_dtypes(dtype):
    model, layers, calibration, _ = prepared(dtype=dtype)
    corrections = bias_corrections(model, layers, calibration, coarse)
    assert {correction.dtype for correction in corrections.values()} == {torch.float32} and corrections
    before = {name: model.get_submodule(name).bias.detach().clone() for name in corrections}
    correct_biases(model, corrections)
    for name, correction in corrections.items():
        bias = model.get_submodule(name).bias
        assert bias.dtype == dtype and bias.requires_grad
        torch.testing.assert_close(bias.detach(), before[name] + correction.to(dtype))


@pytest.mark.parametrize("kind", ["kept", "grid", "low_rank", "sum"])
def test_every_compressed_module_has_a_bias_to_correct(kind):
    model, layers, _, _ = prepared()
    [layer] = [layer for layer in layers if layer.name == "linear"]
    plan, factors = by_hand(layer, kind)
    before = model.linear.bias.detach().clone()
    apply_rounded(model, {"linear": plan}, {} if factors is None else {"linear": factors})
    assert isinstance(model.linear, CompressedModule) == (kind != "kept")
    correct_biases(model, {"linear": torch.arange(8.0)})
    torch.testing.assert_close(model.linear.bias.detach(), before + torch.arange(8.0))


@pytest.mark.parametrize("name", ["bert", "vit", "gpt2", "bert-mlm"])
def test_compress_corrects_the_biases_that_the_halves_confirm(name):
    """And stores them; nothing else that is dense changes."""
    tiny = TINY_MODELS[name]
    model = tiny.build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batches = [tiny.batch(6, seed=seed) for seed in range(4)]
    result = compress(model, batches, LosslessCompressionConfig(ratio=5, bits=(2, 3, 16)))
    after = model.state_dict()
    compressed = {key for key, layer in result.plan.layers.items() if layer.kind != "kept"}
    tied = {key for layer in result.plan.layers.values() for key in layer.tied}
    guards = {f"{key}.weight" for key in compressed}  # empty tensors under the weights' names
    dense = (before.keys() & after.keys()) - guards
    changed = {key for key in dense if not torch.equal(before[key], after[key])}
    assert changed and {key.removesuffix(".bias") for key in changed} <= compressed - tied
    assert all(key.endswith(".bias") for key in changed)
