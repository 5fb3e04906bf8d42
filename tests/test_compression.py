"""`compress` on plain modules: targets, honest sizes, errors that leave the model alone."""

import copy
import importlib
import itertools
import re

import pytest
import torch
from round_trips import assert_same_model
from tiny_models import TINY_MODELS
from torch import Tensor, nn

from hf_lossless import LosslessCompressionConfig, compress
from hf_lossless.calibration.statistics import calibrate
from hf_lossless.candidates.grids import propose_grids
from hf_lossless.checkpoints.entry import LosslessCheckpointConfig
from hf_lossless.compression import CompressionResult
from hf_lossless.data.batches import batch_loss
from hf_lossless.errors import (
    CalibrationError,
    ConfigurationError,
    DataError,
    LosslessError,
    UnreachableTargetError,
)
from hf_lossless.storage.layers import Layer, find_layers, tensor_bytes
from hf_lossless.storage.modules.base import CompressedModule
from hf_lossless.storage.plan import KEPT_BITS, CompressionPlan, LayerPlan, json_bytes
from hf_lossless.theories import THEORIES, llc
from hf_lossless.theories.problem import Problem

FEATURES, CLASSES = 32, 4


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(FEATURES, 96), nn.ReLU(), nn.LayerNorm(96), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, CLASSES)
    )


def batches_of(*sizes: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(rows, FEATURES, generator=generator), torch.randint(0, CLASSES, (rows,), generator=generator))
        for rows in sizes
    ]


BATCHES = batches_of(8, 5)


def stored_bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model: nn.Module, state: dict[str, Tensor]) -> None:
    assert not any(isinstance(module, CompressedModule) for module in model.modules())
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def assert_honest(result: CompressionResult, original_bytes: int) -> None:
    """Sizes are those of the tensors and of the plan as written."""
    entry = LosslessCheckpointConfig.of(result.plan).to_dict()
    assert result.plan.original_bytes == original_bytes
    assert result.plan.tensor_bytes == tensor_bytes(result.model) == stored_bytes(result.model)
    assert result.size_bytes == stored_bytes(result.model) + json_bytes(entry)
    assert result.ratio == original_bytes / result.size_bytes


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"group_size": None},
        {"group_size": 24, "symmetric": False},
        {"bits": (1, 5, 16), "activation_noise": True, "theory": "llc"},
        {"bits": (3,)},
    ],
    ids=lambda settings: "-".join(settings) or "default",
)
@pytest.mark.parametrize("ratio", [1.5, 2.5, 3.5])
def test_ratio(ratio, settings):
    model = network()
    original_bytes = stored_bytes(model)
    result = compress(model, BATCHES, LosslessCompressionConfig(ratio=ratio, **settings))
    assert_honest(result, original_bytes)
    assert result.ratio >= ratio
    assert result.size_bytes <= original_bytes / ratio
    assert torch.isfinite(result.model(BATCHES[0][0])).all()


@pytest.mark.parametrize("max_bytes", [12_000, 20_000, 30_000, 10**9])
def test_max_bytes(max_bytes):
    model = network()
    original_bytes = stored_bytes(model)
    result = compress(model, BATCHES, LosslessCompressionConfig(max_bytes=max_bytes))
    assert_honest(result, original_bytes)
    assert result.size_bytes <= max_bytes
    if max_bytes == 10**9:
        assert {layer.kind for layer in result.plan.layers.values()} <= {"kept", "grid"}
        assert result.plan.predicted_loss_change == result.frontier.predicted_loss_change[-1]


def every_plan(bits: tuple[int, ...]) -> list[CompressionPlan]:
    """All combinations of widths of the network's layers."""
    model = network().eval()
    layers = find_layers(model)
    calibration = calibrate(model, BATCHES, layers, batch_loss)
    candidates = {layer.name: propose_grids(layer, calibration.layers[layer.name], bits, 16, True) for layer in layers}
    predictions = llc.predict(Problem(model, BATCHES, batch_loss, layers, calibration, candidates))
    groups = []
    for name, group in candidates.items():
        rows = []
        for candidate, change in zip(group, predictions[name], strict=True):
            kind = "kept" if candidate.grid is None else "grid"
            change = float(f"{change.loss_change:.4g}")
            cost = candidate.cost_bytes
            rows.append(LayerPlan(kind=kind, grid=candidate.grid, cost_bytes=cost, predicted_loss_change=change))
        groups.append(rows)
    weights = sum(layer.weight.nbytes for layer in layers)
    sizes = {"other_bytes": stored_bytes(model) - weights, "original_bytes": stored_bytes(model)}
    return [
        CompressionPlan(theory="llc", layers=dict(zip(candidates, choice, strict=True)), **sizes)
        for choice in itertools.product(*groups)
    ]


