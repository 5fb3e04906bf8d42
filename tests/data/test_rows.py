"""From what a user calls a data set to batches."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tiny_checkpoints import image_rows, text_rows, tokenizer, without
from tiny_models import IMAGE, TINY_MODELS
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    BatchEncoding,
    BertConfig,
    BertForQuestionAnswering,
    DataCollatorWithPadding,
    PreTrainedModel,
    ViTImageProcessorPil,
)

from hf_lossless import DataError, LosslessCompressionConfig
from hf_lossless.data.rows import (
    Rows,
    calibration_batches,
    load_rows,
    make_batches,
    ready_batches,
    sample_rows,
    with_own_targets,
)
from hf_lossless.data.tasks.registry import TASKS

TEXT, IMAGES = TASKS["text-classification"], TASKS["image-classification"]
ROWS = text_rows()
TABLE = datasets.Dataset.from_list(ROWS)
TOKENIZER = tokenizer()


@pytest.fixture(scope="module")
def bert() -> PreTrainedModel:
    return TINY_MODELS["bert"].build()


# Rows


def written(name: str, method: str, **options: Any) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        getattr(TABLE, method)(folder / name, **options)
        return str(folder / name)

    return write


@pytest.mark.parametrize(
    "give",
    [
        written("rows.jsonl", "to_json"),
        written("rows.json", "to_json", lines=False),
        written("rows.JSONL", "to_json"),
        written("rows.csv", "to_csv"),
        written("rows.parquet", "to_parquet"),
        written("rows", "save_to_disk"),
        lambda folder: Path(written("rows.jsonl", "to_json")(folder)),
        lambda folder: ROWS,
        lambda folder: TABLE,
        lambda folder: TABLE.with_format("torch"),
        lambda folder: datasets.DatasetDict({"anything": TABLE}),
    ],
    ids=["jsonl", "json", "JSONL", "csv", "parquet", "saved", "Path", "list", "Dataset", "torch", "one-split"],
)
def test_every_form_gives_the_same_rows(give: Callable[[Path], Any], tmp_path: Path) -> None:
    assert list(load_rows(give(tmp_path))) == ROWS


def test_splits(tmp_path: Path) -> None:
    splits = datasets.DatasetDict({"train": TABLE.select([0]), "test": TABLE.select([1, 2])})
    splits.save_to_disk(tmp_path / "saved")
    for given in (splits, str(tmp_path / "saved")):
        assert load_rows(given, "test").to_list() == ROWS[1:3]
        with pytest.raises(DataError, match=r"has several splits: there are train, test"):
            load_rows(given)
    TABLE.to_csv(tmp_path / "rows.csv")
    rows = load_rows(str(tmp_path / "rows.csv"), "train")  # as datasets calls it
    assert rows.to_list() == load_rows(rows, "train").to_list() == ROWS


def test_reading_leaves_the_verbosity_of_datasets_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = datasets.logging.get_verbosity()
    (tmp_path / "rows.csv").write_text("a,b\n1,2,3,4\n5\n6,7,8,9,10\n")
    with pytest.raises(DataError, match=r"rows\.csv' cannot be read"):
        load_rows(str(tmp_path / "rows.csv"))
    assert datasets.logging.get_verbosity() == before
    assert "Failed to read" not in capsys.readouterr().err


def image_folder_of(folder: Path, splits: tuple[str, ...] = ("",)) -> Path:
    for split in splits:
        for index, row in enumerate(image_rows(6)):
            path = folder / split / f"LABEL_{row['label']}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            row["image"].save(path)
    return folder


def test_a_folder_of_images(tmp_path: Path) -> None:
    rows = load_rows(str(image_folder_of(tmp_path)))
    model = TINY_MODELS["vit"].build()
    processor = ViTImageProcessorPil(size={"height": IMAGE, "width": IMAGE})
    [batch] = make_batches(rows, IMAGES, processor, model, 6)
    expected = sorted(image_rows(6), key=lambda row: row["label"])
    assert batch["labels"].tolist() == [row["label"] for row in expected]
    pixels = processor([row["image"] for row in expected], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], pixels)


def test_a_folder_of_images_in_splits(tmp_path: Path) -> None:
    folder = str(image_folder_of(tmp_path, ("train", "validation")))
    assert len(load_rows(folder, "validation")) == 6
    with pytest.raises(DataError, match=r"has several splits: there are train, validation"):
        load_rows(folder)


def test_a_broken_image_of_a_folder_is_named(tmp_path: Path) -> None:
    broken = image_folder_of(tmp_path) / "LABEL_1" / "1.png"
    broken.write_bytes(b"junk")
    rows = load_rows(str(tmp_path))
    processor = ViTImageProcessorPil(size={"height": IMAGE, "width": IMAGE})
    with pytest.raises(DataError, match=rf"the image {broken} in column 'image' cannot be decoded, in row 2: Pillow"):
        list(make_batches(rows, IMAGES, processor, TINY_MODELS["vit"].build(), 6))


def test_rows_keep_their_numbers(bert: PreTrainedModel) -> None:
    """A message names a row by its number in the user's data, whatever sample or split it is in by then."""
    rows = datasets.Dataset.from_list([*ROWS[:9], {"text": "w5", "label": 99}])
    with pytest.raises(DataError, match=r"label 99 .* in row 9\."):
        list(make_batches(rows.select([3, 9]), TEXT, TOKENIZER, bert, 4))
    with pytest.raises(DataError, match=r"label 99 .* in row 9\."):
        list(make_batches(rows, TEXT, TOKENIZER, bert, 4))


