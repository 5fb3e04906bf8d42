"""Loss and metric against sklearn and the model's own loss."""

from pathlib import Path

import datasets
import pytest
import torch
from sklearn.metrics import accuracy_score
from tiny_checkpoints import image_rows, text_rows
from transformers import PreTrainedModel

from hf_lossless.certification.evaluation import Evaluation, evaluate
from hf_lossless.data.rows import make_batches
from hf_lossless.data.tasks.base import Task
from hf_lossless.data.tasks.registry import TASKS

TEXTS, IMAGES = text_rows(70), image_rows(5)  # more than one batch, and less than one


@pytest.mark.parametrize(
    ("task", "folder", "rows"),
    [(TASKS["text-classification"], "text_folder", TEXTS), (TASKS["image-classification"], "image_folder", IMAGES)],
    ids=["text", "image"],
)
def test_loss_and_accuracy(task: Task, folder: str, rows: list[dict], request: pytest.FixtureRequest) -> None:
    path = str(request.getfixturevalue(folder))
    model, processor = task.load_model(path), task.load_processor(path)
    result = evaluate(model, rows, task, processor)
    loss, predictions = row_by_row(model, task, processor, rows)
    assert result.loss == pytest.approx(loss, abs=1e-5)
    assert result.metric == accuracy_score([row["label"] for row in rows], predictions)
    assert (result.metric_name, result.num_examples) == ("accuracy", len(rows))


def row_by_row(model: PreTrainedModel, task: Task, processor: object, rows: list[dict]) -> tuple[float, list[int]]:
    """The model's own loss, one row at a time and unpadded."""
    losses, predictions = [], []
    for row in rows:
        [batch] = make_batches(datasets.Dataset.from_list([row]), task, processor, model, 1)
        with torch.no_grad():
            output = model(**batch)
        losses.append(output.loss.item())
        predictions.append(output.logits.argmax().item())
    return sum(losses) / len(losses), predictions


def test_dropout_is_off(text_folder: Path) -> None:
    task = TASKS["text-classification"]
    model, processor = task.load_model(str(text_folder)), task.load_processor(str(text_folder))
    expected = evaluate(model, TEXTS, task, processor)
    model.config.hidden_dropout_prob = 0.5
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    model.train()
    assert evaluate(model, TEXTS, task, processor) == expected


def test_a_split(text_folder: Path) -> None:
    task = TASKS["text-classification"]
    model, processor = task.load_model(str(text_folder)), task.load_processor(str(text_folder))
    splits = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(TEXTS[:9]), "test": datasets.Dataset.from_list(TEXTS[9:])}
    )
    result = evaluate(model, splits, task, processor, "test")
    assert isinstance(result, Evaluation) and result.num_examples == len(TEXTS) - 9