def test_the_plan_is_the_best_of_all_that_fit():
    bits = (2, 4, 8, 16)
    plans = [(LosslessCheckpointConfig.of(plan).size_bytes, plan) for plan in every_plan(bits)]
    assert len(plans) == 4**3
    for max_bytes in (8_000, 9_500, 12_000, 16_000, 25_000):
        config = LosslessCompressionConfig(max_bytes=max_bytes, bits=bits, group_size=16, theory="llc")
        result = compress(network(), BATCHES, config)
        best = min(plan.predicted_loss_change for size, plan in plans if size <= max_bytes)
        assert result.plan.predicted_loss_change == pytest.approx(best, rel=1e-9)
        assert result.plan in [plan for _, plan in plans]
    for loss_budget in (1e-4, 1e-3, 1e-2, 0.1):
        config = LosslessCompressionConfig(loss_budget=loss_budget, bits=bits, group_size=16, theory="llc")
        smallest = min(plan.tensor_bytes for _, plan in plans if plan.predicted_loss_change <= loss_budget)
        assert compress(network(), BATCHES, config).plan.tensor_bytes == smallest


def test_loss_budget():
    model = network()
    original_bytes = stored_bytes(model)
    sizes = []
    for budget in (1e-5, 0.05, 1e6):
        result = compress(copy.deepcopy(model), BATCHES, LosslessCompressionConfig(loss_budget=budget))
        assert_honest(result, original_bytes)
        assert result.plan.predicted_loss_change <= budget
        sizes.append(result.plan.tensor_bytes)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == result.frontier.cost_bytes[0] + result.plan.other_bytes


def test_more_bytes_never_predict_more_loss():
    losses = [
        compress(network(), BATCHES, LosslessCompressionConfig(max_bytes=limit)).plan.predicted_loss_change
        for limit in (10_000, 14_000, 20_000, 40_000)
    ]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("settings", [{}, {"theory": "llc", "activation_noise": True}], ids=["default", "llc"])
def test_result_fields(settings):
    model = network().train()
    config = LosslessCompressionConfig(ratio=3, bits=(2, 4, 8, 16), group_size=16, **settings)
    result = compress(model, iter(BATCHES), config)
    assert result.model is model and not model.training
    plan = result.plan
    assert plan.theory == settings.get("theory", "curvature") and plan.activations == "float"
    assert plan.activation_noise == settings.get("activation_noise", False)
    assert list(plan.layers) == ["0", "3", "5"] == list(result.calibration.layers)
    for name, layer in plan.layers.items():
        module = model.get_submodule(name)
        assert layer.bits in (2, 4, 8, KEPT_BITS)
        assert isinstance(module, CompressedModule) == (layer.kind == "grid")
        if layer.grid is not None:
            assert layer.grid.group_size == 16 and layer.grid.symmetric
            assert layer.cost_bytes == module.codes.nbytes + module.scales.nbytes
        else:
            assert layer.cost_bytes == module.weight.nbytes
    reference = network().eval()
    assert result.calibration.num_examples == 13
    losses = [batch_loss(reference, batch).item() for batch in BATCHES]
    assert result.calibration.loss == pytest.approx((8 * losses[0] + 5 * losses[1]) / 13)
    untouched = [name for name, _ in model.named_parameters()]
    assert untouched == ["0.bias", "2.weight", "2.bias", "3.bias", "5.bias"]


def test_the_frontier_falls_and_holds_the_plan():
    result = compress(network(), BATCHES, LosslessCompressionConfig(ratio=3))
    points = list(zip(result.frontier.cost_bytes, result.frontier.predicted_loss_change, strict=True))
    for (cost, loss), (more_cost, less_loss) in itertools.pairwise(points):
        assert more_cost > cost and less_loss < loss
    chosen = (result.plan.tensor_bytes - result.plan.other_bytes, result.plan.predicted_loss_change)
    assert any(cost == chosen[0] and loss == pytest.approx(chosen[1]) for cost, loss in points)


@pytest.mark.parametrize("settings", [{}, {"theory": "llc", "activation_noise": True}], ids=["default", "llc"])
def test_the_same_seed_gives_the_same_plan(settings):
    plans = [
        compress(network(), BATCHES, LosslessCompressionConfig(ratio=3, seed=seed, **settings)).plan
        for seed in (0, 0, 1)
    ]
    assert plans[0] == plans[1]
    assert plans[0] != plans[2] or not settings  # the default draws rows of larger layers only


def test_compressing_under_no_grad():
    with torch.no_grad():
        inside = compress(network(), BATCHES, LosslessCompressionConfig(ratio=3))
    assert inside.plan == compress(network(), BATCHES, LosslessCompressionConfig(ratio=3)).plan