# Samples


def test_samples_are_drawn_once_each_by_the_seed() -> None:
    first = sample_rows(TABLE, 5, seed=1).to_list()
    assert len(first) == 5
    assert len({row["text"] for row in first}) == 5 and all(row in ROWS for row in first)
    assert sample_rows(TABLE, 5, seed=1).to_list() == first
    assert sample_rows(TABLE, 5, seed=2).to_list() != first


@pytest.mark.parametrize("count", [len(ROWS), len(ROWS) + 1])
def test_all_rows_are_taken_where_there_are_not_more(count: int) -> None:
    assert sample_rows(TABLE, count, seed=1).to_list() == ROWS


# Batches


def test_rows_of_like_length_share_a_batch(bert: PreTrainedModel) -> None:
    batches = list(make_batches(TABLE, TEXT, TOKENIZER, bert, 5))
    assert [len(batch["labels"]) for batch in batches] == [5, 5, 2]
    lengths = [batch["attention_mask"].sum(1) for batch in batches]
    assert all(before.max() <= after.min() for before, after in pairwise(lengths))
    assert sum(int(batch["labels"].sum()) for batch in batches) == sum(row["label"] for row in ROWS)


def test_images_keep_their_order() -> None:
    processor = ViTImageProcessorPil(size={"height": IMAGE, "width": IMAGE})
    rows = image_rows(3)
    batches = list(make_batches(datasets.Dataset.from_list(rows), IMAGES, processor, TINY_MODELS["vit"].build(), 2))
    expected = processor([row["image"] for row in rows], return_tensors="pt")["pixel_values"]
    assert torch.equal(torch.cat([batch["pixel_values"] for batch in batches]), expected)


def test_batches_are_made_one_at_a_time(bert: PreTrainedModel) -> None:
    rows = datasets.Dataset.from_list([*ROWS[:4], {**ROWS[4], "text": "w5 " * 50, "label": 99}])
    batches = make_batches(rows, TEXT, TOKENIZER, bert, 4)
    assert len(next(batches)["labels"]) == 4
    with pytest.raises(DataError, match="label 99"):
        next(batches)


# Ready batches


def test_ready_batches_are_taken_as_they_are() -> None:
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.long)}
    pair = (torch.ones(2, 3), torch.ones(2))
    for given in ([batch], (batch, batch), [pair], [BatchEncoding(batch)]):
        assert ready_batches(given) == list(given)
    for rows in (ROWS, [], [{"text": "w5", "label": torch.tensor(1)}], TABLE, "rows.jsonl", None):
        assert ready_batches(rows) is None


