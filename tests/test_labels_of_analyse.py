"""Whose labels `analyse` takes the curvature from: the model's own for coded layers, the data's for all else."""

import copy

import pytest
import torch
import transformers as hf
from tiny_models import TINY_MODELS
from torch import Tensor, nn
from torch.nn import functional as F

from hf_lossless import LosslessCompressionConfig
from hf_lossless import compression as pipeline
from hf_lossless.calibration.fisher import fisher_batches, with_fisher
from hf_lossless.calibration.statistics import Calibration, calibrate
from hf_lossless.candidates.damping import shaped_damping
from hf_lossless.candidates.damping_choice import chosen_scale
from hf_lossless.compression import analyse
from hf_lossless.data.batches import batch_loss
from hf_lossless.errors import CalibrationError, DataError
from hf_lossless.storage.layers import find_layers

FEATURES, CLASSES = 24, 4


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, CLASSES)).eval()


def batches_of(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(rows, FEATURES, generator=generator), torch.arange(rows) % CLASSES) for rows in sizes]


BATCHES = batches_of(9, 7, 8)


def config_of(*storage: str, **settings) -> LosslessCompressionConfig:
    return LosslessCompressionConfig(**{"storage": storage, "loss_budget": 1.0, "theory": "curvature", **settings})


def same_curvature(found: Calibration, expected: Calibration) -> bool:
    pairs = [
        pair
        for name, one in expected.layers.items()
        for pair in zip(
            (found.layers[name].curvature, *found.layers[name].halves), (one.curvature, *one.halves), strict=True
        )
    ]
    return all(
        a.scale == b.scale and torch.equal(a.rows, b.rows) and torch.equal(a.columns, b.columns) for a, b in pairs
    )


def dampings(planner) -> dict[str, set]:
    candidates = planner.problem.candidates.items()
    return {name: {one.coded.damping for one in group if one.coded is not None} for name, group in candidates}


@pytest.fixture
def of_data() -> Calibration:
    model = network()
    return calibrate(model, BATCHES, find_layers(model), batch_loss, curvature=True)


def test_coded_layers_have_the_labels_of_the_model(of_data):
    model = network()
    found = analyse(model, BATCHES, config_of("entropy", seed=7))
    layers = find_layers(model)
    expected = with_fisher(of_data, model, fisher_batches(model, BATCHES, 7), layers)
    assert same_curvature(found.problem.calibration, expected)
    assert not same_curvature(found.problem.calibration, of_data)
    assert found.problem.calibration.loss == of_data.loss  # which is still that of the data
    scale = chosen_scale(model, BATCHES, layers, expected)
    assert dampings(found) == {layer.name: {shaped_damping(layer.kind, scale)} for layer in layers}


def own_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The same cross-entropy, but brought by the caller."""
    return F.cross_entropy(model(batch[0]), batch[1])


def refuse(*arguments: object) -> None:
    raise AssertionError("labels were drawn")


@pytest.mark.parametrize("storage", [("entropy",), ("fixed", "entropy")], ids="+".join)
def test_a_loss_of_the_caller_has_the_labels_of_the_data(storage, of_data, monkeypatch):
    monkeypatch.setattr(pipeline, "fisher_batches", refuse)
    with pytest.raises(AssertionError, match="labels were drawn"):
        analyse(network(), BATCHES, config_of(*storage))
    found = analyse(network(), BATCHES, config_of(*storage), loss=own_loss)
    assert same_curvature(found.problem.calibration, of_data)
    assert dampings(found) == {name: {shaped_damping("linear", 1.0)} for name in of_data.layers}


def test_fixed_grids_have_the_labels_of_the_data(of_data, monkeypatch):
    monkeypatch.setattr(pipeline, "fisher_batches", refuse)
    found = analyse(network(), BATCHES, config_of("fixed"))
    assert same_curvature(found.problem.calibration, of_data)


def test_a_regression_has_the_labels_of_the_data():
    config = copy.deepcopy(TINY_MODELS["bert"].config)
    config.num_labels, config.problem_type = 1, None
    torch.manual_seed(0)
    model = hf.BertForSequenceClassification(config).eval()
    batches = [{**TINY_MODELS["bert"].inputs(rows=4, seed=seed), "labels": torch.randn(4)} for seed in (1, 2)]
    found = analyse(model, batches, config_of("entropy"))
    expected = calibrate(model, batches, found.problem.layers, batch_loss, curvature=True)
    reached = {name: one for name, one in expected.layers.items() if one.halves is not None}
    assert len(reached) > 5
    assert same_curvature(found.problem.calibration, Calibration(reached, 0.0, 1))


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ((BATCHES[0][0], torch.zeros(9, CLASSES)), DataError, "judged by cross-entropy"),
        ((*BATCHES[0], BATCHES[0][1]), DataError, r"a batch is a mapping .* or a pair"),
        ((BATCHES[0][0] * torch.nan, BATCHES[0][1]), CalibrationError, "the loss of calibration batch 2 of 2 is nan"),
    ],
    ids=["probabilities", "three", "nan"],
)
def test_unfit_batches_have_the_message_of_any_storage(batch, error, message):
    for storage in ("fixed", "entropy"):
        with pytest.raises(error, match=message):
            analyse(network(), [BATCHES[0], batch], config_of(storage))