def test_half_precision_counts_its_own_bytes():
    model = network().to(torch.bfloat16)
    batches = [(inputs.to(torch.bfloat16), targets) for inputs, targets in BATCHES]
    original_bytes = stored_bytes(model)
    result = compress(model, batches, LosslessCompressionConfig(ratio=2))
    assert_honest(result, original_bytes)
    assert original_bytes * 2 == stored_bytes(network()) and result.ratio >= 2
    assert result.model(batches[0][0]).dtype == torch.bfloat16


def test_eight_bits_keep_the_outputs():
    model, inputs = network().eval(), BATCHES[0][0]
    outputs = model(inputs).detach()
    compress(model, BATCHES, LosslessCompressionConfig(ratio=2.5, bits=(8,)))
    assert (model(inputs) - outputs).norm() < 0.02 * outputs.norm()


def test_modules_to_not_convert():
    model = network()
    result = compress(model, BATCHES, LosslessCompressionConfig(ratio=2, modules_to_not_convert=["5"]))
    assert list(result.plan.layers) == ["0", "3"] and type(model[5]) is nn.Linear
    assert_honest(result, stored_bytes(network()))


def test_keep_head():
    class WithHead(nn.Module):
        """With what every Hugging Face model has: `base_model`, all of it but the head."""

        @property
        def base_model(self) -> nn.Module:
            return self.body

        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = network()[:4], nn.Linear(64, CLASSES)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.head(self.body(inputs))

    result = compress(WithHead(), BATCHES, LosslessCompressionConfig(ratio=2, keep_head=True))
    assert list(result.plan.layers) == ["body.0", "body.3"]
    message = "keep_head=True, but Sequential does not say which part of it is the base model. Name the head in"
    with pytest.raises(ConfigurationError, match=message):
        compress(network(), BATCHES, LosslessCompressionConfig(ratio=2, keep_head=True))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.body, self.head = nn.Embedding(60, 48), nn.Linear(48, 48), nn.Linear(48, 60)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embedding(ids).mean(1))))


def test_a_tied_weight_is_stored_and_counted_once():
    model = Tied()
    batch = (torch.randint(0, 60, (6, 3)), torch.randint(0, 60, (6,)))
    original_bytes = 4 * (60 * 48 + 48 * 48 + 48 + 60)
    result = compress(model, [batch], LosslessCompressionConfig(ratio=4, bits=(2, 3, 4)))
    assert_honest(result, original_bytes)
    assert result.plan.layers["embedding"].tied == ("head",)
    torch.testing.assert_close(model.head.weight, model.embedding.weight)


def test_a_layer_that_never_runs_is_kept():
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = network(), nn.Linear(8, 8)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.used(inputs)

    plan = compress(Idle(), BATCHES, LosslessCompressionConfig(ratio=3, bits=(2, 4))).plan
    assert plan.layers["idle"].kind == "kept" and plan.layers["idle"].predicted_loss_change == 0
    assert {layer.bits for name, layer in plan.layers.items() if name != "idle"} <= {2, 4}


def test_a_loss_of_ones_own():
    """An autoencoder: the batch is one tensor."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, 48), nn.Tanh(), nn.Linear(48, FEATURES))
    data = [torch.randn(6, FEATURES), torch.randn(2, FEATURES)]

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return (model(batch) - batch).square().mean()

    expected = loss(model, torch.cat(data)).item()
    result = compress(model, data, LosslessCompressionConfig(ratio=2.5), loss=loss)
    assert result.calibration.loss == pytest.approx(expected, rel=1e-6)
    assert result.calibration.num_examples == 8
    assert result.ratio >= 2.5


# Low rank.


def make_low_rank(layer: Layer, rank: int) -> None:
    """Draws a weight of this rank and of the same size, all its singular values alike."""
    out_features, in_features = layer.matrix.shape
    left, _ = torch.linalg.qr(torch.randn(out_features, rank, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(in_features, rank, dtype=torch.float64))
    size = layer.weight.detach().double().norm() / rank**0.5
    matrix = (size * left @ right.T).to(layer.weight.dtype)
    layer.weight.data = matrix.T.contiguous() if layer.kind == "conv1d" else matrix.view(layer.weight.shape)


class Deficient(nn.Module):
    """Layers of rank 5: linear, convolution, embedding; each full-rank one is small."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.conv = nn.Embedding(96, 64), nn.Conv2d(4, 24, 3, padding=1)
        self.linear, self.head = nn.Linear(96, 64), nn.Linear(88, CLASSES)
        self.to(dtype)
        for layer in find_layers(self):
            if layer.name != "head":
                make_low_rank(layer, 5)

    def forward(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        ids, images, features = batch
        embedded = self.embedding(ids).mean(1) + torch.tanh(self.linear(features))
        return self.head(torch.cat([embedded, torch.relu(self.conv(images)).mean((2, 3))], dim=1))


def deficient_batches() -> list[tuple]:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for rows in (24, 8):
        ids = torch.randint(0, 96, (rows, 7), generator=generator)
        images = torch.randn(rows, 4, 6, 6, generator=generator)
        features, targets = torch.randn(rows, 96, generator=generator), torch.arange(rows) % CLASSES
        batches.append(((ids, images, features), targets))
    return batches


def deficient_loss(model: nn.Module, batch: tuple) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]).float(), batch[1])