def test_a_data_loader() -> None:
    loader = DataLoader([{"pixels": torch.tensor([float(index)])} for index in range(5)], batch_size=2)
    assert [batch["pixels"].flatten().tolist() for batch in ready_batches(loader)] == [[0, 1], [2, 3], [4]]


# Labels


def test_predictions_stand_in_for_missing_labels(bert: PreTrainedModel) -> None:
    tiny = TINY_MODELS["bert"]
    bare, labelled = tiny.inputs(), tiny.batch()
    first, second = with_own_targets(bert, [bare, labelled])
    with torch.no_grad():
        assert torch.equal(first["labels"], bert(**bare).logits.argmax(-1))
    assert second is labelled
    assert "labels" not in bare


def test_a_configurations_batches(bert: PreTrainedModel, text_folder: Path) -> None:
    model = TEXT.load_model(str(text_folder))
    for processor in (None, TOKENIZER):
        config = LosslessCompressionConfig(ROWS, ratio=2, num_samples=7, batch_size=3, processor=processor)
        batches = calibration_batches(model, config.rows)
        assert [len(batch["labels"]) for batch in batches] == [3, 3, 1]
    unlabelled = LosslessCompressionConfig(without(ROWS, "label"), ratio=2)
    [batch] = calibration_batches(model, unlabelled.rows)
    with torch.no_grad():
        logits: Tensor = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    assert torch.equal(batch["labels"], logits.argmax(-1))


def test_a_loader_of_batch_encodings_without_labels(bert: PreTrainedModel) -> None:
    rows = [TOKENIZER(row["text"]) for row in ROWS]
    loader = DataLoader(rows, batch_size=6, collate_fn=DataCollatorWithPadding(TOKENIZER))
    batches = calibration_batches(bert, Rows(loader))
    assert [batch["labels"].shape for batch in batches] == [(6,), (6,)]


def test_labels_of_other_names_stay():
    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, num_labels=2
    )
    batch = {
        "input_ids": torch.tensor([[5, 6, 7]]),
        "start_positions": torch.tensor([0]),
        "end_positions": torch.tensor([1]),
    }
    assert with_own_targets(BertForQuestionAnswering(config), [batch]) == [batch]


def test_label_names_in_another_order(bert: PreTrainedModel):
    """A ClassLabel column counts by its names where the model knows them, whatever numbers it gives them."""
    names = [bert.config.id2label[index] for index in range(bert.config.num_labels)]
    numbers = [row["label"] for row in ROWS]
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names[::-1])})
    turned = [{"text": row["text"], "label": len(names) - 1 - row["label"]} for row in ROWS]
    table = datasets.Dataset.from_list(turned, features=features)
    [batch] = make_batches(table, TEXT, TOKENIZER, bert, len(ROWS))
    [expected] = make_batches(TABLE, TEXT, TOKENIZER, bert, len(ROWS))
    assert batch["labels"].tolist() == expected["labels"].tolist()
    assert sorted(batch["labels"].tolist()) == sorted(numbers)


def test_label_names_of_which_the_model_knows_some(bert: PreTrainedModel):
    names = [bert.config.id2label[0], "unheard of", "neither"]
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    table = datasets.Dataset.from_list([{"text": "a", "label": 1}], features=features)
    with pytest.raises(DataError, match=r"\['unheard of', 'neither'\] of column 'label' are not among the model's"):
        list(make_batches(table, TEXT, TOKENIZER, bert, 4))


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_shares_of_batches_make_up_the_whole(text_folder: Path, processes: int) -> None:
    task = TASKS["text-classification"]
    model, processor = task.load_model(str(text_folder)), task.load_processor(str(text_folder))
    rows = datasets.Dataset.from_list(text_rows(21))
    whole = list(make_batches(rows, task, processor, model, 5))
    for first in range(processes):
        share = list(make_batches(rows, task, processor, model, 5, first, processes))
        assert len(share) == len(whole[first::processes])
        for batch, expected in zip(share, whole[first::processes], strict=True):
            assert all(torch.equal(batch[name], expected[name]) for name in expected)
