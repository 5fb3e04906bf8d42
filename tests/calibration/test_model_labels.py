"""Labels drawn from a model's predictions, for every form of batch and loss."""

import copy

import pytest
import torch
import transformers as hf
from tiny_models import LABELS, LENGTH, TINY_MODELS
from torch import Tensor, nn

from hf_lossless.calibration.model_labels import DRAWS, ScoredLabels, scored_labels, with_drawn_labels
from hf_lossless.data.batches import batch_loss

SHARP = 1e4
"""Scores so many times as large leave one label with a probability."""


def drawn(model: nn.Module, batch, draws: torch.Generator) -> list:
    """Copies of a batch with drawn labels."""
    labels = scored_labels(model, batch)
    assert labels is not None
    return with_drawn_labels(batch, labels, draws)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bert(model_class: type[hf.PreTrainedModel], num_labels: int = LABELS) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    config = copy.deepcopy(TINY_MODELS["bert"].config)  # a model notes its kind of problem in it
    config.num_labels, config.problem_type = num_labels, None
    return model_class(config).eval()


def sharp(model: hf.PreTrainedModel, head: nn.Linear) -> hf.PreTrainedModel:
    """The same model, sure of its predictions."""
    with torch.no_grad():
        head.weight *= SHARP
    return model


def token_batch() -> dict[str, Tensor]:
    batch = TINY_MODELS["bert"].inputs(rows=4)
    labels = torch.arange(4 * LENGTH).view(4, LENGTH) % LABELS
    labels[:, 0] = labels[1] = -100
    return {**batch, "labels": labels}


def answer_batch() -> dict[str, Tensor]:
    """Two answers, one whose end lies behind the last token, and one that lies there altogether."""
    start, end = torch.tensor([1, 2, 5, LENGTH]), torch.tensor([3, 2, LENGTH + 7, LENGTH + 1])
    return {**TINY_MODELS["bert"].inputs(rows=4), "start_positions": start, "end_positions": end}


def test_classes_of_rows():
    model, batch = TINY_MODELS["bert"].build(), TINY_MODELS["bert"].batch(rows=6)
    sharp(model, model.classifier)
    with torch.no_grad():
        likeliest = model(**batch).logits.argmax(-1)
    copies = drawn(model, batch, generator())
    assert len(copies) == DRAWS and not torch.equal(likeliest, batch["labels"])
    for one in copies:
        assert one.keys() == batch.keys()
        assert torch.equal(one["labels"], likeliest) and one["labels"].dtype == batch["labels"].dtype
        assert all(
            one[name] is batch[name] or torch.equal(one[name], batch[name]) for name in batch if name != "labels"
        )


def test_classes_of_tokens_but_those_left_out():
    model, batch = bert(hf.BertForTokenClassification), token_batch()
    sharp(model, model.classifier)
    left_out = batch["labels"] == -100
    with torch.no_grad():
        likeliest = model(**batch).logits.argmax(-1)
    assert len(likeliest[~left_out].unique()) > 1
    for one in drawn(model, batch, generator()):
        assert torch.equal(one["labels"], torch.where(left_out, -100, likeliest))
    [found] = scored_labels(model, batch).values()
    assert found.skipped == 0 and found.used_scores.shape == (int((~left_out).sum()), LABELS)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_causal_labels_belong_to_the_token_before(name):
    model, batch = TINY_MODELS[name].build(), TINY_MODELS[name].batch(rows=4)
    batch["labels"] = batch["labels"].clone()
    batch["labels"][:2, :3] = -100
    [found] = scored_labels(model, batch).values()  # a fresh model, to which both shifts cost nearly the same
    assert found.skipped == 1
    router_loss = 0.02 if name == "mixtral" else 1e-5
    assert found.loss.item() == pytest.approx(batch_loss(model, batch).item(), abs=router_loss)
    with torch.no_grad():
        likeliest = model(**batch).logits[:, :-1].argmax(-1)
    sharpened = ScoredLabels(SHARP * found.scores, found.labels, skipped=found.skipped)
    drawn = sharpened.drawn(generator())
    assert torch.equal(drawn[:, 0], batch["labels"][:, 0])
    later = batch["labels"][:, 1:]
    assert torch.equal(drawn[:, 1:], torch.where(later == -100, -100, likeliest))
    assert torch.equal(drawn == -100, batch["labels"] == -100)


@pytest.mark.parametrize("name", ["bert-mlm", "t5", "bart"])
def test_labels_of_other_language_models_belong_to_their_own_token(name):
    model, batch = TINY_MODELS[name].build(), TINY_MODELS[name].batch(rows=4)
    [found] = scored_labels(model, batch).values()
    assert found.skipped == 0
    assert found.loss.item() == pytest.approx(batch_loss(model, batch).item(), abs=1e-5)
    assert found.used_scores.shape[0] == batch["labels"].numel()