FACTORED = ("embedding", "conv", "linear")


@pytest.mark.parametrize(
    ("theory", "bits"),
    # LoD may find that 2 bits lower the loss of so few rows, and is right to take them then. CET and HAWQ see no or
    # negative curvature in some directions, in which a rank below the true one costs nothing.
    [
        *((theory, (16,)) for theory in ("llc", "lod", "curvature")),
        ("llc", (2, 3, 4, 8)),
        ("curvature", (2, 3, 4, 8)),
        ("lod", (8,)),
    ],
    ids=str,
)
def test_layers_of_rank_five_are_found_and_stored_so(theory, bits):
    model, batches = Deficient().eval(), deficient_batches()
    with torch.no_grad():
        outputs = model(batches[0][0])
    original_bytes = stored_bytes(model)
    budget = 1e-8 if theory == "curvature" else 1e-5  # what is measured carries the rounding of float32 losses
    config = LosslessCompressionConfig(
        loss_budget=budget, theory=theory, bits=bits, ranks="auto", modules_to_not_convert=["head"]
    )
    result = compress(model, batches, config, loss=deficient_loss)
    assert_honest(result, original_bytes)
    for name in FACTORED:
        layer = result.plan.layers[name]
        assert layer.kind == "low_rank" and layer.low_rank.rank == 5, (name, layer)
        assert layer.low_rank.shape == tuple(find_layers(Deficient())[list(FACTORED).index(name)].matrix.shape)
        assert layer.low_rank.numbers_share < 1
        assert (layer.multiplications_share is None) == (name == "embedding") == layer.low_rank.lookup
        if layer.bits == 16:
            assert layer.cost_bytes == 4 * 5 * sum(layer.low_rank.shape)
    if bits == (16,):
        assert result.ratio > 3
        assert {layer.bits for layer in result.plan.layers.values()} == {16}
        with torch.no_grad():
            torch.testing.assert_close(model(batches[0][0]), outputs, rtol=1e-4, atol=1e-5)
    assert all(layer.gradient is layer.curvature is None for layer in result.calibration.layers.values())


@pytest.mark.parametrize("theory", THEORIES)
def test_without_ranks_nothing_is_factorised(theory):
    config = LosslessCompressionConfig(ratio=4, theory=theory, modules_to_not_convert=["head"])
    result = compress(Deficient(), deficient_batches(), config, loss=deficient_loss)
    assert {layer.kind for layer in result.plan.layers.values()} <= {"grid", "kept"}


@pytest.mark.parametrize("theory", THEORIES)
def test_ranks_never_predict_more_loss_for_the_same_bytes(theory):
    """What is added to a menu can only help, by the theory's own word."""
    frontiers = []
    for ranks in (None, "auto"):
        config = LosslessCompressionConfig(max_bytes=9000, theory=theory, ranks=ranks)
        result = compress(Deficient(), deficient_batches(), config, loss=deficient_loss)
        assert_honest(result, stored_bytes(Deficient()))
        points = zip(result.frontier.cost_bytes.tolist(), result.frontier.predicted_loss_change.tolist(), strict=True)
        frontiers.append(list(points))
    for cost, loss in frontiers[0]:
        assert min(other for other_cost, other in frontiers[1] if other_cost <= cost) <= loss + 1e-9


@pytest.mark.parametrize("theory", THEORIES)
def test_ranks_by_layer(theory):
    model, batches = Deficient(), deficient_batches()
    config = LosslessCompressionConfig(loss_budget=1e9, theory=theory, bits=(16,), ranks={"linear": (5,), "conv": 5})
    result = compress(model, batches, config, loss=deficient_loss)
    ranks = {name: layer.low_rank and layer.low_rank.rank for name, layer in result.plan.layers.items()}
    assert ranks == {"embedding": None, "conv": 5, "linear": 5, "head": None}
    assert_honest(result, stored_bytes(Deficient()))


@pytest.mark.parametrize("theory", THEORIES)
def test_a_rank_above_the_numerical_one_leaves_the_model_alone(theory):
    config = LosslessCompressionConfig(ratio=2, theory=theory, ranks={"linear": (4, 6)})
    model = Deficient()
    state = state_of(model)
    message = r"layer 'linear' \[64, 96\] the rank 6, but its matrix has the numerical rank 5, so that rank 5 holds"
    with pytest.raises(ConfigurationError, match=message):
        compress(model, deficient_batches(), config, loss=deficient_loss)
    assert_unchanged(model, state)


