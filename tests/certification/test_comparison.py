"""Two models side by side."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from scipy.special import rel_entr
from torch import Tensor

from hf_lossless import CalibrationError, DataError
from hf_lossless.certification.comparison import Outputs, compare, refuse_one_class


def classifier(logits: Tensor, labels: Tensor) -> Outputs:
    predictions = logits.argmax(-1)
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return Outputs(losses, (predictions == labels).float(), predictions.tolist(), logits)


GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(40, 3, generator=GENERATOR)
OTHER = LOGITS + torch.randn(40, 3, generator=GENERATOR)
LABELS = torch.randint(0, 3, (40,), generator=GENERATOR)
ONE, TWO = classifier(LOGITS, LABELS), classifier(OTHER, LABELS)


def test_against_a_loop_over_rows() -> None:
    found = compare(ONE, TWO)
    differences = [float(two - one) for one, two in zip(ONE.losses, TWO.losses, strict=True)]
    mean = sum(differences) / 40
    error = math.sqrt(sum((one - mean) ** 2 for one in differences) / 39 / 40)
    assert found.loss_change == pytest.approx(mean) == pytest.approx(found.compressed_loss - found.original_loss)
    assert found.loss_change_error == pytest.approx(error, rel=1e-5)
    answers = [(int(a), int(b), int(y)) for a, b, y in zip(ONE.predictions, TWO.predictions, LABELS, strict=True)]
    assert found.flips == sum(a != b for a, b, _ in answers)
    assert found.right_to_wrong == sum(a == y != b for a, b, y in answers) > 0
    assert found.wrong_to_right == sum(a != y == b for a, b, y in answers) > 0
    assert found.original_metric == pytest.approx(sum(a == y for a, _, y in answers) / 40)
    divergence = rel_entr(LOGITS.double().softmax(-1).numpy(), OTHER.double().softmax(-1).numpy()).sum(-1).mean()
    assert found.mean_kl == pytest.approx(divergence)


def test_a_model_and_itself() -> None:
    found = compare(ONE, ONE)
    assert (found.loss_change, found.loss_change_error, found.flips, found.mean_kl) == (0, 0, 0, 0)


def test_a_masked_class_and_no_logits() -> None:
    masked = [replace(ONE, logits=LOGITS.index_fill(1, torch.tensor([2]), -torch.inf)) for _ in range(2)]
    assert compare(*masked).mean_kl == 0
    assert compare(replace(ONE, logits=None), TWO).mean_kl is None


def test_a_prediction_of_several_parts_flips_once() -> None:
    one, two = (Outputs(torch.zeros(2), torch.ones(2), spans) for spans in ([[1, 2], [3, 4]], [[1, 2], [4, 5]]))
    assert compare(one, two).flips == 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: replace(ONE, losses=ONE.losses[:39]),
            DataError,
            r"not of the same rows: losses \[39\], scores \[40\]",
        ),
        (lambda: replace(ONE, losses=LOGITS), DataError, r"losses \[40, 3\].*Give one loss and one score for each"),
        (
            lambda: replace(ONE, losses=ONE.losses.clone().index_fill_(0, torch.tensor([3, 5]), torch.nan)),
            CalibrationError,
            r"the loss is nan on row 3 and not finite on 2 of 40 rows\. Check the model's weights",
        ),
        (
            lambda: replace(ONE, scores=ONE.scores.clone().index_fill_(0, torch.tensor([7]), torch.nan)),
            DataError,
            r"the metric is nan on row 7, and undefined or not between 0 and 1 on 1 of 40 rows\. Leave out rows",
        ),
        (lambda: replace(ONE, scores=ONE.scores * 100), DataError, r"the metric is 100\.0 on row"),
        (
            lambda: Outputs(*(value[:1] for value in (ONE.losses, ONE.scores, ONE.predictions))),
            DataError,
            r"1 row\(s\) cannot show how far rows differ\. Give at least two",
        ),
        (
            lambda: compare(ONE, Outputs(ONE.losses[:9], ONE.scores[:9], ONE.predictions[:9])),
            DataError,
            r"the original's predictions are 40, the compressed model's 9\. Run both",
        ),
        (
            lambda: compare(ONE, replace(TWO, logits=OTHER * torch.nan)),
            CalibrationError,
            r"divergence from the original's outputs is nan: a logit is not finite\. Check",
        ),
        (
            lambda: refuse_one_class([1] * 5, "f1"),
            DataError,
            r"f1 needs rows of two classes or more, and all 5 labels are \[1\]\. Give rows of several classes",
        ),
    ],
    ids=["length", "shape", "nan-loss", "nan-score", "percent", "one-row", "other-rows", "nan-logits", "one-class"],
)
def test_bad_input(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_two_classes_are_enough() -> None:
    refuse_one_class([0, 0, 1], "f1")
