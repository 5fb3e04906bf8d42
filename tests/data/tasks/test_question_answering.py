"""Questions to features and back: strides, targets, losses, decoding, and a tiny model that learns to answer."""

import copy
import random
from itertools import pairwise
from typing import Any

import datasets
import pytest
import torch
from tiny_checkpoints import pair_tokenizer, without
from tiny_models import TINY_MODELS, VOCABULARY
from transformers import BertConfig, BertForQuestionAnswering, PreTrainedModel

from hf_lossless import ConfigurationError, DataError
from hf_lossless.certification.comparison import compare
from hf_lossless.certification.evaluation import answers, evaluate
from hf_lossless.data.rows import make_batches, with_own_targets
from hf_lossless.data.tasks.question_answering import QuestionAnswering
from hf_lossless.data.tasks.registry import TASKS, task_of
from hf_lossless.data.tasks.spans import question_of

TASK = QuestionAnswering()
TOKENIZER = pair_tokenizer()
POSITIONS = 32


def built(positions: int = POSITIONS) -> PreTrainedModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=positions,
        pad_token_id=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForQuestionAnswering(config).eval()


@pytest.fixture(scope="module")
def bert() -> PreTrainedModel:
    return built()


def row(context: str, *found: str, question: str = "w5 w6", **more: Any) -> dict[str, Any]:
    starts = [context.index(text) for text in found]
    return {
        "id": "q1",
        "question": question,
        "context": context,
        "answers": {"text": list(found), "answer_start": starts},
        **more,
    }


def words(first: int, count: int) -> str:
    return " ".join(f"w{index}" for index in range(first, first + count))


LONG = words(10, 60)  # two questions' tokens and three special ones leave 27 of 32 tokens


# Features


def test_a_short_context_is_one_feature(bert: PreTrainedModel) -> None:
    [batch] = TASK.batches([row("w10 w11, w12.", "w11, w12")], TOKENIZER, bert)
    assert batch["input_ids"].tolist() == [[2, 5, 6, 3, 10, 11, 0, 12, 0, 3]]  # the comma is unknown
    assert (batch["start_positions"].tolist(), batch["end_positions"].tolist()) == ([5], [7])