def test_ends_of_answers_but_those_behind_the_last_token():
    model, batch = bert(hf.BertForQuestionAnswering, 2), answer_batch()
    sharp(model, model.qa_outputs)
    with torch.no_grad():
        outputs = model(**batch)
    starts, ends = outputs.start_logits.argmax(-1), outputs.end_logits.argmax(-1)
    found = scored_labels(model, batch)
    assert [len(one.used_scores) for one in found.values()] == [3, 2]
    copies = drawn(model, batch, generator())
    assert len(copies) == DRAWS
    for one in copies:
        assert one["start_positions"].tolist() == [*starts[:3].tolist(), LENGTH]
        assert one["end_positions"].tolist() == [*ends[:2].tolist(), LENGTH, LENGTH]
        assert torch.isfinite(batch_loss(model, one))


def test_targets_of_a_pair():
    torch.manual_seed(0)
    model = nn.Linear(5, LABELS)
    batch = [torch.randn(7, 5), torch.zeros(7, dtype=torch.long)]
    sharp(model, model)
    likeliest = model(batch[0]).argmax(-1)
    for inputs, targets in drawn(model, batch, generator()):
        assert torch.equal(inputs, batch[0]) and torch.equal(targets, likeliest)
    assert not torch.equal(batch[1], likeliest)


def test_targets_of_pixels_have_their_classes_in_the_second_dimension():
    torch.manual_seed(0)
    model = nn.Conv2d(2, LABELS, 1)
    inputs, targets = torch.randn(2, 2, 3, 5), torch.randint(0, LABELS, (2, 3, 5))
    targets[0, 0] = -100
    with torch.no_grad():
        model.weight *= SHARP
        likeliest = model(inputs).argmax(1)
    assert scored_labels(model, (inputs, targets))["targets"].loss == batch_loss(model, (inputs, targets))
    for _, found in drawn(model, (inputs, targets), generator()):
        assert torch.equal(found, torch.where(targets == -100, -100, likeliest))


class Returns(nn.Module):
    """Returns something, whatever it is given."""

    def __init__(self, something) -> None:
        super().__init__()
        self.something = something

    def forward(self, inputs):
        return self.something


SCORES, TARGETS = torch.zeros(2, 3), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("outputs", "batch"),
    [
        (torch.zeros(2, 1), (SCORES, TARGETS)),
        (torch.zeros(2), (SCORES, TARGETS)),
        ((SCORES,), (SCORES, TARGETS)),
        (SCORES, (SCORES, torch.zeros(2, 3))),
        (SCORES * torch.nan, (SCORES, TARGETS)),
        (SCORES, (SCORES, TARGETS, TARGETS)),
        (SCORES, SCORES),
    ],
    ids=["one-score", "no-classes", "no-tensor", "probabilities", "nan", "three", "tensor"],
)
def test_none_for_a_pair_without_cross_entropy(outputs, batch):
    assert scored_labels(Returns(outputs), batch) is None


def test_none_for_a_regression():
    model = bert(hf.BertForSequenceClassification, num_labels=1)
    batch = {**TINY_MODELS["bert"].inputs(rows=4), "labels": torch.randn(4)}
    assert torch.isfinite(batch_loss(model, batch))
    assert scored_labels(model, batch) is None


def test_none_for_another_loss_of_the_same_labels():
    model, batch = TINY_MODELS["bert"].build(), TINY_MODELS["bert"].batch(rows=4)
    assert scored_labels(model, batch) is not None
    forward = model.forward

    def doubled(**arguments):
        outputs = forward(**arguments)
        outputs.loss = 2 * outputs.loss
        return outputs

    model.forward = doubled
    assert scored_labels(model, batch) is None


def test_none_where_all_labels_are_left_out():
    model, batch = bert(hf.BertForTokenClassification), token_batch()
    assert scored_labels(model, {**batch, "labels": torch.full_like(batch["labels"], -100)}) is None


def test_the_same_seed_draws_the_same():
    model, batch = bert(hf.BertForTokenClassification), token_batch()
    first, again, other = (drawn(model, batch, generator(seed)) for seed in (1, 1, 2))
    labels = [torch.stack([one["labels"] for one in copies]) for copies in (first, again, other)]
    assert torch.equal(labels[0], labels[1]) and not torch.equal(labels[0], labels[2])
    assert not torch.equal(labels[0][0], labels[0][1])  # the copies are draws of their own


@pytest.mark.parametrize("make", [token_batch, answer_batch], ids=["tokens", "answers"])
def test_the_batch_is_left_as_it_was(make):
    batch, before = make(), make()
    model = bert(hf.BertForTokenClassification) if "labels" in batch else bert(hf.BertForQuestionAnswering, 2)
    copies = drawn(model, batch, generator())
    assert batch.keys() == before.keys() and all(torch.equal(batch[name], before[name]) for name in batch)
    changed = [name for name in batch if not torch.equal(copies[0][name], before[name])]
    assert changed == [name for name in batch if name in ("labels", "start_positions", "end_positions")]


def test_labels_are_as_frequent_as_they_are_probable():
    rows = 5000
    log_probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    model = Returns(log_probabilities.expand(rows, 4))
    copies = drawn(model, (torch.zeros(rows, 1), torch.zeros(rows, dtype=torch.long)), generator())
    frequencies = torch.cat([targets for _, targets in copies]).bincount(minlength=4) / (DRAWS * rows)
    probabilities = log_probabilities.exp()
    standard_errors = (probabilities * (1 - probabilities) / (DRAWS * rows)).sqrt()
    assert ((frequencies - probabilities).abs() < 4 * standard_errors).all()