@pytest.mark.parametrize("theory", THEORIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_ranks_in_other_precisions(theory, dtype):
    model = Deficient(dtype)
    batches = [
        ((ids, images.to(dtype), features.to(dtype)), targets)
        for (ids, images, features), targets in deficient_batches()
    ]
    original_bytes = stored_bytes(model)
    with torch.no_grad():
        outputs = model(batches[0][0])
    config = LosslessCompressionConfig(
        loss_budget=1.0,
        theory=theory,
        bits=(16,),
        ranks=dict.fromkeys(("conv", "linear"), 5),
        modules_to_not_convert=["head", "embedding"],  # in bfloat16 its large weights round by more than LoD's tau
    )
    result = compress(model, batches, config, loss=deficient_loss)
    assert_honest(result, original_bytes)
    assert {layer.low_rank and layer.low_rank.rank for layer in result.plan.layers.values()} == {5}
    with torch.no_grad():
        close = 1e-5 if dtype == torch.float64 else 0.05  # factors are computed in float32
        torch.testing.assert_close(model(batches[0][0]), outputs, rtol=close, atol=close)


def test_the_same_plan_whatever_the_number_of_threads():
    plans, before = [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            config = LosslessCompressionConfig(ratio=5, ranks="auto", theory="lod")
            plans.append(compress(Deficient(), deficient_batches(), config, loss=deficient_loss).plan)
    finally:
        torch.set_num_threads(before)
    assert [layer.low_rank for layer in plans[0].layers.values()] == [
        layer.low_rank for layer in plans[1].layers.values()
    ]


@pytest.mark.parametrize("theory", THEORIES)
@pytest.mark.parametrize("name", ["bert", "vit", "resnet", "gpt2"])
def test_factors_come_back_bit_for_bit(name, theory, tmp_path):
    tiny = TINY_MODELS[name]
    original = tiny.build()
    for layer in find_layers(original):
        if min(layer.matrix.shape) > 8:
            make_low_rank(layer, 3)
    original.save_pretrained(tmp_path / "model")
    config = LosslessCompressionConfig(
        [tiny.batch(6), tiny.batch(3, seed=5)], loss_budget=1e-3, bits=(16,), theory=theory, ranks="auto"
    )
    model = tiny.auto_class.from_pretrained(tmp_path / "model", quantization_config=config)
    result = model.hf_quantizer.result
    factored = [name for name, layer in result.plan.layers.items() if layer.low_rank is not None]
    assert len(factored) >= 3
    model.save_pretrained(tmp_path / "small")
    again = tiny.auto_class.from_pretrained(tmp_path / "small")
    assert again.config.quantization_config.plan == result.plan
    assert_same_model(again, model, tiny.inputs())


# Errors leave the model as it was.


def refused(model: nn.Module, batches, config: LosslessCompressionConfig, error: type[LosslessError], message: str):
    state = state_of(model)
    with pytest.raises(error, match=message) as caught:
        compress(model, batches, config)
    assert_unchanged(model, state)
    return str(caught.value)


@pytest.mark.parametrize("theory", ["llc", "curvature"])
def test_an_unreachable_ratio_says_what_can_be_reached(theory):
    config = LosslessCompressionConfig(ratio=50, theory=theory)
    message = refused(network(), BATCHES, config, UnreachableTargetError, "ratio=50 cannot be reached: ")
    found = re.search(r"smallest plan takes (\d+) bytes of the original's (\d+), a ratio of (\d+\.\d+)\. Ask", message)
    smallest, original, ratio = int(found[1]), int(found[2]), float(found[3])
    assert original == stored_bytes(network()) and ratio == pytest.approx(original / smallest, abs=0.01)
    assert "add narrower widths than bits=(2, 3, 4, 8, 16)" in message
    reached = compress(network(), BATCHES, LosslessCompressionConfig(max_bytes=smallest, theory=theory))
    # A few more bytes of codes may need a shorter text ("feedback" is 31 of them).
    assert reached.size_bytes == smallest if theory == "llc" else 0 <= smallest - reached.size_bytes < 31
    limit = reached.size_bytes - 1
    config = LosslessCompressionConfig(max_bytes=limit, theory=theory)
    message = refused(network(), BATCHES, config, UnreachableTargetError, "cannot be")
    taken = f"the smallest plan takes {reached.size_bytes} bytes"
    assert message.startswith(f"max_bytes={limit} cannot be reached: {taken}")


def test_an_unreachable_loss_says_what_can_be_reached():
    config = LosslessCompressionConfig(loss_budget=1e-9, bits=(1,))
    message = refused(
        network(), BATCHES, config, UnreachableTargetError, r"loss_budget=1e-09 cannot be met: the least predicted"
    )
    least = float(re.search(r"bits=\(1,\) is (\S+)\. Allow more, or add wider widths \(16 keeps", message)[1])
    compress(network(), BATCHES, LosslessCompressionConfig(loss_budget=least * 1.001, bits=(1,)))


def test_no_batches():
    refused(network(), [], LosslessCompressionConfig(ratio=2), DataError, "no calibration batches. Give at least one")


def test_compressed_already():
    model = network()
    compress(model, BATCHES, LosslessCompressionConfig(ratio=3))
    state = state_of(model)
    message = "this Sequential is compressed already. Load the original checkpoint and compress that"
    with pytest.raises(ConfigurationError, match=message):
        compress(model, BATCHES, LosslessCompressionConfig(ratio=4))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_nothing_to_compress():
    config = LosslessCompressionConfig(ratio=2)
    refused(nn.Sequential(nn.LayerNorm(FEATURES)), BATCHES, config, ConfigurationError, "Sequential has no layer that")
    config = LosslessCompressionConfig(ratio=2, modules_to_not_convert=["*"])
    refused(network(), BATCHES, config, ConfigurationError, "beside modules_to_not_convert. Leave fewer modules out")


def test_an_exclusion_that_matches_nothing():
    config = LosslessCompressionConfig(ratio=2, modules_to_not_convert=["pooler"])
    refused(network(), BATCHES, config, ConfigurationError, "modules_to_not_convert names 'pooler', but the model")


def test_a_broken_batch():
    broken = (torch.full((2, FEATURES), torch.nan), torch.tensor([0, 1]))
    config = LosslessCompressionConfig(ratio=2)
    refused(network(), [*BATCHES, broken], config, CalibrationError, "loss of calibration batch 3 of 3 is nan")


def test_weights_that_cannot_be_calibrated():
    config = LosslessCompressionConfig(ratio=2)
    with torch.device("meta"):
        offloaded = network()
    with pytest.raises(ConfigurationError, match=r"layer '0' is offloaded, so .* Put the whole model on its devices"):
        compress(offloaded, BATCHES, config)
    with torch.inference_mode():
        frozen = network()
    with pytest.raises(ConfigurationError, match=r"layer '0' is an inference tensor, .* outside of torch.inference_m"):
        compress(frozen, BATCHES, config)


def test_a_bias_that_is_a_buffer_leaves_its_layer_alone():
    model = network()
    bias = model[3].bias.detach().clone()
    del model[3].bias
    model[3].register_buffer("bias", bias)
    result = compress(model, BATCHES, LosslessCompressionConfig(max_bytes=stored_bytes(network()) * 9 // 10))
    assert "3" not in result.plan.layers and type(model[3]) is nn.Linear


@pytest.mark.parametrize("theory", THEORIES)
def test_a_broken_weight(theory):
    model = network()
    model[3].weight.data[0, 0] = torch.inf
    model[3].weight.data[1:] = 0
    batches = [(inputs, torch.zeros_like(targets)) for inputs, targets in BATCHES]

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return model[0](batch[0]).square().mean() + 0 * model[5](torch.zeros(1, 64)).sum()

    with pytest.raises(CalibrationError, match="the weight of layer '3' holds NaN or infinity"):
        # A layer that does not run cannot break the loss, but is refused all the same.
        compress(model, batches, LosslessCompressionConfig(ratio=2, theory=theory), loss=loss)
    assert not any(isinstance(module, CompressedModule) for module in model.modules())


@pytest.mark.parametrize("theory", THEORIES)
def test_an_error_while_predicting_leaves_the_model_alone(theory, monkeypatch):
    def fail(*arguments: object) -> None:
        raise CalibrationError("stop")

    monkeypatch.setattr(importlib.import_module(f"hf_lossless.theories.{theory}"), "predict", fail)
    refused(network(), BATCHES, LosslessCompressionConfig(ratio=2, theory=theory), CalibrationError, "stop")


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"3": 39}, r"layer '3' \[64, 96\] the rank 39, .* only below N M / \(N \+ M\) = 38\.4\. Give ranks from 1"),
        ({"5": 4}, r"layer '5' \[4, 64\] the rank 4, .* Give ranks from 1 to 3"),
        ({"7": 1}, r"ranks names '7', but no layer that is to be compressed has such a name"),
    ],
)
@pytest.mark.parametrize("theory", THEORIES)
def test_bad_ranks(ranks, message, theory):
    config = LosslessCompressionConfig(ratio=2, ranks=ranks, theory=theory)
    refused(network(), BATCHES, config, ConfigurationError, message)


