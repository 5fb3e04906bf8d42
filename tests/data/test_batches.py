"""Batches: their loss, their number of examples, their device."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_lossless.data.batches import batch_loss, model_device, num_examples, to_device
from hf_lossless.errors import CalibrationError, DataError


class WithLoss(nn.Module):
    def forward(self, x, labels=None):
        return SimpleNamespace(loss=None if labels is None else (x - labels).square().mean())


def test_a_mapping_gives_the_models_own_loss():
    batch = {"x": torch.tensor([1.0, 3.0]), "labels": torch.zeros(2)}
    assert batch_loss(WithLoss(), batch).item() == 5


@pytest.mark.parametrize("pair", [tuple, list], ids=["tuple", "list"])
def test_a_pair_gives_cross_entropy(pair):
    inputs, targets = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    assert torch.equal(batch_loss(nn.Identity(), pair([inputs, targets])), F.cross_entropy(inputs, targets))


class Scoring(nn.Module):
    """Gives scores and no loss, whatever it is given beside them, as DeiT with a teacher."""

    def forward(self, x, **kwargs):
        return SimpleNamespace(logits=x, loss=None)


def test_scores_of_classes_are_judged_by_cross_entropy():
    scores, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    assert torch.equal(batch_loss(Scoring(), {"x": scores, "labels": labels}), F.cross_entropy(scores, labels))
    for x, other in ((scores, labels.float()), (scores[:, :1], labels * 0), (scores[0], labels[:3]), (scores, None)):
        with pytest.raises(CalibrationError, match="Scoring returned no loss"):
            batch_loss(Scoring(), {"x": x, "labels": other})


def test_a_model_without_loss():
    message = r"WithLoss returned no loss for a batch with the keys \['x'\]. Add \"labels\" to the batches"
    with pytest.raises(CalibrationError, match=message):
        batch_loss(WithLoss(), {"x": torch.zeros(2)})
    with pytest.raises(CalibrationError, match="Identity returned no loss"):
        batch_loss(nn.Identity(), {"input": torch.zeros(2)})


@pytest.mark.parametrize(
    "batch", [torch.zeros(2), (torch.zeros(2),), "rows", None], ids=["tensor", "one", "str", "none"]
)
def test_another_form_of_batch(batch):
    with pytest.raises(DataError, match=rf"a pair \(inputs, targets\), got {type(batch).__name__}"):
        batch_loss(nn.Identity(), batch)


@pytest.mark.parametrize(
    "batch",
    [
        {"input_ids": torch.zeros(3, 7), "labels": torch.zeros(3)},
        {"return_dict": True, "scale": torch.tensor(1.0), "labels": torch.zeros(3)},
        (torch.zeros(3, 7), torch.zeros(3)),
        [{"nested": 1}, torch.zeros(3)],
        torch.zeros(3, 7),
    ],
    ids=["mapping", "mapping-with-scalars", "pair", "pair-with-mapping", "tensor"],
)
def test_num_examples(batch):
    assert num_examples(batch) == 3


@pytest.mark.parametrize("batch", [{}, {"x": 1}, (torch.tensor(1.0),), "rows", None, torch.tensor(1.0)], ids=str)
def test_a_batch_without_examples(batch):
    with pytest.raises(DataError, match="no tensor with a batch dimension"):
        num_examples(batch)


def test_to_device():
    meta = torch.device("meta")
    moved = to_device({"x": torch.zeros(2), "flag": True}, meta)
    assert moved["x"].device == meta and moved["flag"] is True
    assert [value.device for value in to_device((torch.zeros(2), torch.zeros(1)), meta)] == [meta, meta]
    assert to_device(torch.zeros(2), meta).device == meta
    assert to_device("rows", meta) == "rows"


def test_model_device():
    assert model_device(nn.Linear(2, 2, device="meta")) == torch.device("meta")
    assert model_device(nn.Identity()) == torch.device("cpu")


def test_a_half_precision_loss_of_another_kind_stays():
    """Only cross-entropy is computed anew in float32; a model's own loss is its own."""

    class Hinge(nn.Module):
        def forward(self, inputs: Tensor, labels: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=inputs, loss=F.multi_margin_loss(inputs, labels).bfloat16())

    batch = {"inputs": torch.tensor([[3.0, -1.0], [0.5, 4.0]]), "labels": torch.tensor([1, 0])}
    assert torch.equal(batch_loss(Hinge(), batch), F.multi_margin_loss(*batch.values()).bfloat16())
