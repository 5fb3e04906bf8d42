"""How far predictions have moved, against torch's own divergence."""

import math

import pytest
import torch
import transformers as hf
from test_model_labels import answer_batch, bert, token_batch
from tiny_models import TINY_MODELS
from torch import nn
from torch.nn import functional as F

from hf_lossless.calibration.model_labels import divergence, log_probabilities


def scores(seed: int, *sizes: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 5, generator=generator).mul(3).log_softmax(-1) for rows in sizes]


def test_the_mean_over_all_labels():
    before, after = scores(0, 7, 3, 1), scores(1, 7, 3, 1)
    expected = F.kl_div(torch.cat(after), torch.cat(before), reduction="batchmean", log_target=True).item()
    assert divergence(before, after) == pytest.approx(expected, rel=1e-6)
    backwards = divergence(after, before)
    assert backwards > 0 and backwards != pytest.approx(expected, rel=0.01)
    assert divergence(before, before) == 0 and divergence([], []) == 0


def test_predictions_that_are_not_finite():
    before = scores(0, 4)
    assert math.isnan(divergence(before, [one * torch.nan for one in before]))


@pytest.mark.parametrize("make", [token_batch, answer_batch], ids=["tokens", "answers"])
def test_only_labels_that_the_loss_counts(make):
    batch = make()
    model = bert(hf.BertForTokenClassification) if "labels" in batch else bert(hf.BertForQuestionAnswering, 2)
    found = log_probabilities(model, [batch])
    with torch.no_grad():
        outputs = model(**batch)
    if "labels" in batch:
        expected = [outputs.logits[batch["labels"] != -100]]
    else:
        expected = [outputs.start_logits[:3], outputs.end_logits[:2]]
    assert len(found) == len(expected)
    for one, logits in zip(found, expected, strict=True):
        torch.testing.assert_close(one, logits.log_softmax(-1))
        assert one.dtype == torch.float32 and not one.requires_grad


def test_causal_predictions_but_the_last():
    model, batch = TINY_MODELS["llama"].build(), TINY_MODELS["llama"].batch(rows=2)
    [found] = log_probabilities(model, [batch])
    with torch.no_grad():
        expected = model(**batch).logits[:, :-1].flatten(0, 1)
    torch.testing.assert_close(found, expected.log_softmax(-1))


def test_none_where_one_batch_has_no_classes():
    good, bad = (torch.zeros(2, 3), torch.tensor([0, 1])), (torch.zeros(2, 3), torch.zeros(2, 2))
    model = nn.Linear(3, 2)
    assert log_probabilities(model, [good, good]) is not None
    assert log_probabilities(model, [good, bad]) is None