@pytest.mark.parametrize(("theory", "call"), [("llc", 6), ("curvature", 3), ("curvature", 4)], ids=str)
def test_an_error_of_the_loss_under_noise_leaves_the_model_alone(theory, call):
    model, calls = network(), []
    state = state_of(model)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        calls.append(1)
        if len(calls) == call:  # after calibration, with noise in the weights, or the weights as planned
            raise RuntimeError("stop")
        return batch_loss(model, batch)

    with pytest.raises(RuntimeError, match="stop"):
        compress(model, BATCHES, LosslessCompressionConfig(ratio=2, theory=theory), loss=loss)
    assert_unchanged(model, state)


def test_tensor_bytes():
    assert tensor_bytes(nn.Linear(3, 4)) == 4 * (12 + 4)
    assert tensor_bytes(nn.BatchNorm1d(5)) == 4 * 5 * 4 + 8  # weight, bias, mean, variance, and a counter of 8 bytes
    assert tensor_bytes(Tied()) == 4 * (60 * 48 + 48 * 48 + 48 + 60)
    model = nn.Linear(2, 2, bias=False)
    model.register_buffer("unsaved", torch.zeros(100), persistent=False)
    model.register_buffer("empty", torch.zeros(0))
    assert tensor_bytes(model) == 16


