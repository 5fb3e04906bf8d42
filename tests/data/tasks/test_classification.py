"""Texts and images to batches, and losses that agree with the model's own."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score
from tiny_checkpoints import image_rows, pair_tokenizer, save_text_model, text_rows, tokenizer
from tiny_models import IMAGE, LABELS, TINY_MODELS
from torch.nn import functional as F
from transformers import PreTrainedModel, ViTImageProcessorPil

from hf_lossless.data.rows import make_batches
from hf_lossless.data.tasks.base import RowAnswers
from hf_lossless.data.tasks.classification import Classification
from hf_lossless.data.tasks.columns import LABEL_COLUMNS, find_column
from hf_lossless.data.tasks.image_classification import ImageClassification
from hf_lossless.data.tasks.labels import class_labels
from hf_lossless.data.tasks.metrics import Accuracy
from hf_lossless.data.tasks.registry import TASKS, task_named, task_of, task_of_class
from hf_lossless.data.tasks.text_classification import TextClassification
from hf_lossless.errors import ConfigurationError, DataError

TEXT, IMAGES = TextClassification(), ImageClassification()
TOKENIZER = tokenizer()
PROCESSOR = ViTImageProcessorPil(size={"height": IMAGE, "width": IMAGE})


@pytest.fixture(scope="module")
def bert() -> PreTrainedModel:
    return TINY_MODELS["bert"].build()


@pytest.fixture(scope="module")
def vit() -> PreTrainedModel:
    return TINY_MODELS["vit"].build()


# Losses and metrics


def test_the_mean_of_example_losses_is_the_models_loss(bert: PreTrainedModel, vit: PreTrainedModel) -> None:
    for task, model, batch in (
        (TEXT, bert, TEXT.encode(text_rows(), TOKENIZER, bert)),
        (IMAGES, vit, IMAGES.encode(image_rows(), PROCESSOR, vit)),
    ):
        with torch.no_grad():
            output = model(**batch)
        losses = task.example_losses(output.logits, batch["labels"])
        assert losses.shape == batch["labels"].shape
        torch.testing.assert_close(losses.mean(), output.loss)


def test_example_losses_are_taken_in_float32() -> None:
    logits = torch.tensor([[8.0, 0.0]], dtype=torch.bfloat16)
    losses = TEXT.example_losses(logits, torch.tensor([0]))
    torch.testing.assert_close(losses, F.cross_entropy(logits.float(), torch.tensor([0]), reduction="none"))
    assert losses.item() > 0


def test_accuracy_is_that_of_sklearn() -> None:
    generator = torch.Generator().manual_seed(0)
    predictions, labels = torch.randint(4, (2, 100), generator=generator)
    assert Accuracy().of(predictions.tolist(), labels.tolist()) == {"accuracy": accuracy_score(labels, predictions)}
    assert Accuracy().compute(predictions=[1, 1], references=[1, 1]) == {"accuracy": 1.0}
    assert TEXT.predict(torch.tensor([[0.0, 2.0, 1.0]])).tolist() == [1]


# Labels


def test_labels_are_indices_or_names(bert: PreTrainedModel) -> None:
    for column in LABEL_COLUMNS:
        rows = [{column: 2}, {column: "LABEL_1"}, {column: 0}]
        assert class_labels(rows, bert).tolist() == [2, 1, 0]
    assert class_labels([{"text": "w5"}], bert) is None


@pytest.mark.parametrize("label", [-1, LABELS, True, None, 0.5, "one", "1"], ids=repr)
def test_what_is_no_label(bert: PreTrainedModel, label: Any) -> None:
    with pytest.raises(DataError, match=r"the label .* in column 'label' is not one of the model's 3 labels"):
        class_labels([{"label": 0}, {"label": label}], bert)


def test_the_first_column_that_is_there_is_found() -> None:
    assert find_column({"b": 1, "c": 2}, ("a", "b", "c"), "text") == "b"
    with pytest.raises(DataError, match=r"no text column: looked for a, found none\. Rename"):
        find_column({}, ("a",), "text")


def test_names_of_labels_are_safe_whatever_their_case(bert: PreTrainedModel) -> None:
    """roberta-large-mnli numbers its labels the other way round than GLUE."""
    config = copy.deepcopy(bert.config)
    config.label2id = {"CONTRADICTION": 0, "NEUTRAL": 1, "ENTAILMENT": 2}
    model = SimpleNamespace(config=config)
    names = ["entailment", "neutral", "contradiction"]
    assert class_labels([{"label": name} for name in names], model).tolist() == [2, 1, 0]
    assert class_labels([{"label": number} for number in range(3)], model).tolist() == [0, 1, 2]  # as they are
    features = datasets.Features(
        {name: datasets.Value("string") for name in ("premise", "hypothesis")}
        | {"label": datasets.ClassLabel(names=names)}
    )
    rows = datasets.Dataset.from_list(
        [{"premise": "w5", "hypothesis": "w6", "label": number} for number in range(3)], features=features
    )
    model = copy.deepcopy(bert)
    model.config = config
    [batch] = make_batches(rows, TEXT, TOKENIZER, model, 3)
    assert batch["labels"].tolist() == [2, 1, 0]


def test_hidden_labels(bert: PreTrainedModel) -> None:
    rows = [{"sentence": "w5", "label": -1, "__row__": 0}]
    with pytest.raises(
        DataError, match=r"in row 0\. -1 stands for a hidden label, as in GLUE's test splits: take a split"
    ):
        class_labels(rows, bert)


# Texts


def test_texts_without_a_token(bert: PreTrainedModel) -> None:
    rows = [{"text": "w5", "__row__": 0}, {"text": "", "__row__": 1}]
    with pytest.raises(DataError, match=r"the text of row 1 has no token, and 1 of 2 rows of its batch .*Drop rows"):
        TEXT.encode(rows, TOKENIZER, bert)
    assert TEXT.encode(rows, pair_tokenizer(), bert)["input_ids"][1].tolist() == [2, 3, 1]  # special tokens are enough


@pytest.mark.parametrize("column", ["text", "sentence", "content", "review"])
def test_single_texts(bert: PreTrainedModel, column: str) -> None:
    batch = TEXT.encode([{column: "w5 w6"}, {column: "w7"}], TOKENIZER, bert)
    assert batch["input_ids"].tolist() == [[5, 6], [7, TOKENIZER.pad_token_id]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert "labels" not in batch
    assert TEXT.length({column: "w5 w6"}) == 5


@pytest.mark.parametrize(
    "columns",
    [
        *(("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2")),
        *(("question", "sentence"), ("text", "text_pair")),
    ],
    ids="-".join,
)
def test_pairs(bert: PreTrainedModel, columns: tuple[str, str]) -> None:
    row = dict(zip(columns, ("w5 w6", "w7"), strict=True))
    assert TEXT.encode([row], TOKENIZER, bert)["input_ids"].tolist() == [[5, 6, 7]]
    assert TEXT.length(row) == 7


@pytest.mark.parametrize("architecture", ["bert", "distilbert", "roberta", "mpnet"])
def test_long_texts_are_cut_to_what_the_model_takes(architecture: str) -> None:
    model = TINY_MODELS[architecture].build()
    batch = TEXT.encode([{"text": " ".join(["w5"] * 100), "label": 0}], TOKENIZER, model)
    with torch.no_grad():
        assert model(**batch).loss.isfinite()
    positions = model.config.max_position_embeddings
    offset = model.config.pad_token_id + 1 if architecture in ("roberta", "mpnet") else 0
    assert batch["input_ids"].shape == (1, positions - offset)


def test_the_tokenizers_own_limit_holds(bert: PreTrainedModel) -> None:
    short = tokenizer()
    short.model_max_length = 3
    assert TEXT.encode([{"text": "w5 w6 w7 w8"}], short, bert)["input_ids"].shape == (1, 3)


def test_loading_a_text_model(tmp_path: Path) -> None:
    folder = str(save_text_model(tmp_path))
    assert type(TEXT.load_model(folder)).__name__ == "BertForSequenceClassification"
    assert len(TEXT.load_processor(folder)) == len(TOKENIZER)


# Images


def test_top_five(vit: PreTrainedModel) -> None:
    logits = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    labels = [index % 8 for index in range(20)]
    answers = RowAnswers(torch.zeros(20), torch.zeros(20), logits.argmax(-1).tolist(), labels, logits)
    found = IMAGES.metrics(answers)
    order = logits.argsort(-1, descending=True)[:, :5].tolist()
    assert found == {
        "accuracy": accuracy_score(labels, answers.predictions),
        "top_5_accuracy": sum(label in best for label, best in zip(labels, order, strict=True)) / 20,
    }
    assert IMAGES.answer(image_rows(3), PROCESSOR, vit).logits.shape == (3, LABELS)
    assert IMAGES.metrics(IMAGES.answer(image_rows(3), PROCESSOR, vit)).keys() == {"accuracy"}


def test_pixel_values_are_those_of_the_processor(vit: PreTrainedModel) -> None:
    rows = image_rows(2)
    batch = IMAGES.encode(rows, PROCESSOR, vit)
    expected = PROCESSOR([row["image"] for row in rows], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], expected)
    assert batch["labels"].tolist() == [0, 1]
    assert IMAGES.length(rows[0]) is None


@pytest.mark.parametrize("form", ["path", "bytes", "bytes-and-path", "only-a-path"])
def test_forms_of_an_image(vit: PreTrainedModel, tmp_path: Path, form: str) -> None:
    [row] = image_rows(1)
    path = tmp_path / "image.png"
    row["image"].save(path)
    value = {
        "path": str(path),
        "bytes": {"bytes": path.read_bytes()},
        "bytes-and-path": {"bytes": path.read_bytes(), "path": "gone.png"},
        "only-a-path": {"bytes": None, "path": str(path)},
    }[form]
    expected = IMAGES.encode([row], PROCESSOR, vit)["pixel_values"]
    assert torch.equal(IMAGES.encode([{"img": value}], PROCESSOR, vit)["pixel_values"], expected)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_every_mode_becomes_rgb(vit: PreTrainedModel, mode: str) -> None:
    image = image_rows(1)[0]["image"].convert(mode)
    batch = IMAGES.encode([{"image": image}], PROCESSOR, vit)
    assert batch["pixel_values"].shape == (1, 3, IMAGE, IMAGE)


def test_a_photograph_lies_as_its_camera_says(vit: PreTrainedModel, tmp_path: Path) -> None:
    """The same for a path as for the image that datasets decodes."""
    pixels = np.zeros((IMAGE, IMAGE, 3), np.uint8)
    pixels[: IMAGE // 2] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    path = str(tmp_path / "photograph.png")
    Image.fromarray(pixels).save(path, exif=exif)
    decoded = datasets.Dataset.from_dict({"image": [path]}).cast_column("image", datasets.Image())[0]["image"]
    assert np.asarray(decoded)[0].max() == 0
    by_path, by_datasets = (
        IMAGES.encode([{"image": image}], PROCESSOR, vit)["pixel_values"] for image in (path, decoded)
    )
    assert torch.equal(by_path, by_datasets)


# Which task


@pytest.mark.parametrize(
    ("class_name", "task"),
    [
        ("BertForSequenceClassification", "text-classification"),
        ("ViTForImageClassification", "image-classification"),
        ("DeiTForImageClassificationWithTeacher", "image-classification"),
    ],
)
def test_the_task_of_a_class(class_name: str, task: str) -> None:
    assert task_of_class(class_name) is TASKS[task]


def test_the_task_of_a_model(bert: PreTrainedModel) -> None:
    assert task_of(bert) is TASKS["text-classification"]
    assert task_of(bert, "image-classification") is TASKS["image-classification"]
    with pytest.raises(ConfigurationError, match=r"BertModel does none of the tasks"):
        task_of(bert.bert)
    with pytest.raises(
        ConfigurationError, match=r"task='poetry' is unknown\. Choose one of text-classification, image"
    ):
        task_named("poetry")


def test_tasks_are_listed_under_their_names() -> None:
    assert all(name == task.name for name, task in TASKS.items())


@pytest.mark.parametrize("task", [TEXT, IMAGES], ids=["text", "images"])
def test_scores_of_examples_are_the_metric_row_by_row(task: Classification) -> None:
    predictions, labels = torch.tensor([0, 1, 2, 1]), torch.tensor([0, 1, 1, 1])
    scores = task.example_scores(predictions, labels)
    assert scores.tolist() == [1, 1, 0, 1]
    answers = RowAnswers(torch.zeros(4), scores, predictions.tolist(), labels.tolist())
    assert task.metrics(answers) == {"accuracy": scores.mean().item()}