def test_a_long_context_comes_in_strides_that_overlap_by_a_third(bert: PreTrainedModel) -> None:
    batches = list(TASK.batches([row(LONG, "w40 w41")], TOKENIZER, bert))
    assert [len(batch["input_ids"]) for batch in batches] == [1] * len(batches)  # as many as there are rows
    ids = [[token for token in batch["input_ids"][0].tolist() if token > 6] for batch in batches]
    assert sorted({token for stride in ids for token in stride}) == list(range(10, 70))
    for before, after in pairwise(ids):
        assert before[-(POSITIONS // 3) :] == after[: POSITIONS // 3]
    for batch, stride in zip(batches, ids, strict=True):
        tokens = batch["input_ids"][0].tolist()
        holds = 40 in stride and 41 in stride
        expected = (tokens.index(40), tokens.index(41)) if holds else (0, 0)  # [CLS]
        assert (batch["start_positions"].item(), batch["end_positions"].item()) == expected
    assert any(batch["start_positions"].item() for batch in batches)


def test_the_first_answer_is_the_target_and_none_is_cls(bert: PreTrainedModel) -> None:
    rows = [row("w10 w11 w12", "w12", "w10"), row("w10 w11 w12")]
    [batch] = TASK.batches(rows, TOKENIZER, bert)
    assert batch["start_positions"].tolist() == batch["end_positions"].tolist() == [6, 0]


def test_features_are_no_longer_than_384_tokens() -> None:
    model = built(positions=512)
    batches = list(TASK.batches([row(" ".join(["w10"] * 1000))], TOKENIZER, model))
    lengths = [batch["input_ids"].shape[1] for batch in batches]
    assert max(lengths) == 384 and len(lengths) == 4  # 1,000 tokens by steps of 384 - 5 - 128


def test_a_tokenizer_that_pads_on_the_left(bert: PreTrainedModel) -> None:
    """Then the context comes first, as in the official script; what is found is the same."""
    left = copy.deepcopy(TOKENIZER)
    left.padding_side = "left"
    rows = [row("w10 w11 w12", "w12"), row("w10", "w10")]
    [batch] = TASK.batches(rows, left, bert)
    assert batch["input_ids"].tolist() == [[2, 10, 11, 12, 3, 5, 6, 3], [1, 1, 2, 10, 3, 5, 6, 3]]
    assert batch["start_positions"].tolist() == [3, 3]
    [unanswered] = TASK.batches([row("w10 w11 w12"), row("w10")], left, bert)
    assert unanswered["start_positions"].tolist() == [0, 2]  # [CLS], behind the padding


@pytest.mark.parametrize("form", ["columns", "list"])
def test_forms_of_answers(form: str) -> None:
    value: Any = {"text": ["w11", "w10"], "answer_start": [4, 0]}
    if form == "list":
        value = [{"text": "w11", "answer_start": 4}, {"text": "w10", "answer_start": 0}]
    found = question_of({"question": "  w5 ", "context": "w10 w11", "answers": value})
    assert (found.question, found.answers, found.start, found.end) == ("w5", ("w11", "w10"), 4, 7)


# Losses and answers


def test_the_loss_of_a_row_is_the_models(bert: PreTrainedModel) -> None:
    rows = [row("w10 w11 w12", "w12"), row("w20 w21", "w20")]
    found = TASK.answer(rows, TOKENIZER, bert)
    for one, loss in zip(rows, found.losses, strict=True):
        [batch] = TASK.batches([one], TOKENIZER, bert)
        with torch.no_grad():
            torch.testing.assert_close(loss, bert(**batch).loss)  # alone, without padding


def test_the_loss_of_a_row_is_the_mean_over_its_features(bert: PreTrainedModel) -> None:
    rows = [row(LONG, "w40 w41"), row("w10", "w10")]
    found = TASK.answer(rows, TOKENIZER, bert)
    losses = []
    for batch in TASK.batches(rows[:1], TOKENIZER, bert):
        length = int(batch["attention_mask"].sum())  # the last stride is padded
        with torch.no_grad():
            losses.append(bert(**{name: x if x.ndim == 1 else x[:, :length] for name, x in batch.items()}).loss)
    torch.testing.assert_close(found.losses[0], torch.stack(losses).mean())
    alone = TASK.answer(rows[1:], TOKENIZER, bert)
    torch.testing.assert_close(found.losses[1:], alone.losses)  # padding plays no part


class Pointing(BertForQuestionAnswering):
    """Points at the tokens w50 (start) and w51 (end), and at [CLS] with a given score."""

    null_score = 0.0

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        output = super().forward(input_ids, **kwargs)
        cls = (input_ids == TOKENIZER.cls_token_id) * self.null_score
        output.start_logits = (input_ids == 50) * 8.0 + cls
        output.end_logits = (input_ids == 51) * 8.0 + cls
        return output


@pytest.fixture
def pointing(bert: PreTrainedModel) -> Pointing:
    return Pointing(bert.config).eval()


def test_a_planted_span_is_found_in_whichever_stride(pointing: Pointing) -> None:
    answer = "w50 , w51"
    for before in (0, 1, 20, 45):
        context = f"{' '.join(['w9'] * before)} {answer} {' '.join(['w8'] * (50 - before))}"
        found = TASK.answer([row(context, answer)], TOKENIZER, pointing)
        assert (found.predictions, found.references, found.scores.tolist()) == ([answer], [[answer]], [1.0])


def test_f1_of_a_part(pointing: Pointing) -> None:
    found = TASK.answer([row("w9 w50 w51 w9", "w50 w51 w9", "w9")], TOKENIZER, pointing)
    assert found.scores.tolist() == [pytest.approx(0.8)]
    assert TASK.metrics(found) == pytest.approx({"f1": 0.8, "exact_match": 0.0})


def test_no_answer(pointing: Pointing) -> None:
    rows = [row("w9 w50 w51", "w50 w51"), row("w9 w9 w9"), row("w8 w50 w51")]
    table = datasets.Dataset.from_list(rows)
    task = TASK.for_rows(table)
    assert task.unanswerable and not TASK.for_rows(table.select([0])).unanswerable
    pointing.null_score = 3.0  # 6 in all: more than 0, less than 16
    found = task.answer(rows, TOKENIZER, pointing)
    assert found.predictions == ["w50 w51", "", "w50 w51"]
    assert found.scores.tolist() == [1, 1, 0]
    assert task.metrics(found) == pytest.approx({"f1": 2 / 3, "exact_match": 2 / 3})
    assert TASK.answer(rows[:1], TOKENIZER, pointing).predictions == ["w50 w51"]
    patient, hasty = (QuestionAnswering(null_threshold=value, unanswerable=True) for value in (7.0, -11.0))
    assert patient.answer(rows, TOKENIZER, pointing).predictions == ["w50 w51", "w9", "w50 w51"]
    assert hasty.answer(rows, TOKENIZER, pointing).predictions == ["", "", ""]


def test_the_null_score_is_the_least_of_the_strides(pointing: Pointing) -> None:
    """One stride that holds an answer is enough, though the others say there is none."""

    class Doubting(Pointing):
        def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
            output = super().forward(input_ids, **kwargs)
            holds = (input_ids == 50).any(1, keepdim=True)
            cls = (input_ids == TOKENIZER.cls_token_id) & ~holds
            output.start_logits = output.start_logits + cls * 20.0
            output.end_logits = output.end_logits + cls * 20.0
            return output

    rows = [row(f"{words(60, 30)} w50 w51 {words(60, 30)}", "w50 w51"), row(words(60, 36))]
    model = Doubting(pointing.config).eval()
    assert QuestionAnswering(unanswerable=True).answer(rows, TOKENIZER, model).predictions == ["w50 w51", ""]


def test_evaluation_and_comparison(bert: PreTrainedModel, pointing: Pointing) -> None:
    rows = [row("w9 w50 w51", "w50 w51"), *(row(f"w50 w51 {words(8, count)}", "w50 w51") for count in (1, 3, 50))]
    found = evaluate(pointing, rows, TASK, TOKENIZER)
    assert (found.metric_name, found.metric, found.other_metrics) == ("f1", 1.0, {"exact_match": 1.0})
    table = datasets.Dataset.from_list(rows)
    one, two = (answers(model, table, TASK, TOKENIZER).outputs for model in (pointing, bert))
    same, different = compare(one, one), compare(one, two)
    assert (same.flips, same.mean_kl) == (0, 0)
    assert different.mean_kl > 0 and different.flips == different.right_to_wrong > 0


def test_the_divergence_is_that_of_starts_plus_that_of_ends(bert: PreTrainedModel) -> None:
    rows = [row("w10 w11", "w11"), row(LONG, "w40")]
    found = TASK.answer(rows, TOKENIZER, bert)
    assert found.logits.shape[:2] == (2, 2)
    assert found.logits[0].isfinite().sum(-1).tolist() == [3, 3]  # [CLS] and two words
    features = sum(1 for _ in TASK.batches(rows[1:], TOKENIZER, bert))
    places = found.logits[1].isfinite().sum(-1).tolist()
    assert places == [60 + features + (features - 1) * (POSITIONS // 3)] * 2


def test_own_targets(bert: PreTrainedModel) -> None:
    bare = list(TASK.batches(without([row("w10 w11", "w11"), row("w10 w11 w12")], "answers"), TOKENIZER, bert))
    [batch] = with_own_targets(bert, bare)
    with torch.no_grad():
        outputs = bert(**bare[0])
    assert batch["start_positions"][1] == outputs.start_logits[1].argmax()
    assert batch["end_positions"][1] == outputs.end_logits[1].argmax()
    assert batch["start_positions"][0] == outputs.start_logits[0, :7].argmax()  # not at padding


def test_a_model_learns_to_answer() -> None:
    """From rows to gradients and back: the answer is w7 and the word behind it, of contexts in two or three strides."""
    generator = random.Random(0)

    def made(count: int) -> list[dict[str, Any]]:
        rows = []
        for number in range(count):
            context = [f"w{generator.randrange(20, 60)}" for _ in range(40)]
            place = generator.randrange(37)
            context[place] = "w7"
            unanswerable = number % 4 == 0
            if unanswerable:
                context[place] = "w8"
            text = " ".join(context)
            start = len(" ".join([*context[:place], ""]))
            found = [] if unanswerable else [" ".join(context[place : place + 2])]
            rows.append(
                {
                    "question": "w7",
                    "context": text,
                    "answers": {"text": found, "answer_start": [start] * len(found)},
                }
            )
        return rows

    model = built().train()
    table = datasets.Dataset.from_list(made(256))
    batches = list(make_batches(table, TASK, TOKENIZER, model, 32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(40):
        for batch in batches:
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
    held_out = evaluate(model, made(64), TASK, TOKENIZER)
    assert held_out.metric > 0.9 and held_out.other_metrics["exact_match"] > 0.9


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"context": "w10 w12"},
            r"answer 'w11' is not in its context at character 4, where 'w12' stands, in row 3 \(id",
        ),
        ({"context": "w1"}, r"answer 'w11' is not in its context at character 4, where '' stands.*Mend answer_start"),
        ({"answers": {"text": ["w11"], "answer_start": [-3]}}, r"is not in its context at character -3"),
        ({"answers": {"text": [""], "answer_start": [0]}}, r"the answer '' is not in its context"),
        ({"answers": {"text": ["w11"], "answer_start": []}}, r"not of SQuAD's form, in row 3 .*Give .*answer_start"),
        ({"answers": None}, r"the answers 'None' are not of SQuAD's form"),
        ({"answers": "w11"}, r"the answers 'w11' are not of SQuAD's form"),
        ({"question": "  "}, r"the question of row 3 \(id 'q1'\) is empty\. Drop"),
        ({"context": "\n"}, r"the context of row 3 \(id 'q1'\) is empty\. Drop"),
        ({"question": None}, r"column 'question' holds None \(NoneType\) where text is expected, in row 3"),
        ({"question": "w9 " * 19}, r"'w9 w9.*has 19 tokens; of 32 that fit, 18 are for a question.*Shorten it"),
    ],
)
def test_bad_rows(bert: PreTrainedModel, change: dict[str, Any], message: str) -> None:
    bad = {**row("w10 w11", "w11"), "__row__": 3, **change}
    with pytest.raises(DataError, match=message):
        list(TASK.batches([bad], TOKENIZER, bert))


def test_the_longest_question_that_fits(bert: PreTrainedModel) -> None:
    [*batches] = TASK.batches([row(LONG, "w40", question="w9 " * 18)], TOKENIZER, bert)
    assert len(batches) == 50 and all(batch["input_ids"].shape == (1, POSITIONS) for batch in batches)


def test_bad_columns(bert: PreTrainedModel) -> None:
    rows = [row("w10", "w10")]
    with pytest.raises(
        DataError, match=r"lack the columns context, question of the task question-answering: found text, label\. Ren"
    ):
        evaluate(bert, [{"text": "w5", "label": 0}], TASK, TOKENIZER)
    with pytest.raises(DataError, match=r"lack the column context of .*: found id, question, answers"):
        evaluate(bert, without(rows, "context"), TASK, TOKENIZER)
    with pytest.raises(DataError, match=r"no answers column: looked for answers, found context, question, id\. Evalua"):
        evaluate(bert, without(rows, "answers"), TASK, TOKENIZER)


def test_models_and_tokenizers_that_will_not_do(bert: PreTrainedModel) -> None:
    no_padding = copy.deepcopy(TOKENIZER)
    no_padding.pad_token = None
    with pytest.raises(ConfigurationError, match="has no padding token"):
        list(TASK.batches([row("w10")], no_padding, bert))
    with pytest.raises(ConfigurationError, match=r"SequenceClassifierOutput\) have no start_logits\. Take a model"):
        TASK.answer([row("w10 w11", "w10")], TOKENIZER, TINY_MODELS["bert"].build())
    assert task_of(bert) is TASKS["question-answering"]