def finite_below(limit: float):
    """A loss that overflows when the first layer's weights grow beyond `limit`, as float16 would."""

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        value = batch_loss(model, batch)
        return value if model[0].weight.abs().max() < limit else value * torch.inf

    return loss


@pytest.mark.parametrize("theory", ["llc", "curvature"])
def test_a_width_whose_noise_overflows_is_not_chosen(theory):
    model = network()
    largest = model[0].weight.abs().max().item()
    config = LosslessCompressionConfig(ratio=3, bits=(2, 8), theory=theory)
    result = compress(model, BATCHES, config, loss=finite_below(1.5 * largest))
    assert result.plan.layers["0"].bits == 8


def test_no_width_without_overflow():
    model = network()
    loss = finite_below(1.0001 * model[0].weight.abs().max().item())
    config = LosslessCompressionConfig(ratio=3, bits=(2,), theory="llc")
    with pytest.raises(CalibrationError, match=r"layer '0' can be stored in no way: at each of \[2\] bits .*16 keeps"):
        compress(model, BATCHES, config, loss=loss)


def test_modes_come_back_after_an_error():
    model = network().train()
    model[2].eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(UnreachableTargetError):
        compress(model, BATCHES, LosslessCompressionConfig(ratio=1000))
    assert [module.training for module in model.modules()] == before
    compress(model, BATCHES, LosslessCompressionConfig(ratio=3))
    assert not any(module.training for module in model.modules())


def test_pairs_are_for_classifiers():
    """Cross-entropy over one score is 0 whatever the weights: such a model must bring its own loss."""
    one_score = nn.Sequential(nn.Linear(FEATURES, 1))
    pair = (torch.randn(4, FEATURES), torch.randn(4, 1))
    for model, batch in ((one_score, pair), (network(), (pair[0], torch.randn(4, CLASSES)))):
        with pytest.raises(DataError, match=r"judged by cross-entropy.*Pass the loss.* as loss="):
            compress(model, [batch], LosslessCompressionConfig(ratio=2))
    result = compress(
        one_score, [pair], LosslessCompressionConfig(loss_budget=1), loss=lambda m, b: (m(b[0]) - b[1]).square().mean()
    )
    assert result.calibration.loss > 0


def test_every_theory_is_there():
    assert all(callable(theory.predict) for theory in THEORIES.values())


class Blocked(nn.Module):
    """A layer whose output the loss depends on, though no gradient comes back through it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.back, self.head = nn.Linear(12, 16), nn.Linear(16, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = torch.relu(self.back(inputs))
        return self.head(hidden)


@pytest.mark.parametrize("theory", ["cet", "hawq", "curvature"])
def test_what_no_gradient_reaches_is_kept_by_theories_of_derivatives(theory):
    """To them a change of it costs nothing, and it may cost everything."""
    batches = [(torch.randn(8, 12), torch.arange(8) % CLASSES) for _ in range(2)]
    config = LosslessCompressionConfig(loss_budget=10, theory=theory, bits=(2, 8), ranks="auto")
    plan = compress(Blocked(), batches, config).plan
    assert plan.layers["back"].kind == "kept" and plan.layers["head"].kind != "kept"


@pytest.mark.parametrize("theory", THEORIES)
def test_what_runs_on_nothing_is_kept(theory):
    """An expert that no token was sent to: nothing is known of what an error in it would do."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.used, self.empty = nn.Linear(12, CLASSES), nn.Linear(12, CLASSES)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.used(inputs) + self.empty(inputs[:0]).sum(0)

    batches = [(torch.randn(8, 12), torch.arange(8) % CLASSES) for _ in range(2)]
    config = LosslessCompressionConfig(loss_budget=10, theory=theory, bits=(2, 8))
    assert compress(Experts(), batches, config).plan.layers["empty"].kind == "kept"


