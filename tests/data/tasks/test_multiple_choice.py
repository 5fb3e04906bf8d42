"""Beginnings and endings in three forms, and one row of a batch for each choice."""

import copy
from typing import Any

import datasets
import pytest
import torch
from tiny_checkpoints import pair_tokenizer, without
from tiny_models import VOCABULARY
from transformers import BertConfig, BertForMultipleChoice, PreTrainedModel

from hf_lossless import DataError
from hf_lossless.certification.evaluation import evaluate
from hf_lossless.data.rows import make_batches, with_own_targets
from hf_lossless.data.tasks.multiple_choice import Choices, choice_columns, choices_of
from hf_lossless.data.tasks.registry import TASKS, task_of

TASK = TASKS["multiple-choice"]
TOKENIZER = pair_tokenizer()
SWAG = {
    "video-id": "anet_1",
    "sent1": "w5 w6",
    "sent2": "w7",
    **{f"ending{index}": f"w{10 + index}" for index in range(4)},
    "label": 2,
}


@pytest.fixture(scope="module")
def bert() -> PreTrainedModel:
    torch.manual_seed(0)
    return BertForMultipleChoice(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            max_position_embeddings=16,
            pad_token_id=1,
        )
    ).eval()


def read(row: dict[str, Any]) -> Choices:
    return choices_of(row, choice_columns(list(row), TASK.name))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (SWAG, Choices("w5 w6", ("w7 w10", "w7 w11", "w7 w12", "w7 w13"), 2)),
        ({"ctx": "w5", "endings": ["w6", "w7", "w8"], "label": "1"}, Choices("w5", ("w6", "w7", "w8"), 1)),
        (
            {"article": "w5", "question": "w6 ?", "options": ["w7", "w8"], "answer": "B"},
            Choices("w5", ("w6 ? w7", "w6 ? w8"), 1),
        ),
        ({"ctx": "w5", "endings": ["w6", "w7"]}, Choices("w5", ("w6", "w7"), None)),
    ],
    ids=["swag", "hellaswag", "race", "unlabelled"],
)
def test_forms(row: dict[str, Any], expected: Choices) -> None:
    assert read(row) == expected


def test_more_than_ten_endings_are_in_order() -> None:
    row = {"sent1": "", "sent2": "", **{f"ending{index}": str(index) for index in (10, 2, 0, 1, *range(3, 10))}}
    assert read(row).endings == tuple(map(str, range(11)))


def test_each_choice_is_a_pair(bert: PreTrainedModel) -> None:
    batch = TASK.encode([SWAG, {**SWAG, "sent1": "w5", "label": 0}], TOKENIZER, bert)
    assert batch["input_ids"].shape == (2, 4, 7)
    assert batch["input_ids"][0, 1].tolist() == [2, 5, 6, 3, 7, 11, 3]
    assert batch["input_ids"][1, 3].tolist() == [2, 5, 3, 7, 13, 3, 1]
    assert batch["labels"].tolist() == [2, 0]
    assert TASK.length(SWAG) == len("w5 w6" + "w7 w10")


def test_long_beginnings_are_cut(bert: PreTrainedModel) -> None:
    batch = TASK.encode([{**SWAG, "sent1": "w5 " * 40}], TOKENIZER, bert)
    assert batch["input_ids"].shape == (1, 4, 16)
    assert batch["input_ids"][0, :, -2].tolist() == [10, 11, 12, 13]  # the endings are whole


def test_loss_and_accuracy(bert: PreTrainedModel) -> None:
    rows = [{**SWAG, "sent1": f"w{5 + index} " * (1 + index % 5), "label": index % 4} for index in range(70)]
    found = evaluate(bert, rows, TASK, TOKENIZER)
    losses, right = [], []
    for row in rows:
        batch = TASK.encode([row], TOKENIZER, bert)
        with torch.no_grad():
            output = bert(**batch)
        losses.append(output.loss.item())
        right.append(output.logits.argmax().item() == row["label"])
    assert found.loss == pytest.approx(sum(losses) / 70, abs=1e-5)
    assert (found.metric_name, found.metric) == ("accuracy", sum(right) / 70)


def test_numbers_of_choices_are_no_names(bert: PreTrainedModel) -> None:
    """SWAG's column of labels has the names "0" to "3", and a model of two labels may know two of them."""
    texts = {name: datasets.Value("string") for name in SWAG if name != "label"}
    features = datasets.Features(texts | {"label": datasets.ClassLabel(names=["0", "1", "2", "3"])})
    model = copy.deepcopy(bert)
    model.config.label2id = {"1": 0, "0": 1}
    rows = datasets.Dataset.from_list([SWAG, {**SWAG, "label": 1}], features=features)
    [batch] = make_batches(rows, TASK, TOKENIZER, model, 2)
    assert batch["labels"].tolist() == [2, 1]


def test_own_targets(bert: PreTrainedModel) -> None:
    [bare] = TASK.batches(without([SWAG, SWAG], "label"), TOKENIZER, bert)
    [batch] = with_own_targets(bert, [bare])
    with torch.no_grad():
        assert torch.equal(batch["labels"], bert(**bare).logits.argmax(-1))
    assert task_of(bert) is TASK


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"text": "w5", "label": 0},
            r"lack the columns sent1, sent2, ending0, ending1 of .*: found text, label\. Rename",
        ),
        (
            {name: value for name, value in SWAG.items() if name != "sent2"},
            r"lack the column sent2 of the task multiple-choice: found video-id, sent1, ending0",
        ),
        (
            {**SWAG, "label": 4},
            r"label 4 in column 'label' is none of the 4 choices \(0 to 3, or A to D\), in a row\. T",
        ),
        ({**SWAG, "label": -1}, r"label -1 .* Take a split with labels"),
        ({**SWAG, "label": ""}, r"label '' in column 'label'"),  # HellaSwag's test split
        ({**SWAG, "label": "E"}, r"label 'E'"),
        ({**SWAG, "label": True}, r"label True"),
        ({**SWAG, "label": None}, r"label None"),
        ({**SWAG, "ending2": None}, r"column 'ending2' holds None \(NoneType\) where text is expected"),
        ({"ctx": "w5", "endings": ["w6"]}, r"column 'endings' holds \['w6'\] where two texts or more are expected"),
        ({"ctx": "w5", "endings": "w6"}, r"column 'endings' holds 'w6' where two texts"),
        ({"ctx": "w5", "endings": ["w6", 5]}, r"column 'endings' holds \['w6', 5\] where two texts"),
    ],
)
def test_bad_rows(bert: PreTrainedModel, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        TASK.encode([row], TOKENIZER, bert)


def test_rows_of_different_numbers_of_choices(bert: PreTrainedModel) -> None:
    rows = [{"ctx": "w5", "endings": ["w6"] * count, "label": 0, "__row__": count} for count in (2, 3)]
    with pytest.raises(DataError, match=r"row 3 has 3 choices, row 2 has 2\. Give rows that all"):
        TASK.encode(rows, TOKENIZER, bert)