def test_the_plan_is_measured_on_the_calibration_rows():
    model = network()
    result = compress(model, BATCHES, LosslessCompressionConfig(ratio=6, bits=(2, 3)))
    rows = sum(len(batch[1]) for batch in BATCHES)
    with torch.no_grad():
        after = sum(batch_loss(model, batch).item() * len(batch[1]) for batch in BATCHES) / rows
    assert result.measured_loss_change == pytest.approx(after - result.calibration.loss, abs=1e-6)
    assert abs(result.measured_loss_change) > 1e-5


@pytest.mark.parametrize("theory", THEORIES)
def test_a_gradient_that_overflows(theory):
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        value = batch_loss(model, batch)
        value.register_hook(lambda gradient: gradient * float("inf"))
        return value

    with pytest.raises(
        CalibrationError, match=r"the gradient of layer '.*' is not finite, though the loss is.*bfloat16"
    ):
        compress(network(), BATCHES, LosslessCompressionConfig(ratio=2, theory=theory), loss=loss)


def test_ranks_by_number_are_the_only_ones():
    config = LosslessCompressionConfig(
        max_bytes=9000, theory="curvature", bits=(2, 16), ranks={"*": 3}, modules_to_not_convert=["head"]
    )
    plan = compress(Deficient(), deficient_batches(), config, loss=deficient_loss).plan
    assert {layer.low_rank.rank for layer in plan.layers.values() if layer.low_rank is not None} <= {3}
    assert not any(layer.kind == "sum" for layer in plan.layers.values())


STORAGES = pytest.mark.parametrize("storage", [("entropy",), ("fixed", "entropy")], ids="+".join)


@STORAGES
@pytest.mark.parametrize("target", [{"ratio": 6}, {"loss_budget": 0.02}, {"max_bytes": 4000}], ids=str)
def test_coded_models_meet_their_target(storage, target):
    model = network()
    original = tensor_bytes(model)
    result = compress(model, batches_of(16, 16), LosslessCompressionConfig(storage=storage, **target))
    kinds = {layer.kind for layer in result.plan.layers.values()}
    assert result.model is model and ("coded" in kinds or storage != ("entropy",))
    assert stored_bytes(model) == result.plan.tensor_bytes
    assert result.size_bytes == LosslessCheckpointConfig.of(result.plan).size_bytes
    if "ratio" in target:
        assert result.ratio == original / result.size_bytes >= 6
    if "max_bytes" in target:
        assert result.size_bytes <= 4000
    if "loss_budget" in target:
        assert result.plan.predicted_loss_change <= 0.02


@STORAGES
@pytest.mark.parametrize("factor", [0.0, 1e-36, 1e-12, 1e3], ids=str)
def test_layers_of_any_size_are_coded(storage, factor):
    """Of zeros too, whose steps could be anything."""
    model = network()
    layers = [layer for layer in find_layers(model) if layer.kind == "linear"]
    with torch.no_grad():
        layers[-1].weight.mul_(factor)
        layers[-1].module.bias.normal_()
    weight = layers[-1].weight.detach().clone()
    config = LosslessCompressionConfig(storage=storage, bits=(4,), loss_budget=1e30)
    result = compress(model, batches_of(16, 16), config)
    module = model.get_submodule(layers[-1].name)
    assert isinstance(module, CompressedModule) and torch.isfinite(module.weight).all()
    assert result.plan.layers[layers[-1].name].kind in ("coded", "grid")
    if factor <= 1e-36:
        assert not module.weight.any() or storage != ("entropy",)
    else:  # on the coarsest steps there are
        assert (module.weight - weight).norm() <= 3 * weight.norm()


def test_a_layer_too_small_to_be_coded():
    """A matrix of two weights, and no other way is allowed."""
    model = nn.Sequential(nn.Linear(32, 2), nn.Linear(2, 1), nn.Linear(1, 3))
    batches = [(torch.randn(8, 32), torch.randint(0, 3, (8,))) for _ in range(2)]
    config = LosslessCompressionConfig(storage="entropy", bits=(4,), loss_budget=1.0)
    with pytest.raises(
        CalibrationError, match=r"layer '1' can be stored in no way: coded it would take no fewer bytes"
    ):
        compress(model, batches, config)
    result = compress(model, batches, LosslessCompressionConfig(storage="entropy", loss_budget=1.0))
    assert [layer.kind for layer in result.plan.layers.values()] == ["coded", "kept", "kept"]


def test_a_coded_model_is_not_compressed_again():
    model = network()
    compress(model, batches_of(16, 16), LosslessCompressionConfig(storage="entropy", ratio=4))
    with pytest.raises(ConfigurationError, match="is compressed already"):
        compress(model, batches_of(16, 16), LosslessCompressionConfig(storage="entropy", ratio=4))
