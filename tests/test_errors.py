"""Every bad input ends with an error that names the thing, its value and the remedy, and leaves nothing behind."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import image_rows, save_image_model, save_text_model, text_rows, tokenizer, without
from tiny_models import TINY_MODELS
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    GPT2ForSequenceClassification,
)

from hf_lossless import (
    CalibrationError,
    CheckpointError,
    ConfigurationError,
    DataError,
    LosslessCompressionConfig,
    LosslessError,
    PlanError,
    UnreachableTargetError,
    compress,
)
from hf_lossless.cli import models as cli_models
from hf_lossless.storage.plan import FORMAT_VERSION

ROWS = text_rows()
BATCHES = [(torch.randn(4, 6), torch.tensor([0, 1, 0, 1]))]


def config(dataset: Any = ROWS, **settings: Any) -> LosslessCompressionConfig:
    targets = {"tolerance", "ratio", "max_bytes", "loss_budget"}
    target = {} if targets & set(settings) else {"ratio": 2}
    return LosslessCompressionConfig(dataset, **{"bits": (2, 4), **target, **settings})


def compress_text(folder: Path, dataset: Any = ROWS, **settings: Any) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder, quantization_config=config(dataset, **settings))


def perceptron(width: int = 64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 2))


@pytest.fixture
def command(run: Callable[..., tuple[int, str, str]]) -> Callable[..., str]:
    """Runs the command line with arguments that it must refuse, and gives what it says."""

    def refused(*arguments: object) -> str:
        status, said, complaint = run(*arguments)
        assert status == 1 and not said
        assert "Traceback" not in complaint
        return complaint[complaint.index("error: ") :]

    return refused


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 6, "max_bytes": 10}, r"several targets at once: \{'ratio': 6, 'max_bytes': 10\}\. Give exactly one"),
        (
            {"ratio": 6, "tolerance": 0.01},
            r"several targets at once: \{'tolerance': 0\.01, 'ratio': 6\}\. Give exactly one of tolerance, ratio, "
            r"max_bytes, loss_budget, or none: tolerance=0\.01 is the default",
        ),
        ({"tolerance": float("nan")}, r"tolerance=nan is not a finite number\. Give a share of the original's loss"),
        ({"tolerance": "1%"}, r"tolerance='1%' is not a finite number"),
        ({"tolerance": True}, r"tolerance=True is not a finite number"),
        ({"confidence": 0}, r"confidence=0 is not between 0 and 1\. Give say 0\.95"),
        ({"confidence": 1.0}, r"confidence=1\.0 is not between 0 and 1"),
        ({"confidence": 95}, r"confidence=95 is not between 0 and 1"),
        ({"confidence": None}, r"confidence=None is not between 0 and 1"),
        ({"metric_margin": 1}, r"metric_margin=1 is not between -1 and 1\. .* half a point is 0\.005"),
        ({"metric_margin": float("nan")}, r"metric_margin=nan is not between -1 and 1"),
        (
            {"ratio": 6, "certification_dataset": []},
            r"certification_dataset is given, but only the target tolerance= makes a certificate\. Leave it out",
        ),
        ({"ratio": -6}, r"ratio=-6 is not a finite number above 0\. Give one, say ratio=6"),
        ({"ratio": 0}, r"ratio=0 is not a finite number above 0"),
        ({"ratio": float("nan")}, r"ratio=nan is not a finite number above 0"),
        ({"ratio": float("inf")}, r"ratio=inf is not a finite number above 0"),
        ({"ratio": "6"}, r"ratio='6' is not a finite number above 0"),
        ({"ratio": True}, r"ratio=True is not a finite number above 0"),
        ({"max_bytes": 0}, r"max_bytes=0 is not a finite number above 0\. Give one, say max_bytes="),
        ({"loss_budget": -0.1}, r"loss_budget=-0\.1 is not a finite number of at least 0\. Give one, say loss_budget="),
        ({"loss_budget": float("nan")}, r"loss_budget=nan is not a finite number"),
        ({"ratio": 6, "theory": "magic"}, r"theory='magic' is unknown\. Choose one of llc"),
        ({"ratio": 6, "bits": (2, 9)}, r"bits=\(2, 9\) cannot be used because of \[9\]\. Choose widths from 1 to 8"),
        ({"ratio": 6, "bits": (0,)}, r"bits=\(0,\) cannot be used"),
        ({"ratio": 6, "bits": ()}, r"bits=\(\) cannot be used\. Choose widths"),
        ({"ratio": 6, "bits": 4.0}, r"bits=4\.0 cannot be used"),
        ({"ratio": 6, "bits": "4"}, r"bits='4' cannot be used"),
        ({"ratio": 6, "bits": (2, "4")}, r"bits=\(2, '4'\) cannot be used because of \['4'\]"),
        ({"ratio": 6, "bits": (True,)}, r"bits=\(True,\) cannot be used"),
        (
            {"ratio": 6, "ranks": "all"},
            r"ranks='all' cannot be used\. Give \"auto\", or ranks by layer name",
        ),
        ({"ratio": 6, "ranks": 4}, r"ranks=4 cannot be used\. Give"),
        ({"ratio": 6, "ranks": {}}, r"ranks=\{\} cannot be used\. Give"),
        ({"ratio": 6, "ranks": [("a", 4)]}, r"ranks=\[\('a', 4\)\] cannot be used\. Give"),
        (
            {"ratio": 6, "ranks": {"a": 0}},
            r"layer 'a' the rank 0: a rank is a whole number of at least 1\. Give",
        ),
        ({"ratio": 6, "ranks": {"a": (4, -1)}}, r"ranks gives layer 'a' the rank \(4, -1\): a rank is a whole number"),
        ({"ratio": 6, "ranks": {"a": ()}}, r"ranks gives layer 'a' the rank \(\): a rank is a whole number"),
        ({"ratio": 6, "ranks": {"a": 4.0}}, r"ranks gives layer 'a' the rank 4\.0: a rank is a whole number"),
        ({"ratio": 6, "ranks": {"a": True}}, r"ranks gives layer 'a' the rank True: a rank is a whole number"),
        ({"ratio": 6, "ranks": {"a": "auto"}}, r"ranks gives layer 'a' the rank 'auto': a rank is a whole number"),
        ({"ratio": 6, "ranks": {"a": None}}, r"ranks gives layer 'a' the rank None: a rank is a whole number"),
        ({"ratio": 6, "ranks": {3: 4}}, r"ranks gives layer 3 the rank 4"),
        ({"ratio": 6, "group_size": 0}, r"group_size=0 is not a whole number of at least 1"),
        ({"ratio": 6, "num_samples": 0}, r"num_samples=0 is not a whole number of at least 1"),
        ({"ratio": 6, "batch_size": 2.5}, r"batch_size=2\.5 is not a whole number of at least 1"),
        ({"ratio": 6, "seed": -1}, r"seed=-1 is not a whole number of at least 0"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_setting(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        LosslessCompressionConfig(ROWS, **settings)


def test_an_unknown_task(text_folder: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"task='poetry' is unknown\. Choose one of text-classification, image"
    ):
        compress_text(text_folder, task="poetry")


def test_a_module_that_is_not_there(text_folder: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"modules_to_not_convert names 'decoder', .* no such module\. Give"):
        compress_text(text_folder, modules_to_not_convert=["decoder"])


def test_every_module_left_out(text_folder: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no layer that could be compressed .* Leave fewer modules out"):
        compress_text(text_folder, modules_to_not_convert=["*"])


def test_keep_head_of_a_model_without_one() -> None:
    with pytest.raises(ConfigurationError, match=r"keep_head=True, but Sequential does not say .* Name the head in"):
        compress(perceptron(), BATCHES, config(keep_head=True))


@pytest.mark.parametrize("place", ["disk", {"bert": "cpu", "classifier": "disk"}], ids=["all", "a-part"])
def test_disk_offload(text_folder: Path, tmp_path: Path, place: Any) -> None:
    device_map = {"": place} if isinstance(place, str) else place
    with pytest.raises(ConfigurationError, match=r"to disk\. .*: give a device_map without 'disk'"):
        AutoModelForSequenceClassification.from_pretrained(
            text_folder, quantization_config=config(), device_map=device_map, offload_folder=tmp_path
        )


def test_disk_offload_of_a_compressed_model(compressed_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"\['classifier'\] to disk"):
        AutoModelForSequenceClassification.from_pretrained(
            compressed_folder, device_map={"bert": "cpu", "classifier": "disk"}, offload_folder=tmp_path
        )


def test_a_foreign_configuration(text_folder: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"is a LosslessCheckpointConfig\. Pass a LosslessCompressionConfig"):
        AutoModelForSequenceClassification.from_pretrained(
            text_folder,
            quantization_config={"quant_method": "lossless", "format_version": 1, "plan": EMPTY_PLAN},
        )


# Targets out of reach


def test_a_ratio_out_of_reach_names_the_best_one(text_folder: Path) -> None:
    with pytest.raises(UnreachableTargetError, match=r"ratio=300 cannot be reached.*add narrower widths") as error:
        compress_text(text_folder, ratio=300)
    best = best_ratio(error.value)
    assert compress_text(text_folder, ratio=best).hf_quantizer.result.ratio >= best


@pytest.mark.parametrize("width", range(60, 68))
def test_the_best_ratio_is_not_rounded_up(width: int) -> None:
    with pytest.raises(UnreachableTargetError) as error:
        compress(perceptron(width), BATCHES, config(ratio=300))
    best = best_ratio(error.value)
    assert compress(perceptron(width), BATCHES, config(ratio=best)).ratio >= best


def best_ratio(error: UnreachableTargetError) -> float:
    found = re.search(r"a ratio of (\d+\.\d+)\. Ask for at most that", str(error))
    assert found is not None
    return float(found[1])


def test_bytes_out_of_reach_names_the_fewest(text_folder: Path) -> None:
    with pytest.raises(UnreachableTargetError, match=r"max_bytes=100 cannot be reached") as error:
        compress_text(text_folder, max_bytes=100)
    fewest = re.search(r"the smallest plan takes (\d+) bytes", str(error.value))
    assert fewest is not None
    assert compress_text(text_folder, max_bytes=int(fewest[1])).hf_quantizer.result.size_bytes <= int(fewest[1])


def test_a_loss_budget_out_of_reach_leaves_the_model_as_it_was() -> None:
    model = perceptron()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(
        UnreachableTargetError, match=r"loss_budget=1e-12 cannot be met: the least .* Allow more, or add"
    ):
        compress(model, BATCHES, config(loss_budget=1e-12, bits=(1,)))
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# Data


def broken_parquet(tmp_path: Path) -> str:
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 and then nothing")
    return str(path)


def written(name: str, text: str) -> Callable[[Path], str]:
    def write(tmp_path: Path) -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def rows_with(**values: Any) -> list[dict[str, Any]]:
    return [*ROWS[:5], {**ROWS[5], **values}]


SPLITS = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS)})

BAD_DATA: dict[str, tuple[Any, dict[str, Any], type[LosslessError], str]] = {
    "none": (None, {}, ConfigurationError, r"no dataset was given\..*LosslessCompressionConfig\(dataset=\.\.\.\)"),
    "empty list": ([], {}, DataError, r"the data set \(a list\) is empty: it has 0 rows\. Give rows"),
    "empty Dataset": (datasets.Dataset.from_list(ROWS).select([]), {}, DataError, r"\(a Dataset\) is empty"),
    "empty DataLoader": (DataLoader([]), {}, DataError, r"the DataLoader gives no batch\. Give"),
    "empty jsonl": (written("rows.jsonl", ""), {}, DataError, r"rows\.jsonl' is empty: it has 0 rows\. Give rows"),
    "blank jsonl": (written("rows.jsonl", "\n\n"), {}, DataError, r"rows\.jsonl' is empty: it has 0 rows"),
    "json of no rows": (written("rows.json", "[]"), {}, DataError, r"rows\.json' is empty: it has 0 rows"),
    "csv of a heading": (written("rows.csv", "text,label\n"), {}, DataError, r"rows\.csv' is empty: it has 0 rows"),
    "no such file": ("nowhere.jsonl", {}, DataError, r"the data file 'nowhere\.jsonl' does not exist\. Check the path"),
    "unknown kind": (written("rows.txt", "good"), {}, DataError, r"rows\.txt' is of no kind .* end in \.json, \.jsonl"),
    "no such data set": ("nowhere/nothing", {}, DataError, r"the data set 'nowhere/nothing' cannot be read: .* Give a"),
    "not JSON": (written("rows.jsonl", '{"text": '), {}, DataError, r"rows\.jsonl' cannot be read: .+ Give a json"),
    "ragged csv": (
        written("rows.csv", "text,label\na,1\nb,2,3\n"),
        {},
        DataError,
        r"Expected 2 fields in line 3, saw 3",
    ),
    "no parquet": (broken_parquet, {}, DataError, r"rows\.parquet' cannot be read: .+ Give a json"),
    "no saved data set": (str, {}, DataError, r"is neither a `Dataset` directory .* Give a json"),
    "a split of a file": (
        written("rows.jsonl", json.dumps(ROWS[0])),
        {"split": "validation"},
        DataError,
        r"split='validation' is not in '.*rows\.jsonl': a file has no splits\. Leave split=",
    ),
    "unknown split": (SPLITS, {"split": "dev"}, DataError, r"split='dev' is not in .* are train, test\. Name one"),
    "no split named": (SPLITS, {}, DataError, r"has several splits: there are train, test\. Name one of them with spl"),
    "a split of a list": (
        ROWS,
        {"split": "dev"},
        DataError,
        r"split='dev', but dataset is a list and has no splits\. Le",
    ),
    "list of texts": (["good", "bad"], {}, DataError, r"a list, but not of dicts\. Give a dict"),
    "generator": ((row for row in ROWS), {}, DataError, r"dataset is a generator\. Give a datasets\.Dataset"),
    "mixed types": (rows_with(text=5), {}, DataError, r"do not have one type for each column: .* Give every row"),
    "no text column": (
        [{"tweet": "good", "label": 1}],
        {},
        DataError,
        r"no text column: looked for text, sentence, content, review, found tweet, label\. Rename a column",
    ),
    "images": (
        image_rows(),
        {},
        DataError,
        r"no text column: .* found image, label\. .* name the right task with task=",
    ),
    "numbers": (
        [{"text": 5, "label": 0}],
        {},
        DataError,
        r"column 'text' holds 5 \(int\) where text is expected, in row 0\. Clean",
    ),
    "no text": (rows_with(text=None), {}, DataError, r"column 'text' holds None \(NoneType\) where text is expected"),
    "label too large": (
        rows_with(label=3),
        {},
        DataError,
        r"label 3 in column 'label' is not one of the model's 3 label",
    ),
    "label -1": (
        rows_with(label=-1),
        {},
        DataError,
        r"label -1 .* \(0 to 2, or label_0, .*\), in row 5\. -1 stands for a hidden",
    ),
    "label missing": (rows_with(label=None), {}, DataError, r"label None .* or drop rows without a label"),
    "label a fraction": ([{"text": "w5", "label": 0.5}], {}, DataError, r"label 0\.5 in column 'label'"),
    "unknown name": ([{"text": "w5", "label": "good"}], {}, DataError, r"label 'good' in column 'label'"),
    "batches of one": ([(torch.ones(2, 3),)], {}, DataError, r"a mapping .* or a pair \(inputs, targets\), got tuple"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_data_for_a_text_model(case: str, text_folder: Path, tmp_path: Path) -> None:
    dataset, settings, error_class, message = BAD_DATA[case]
    if callable(dataset):
        dataset = dataset(tmp_path)
    with pytest.raises(error_class, match=message):
        compress_text(text_folder, dataset, **settings)


def image_file(tmp_path: Path, image: dict[str, Any], feature: Any) -> str:
    features = datasets.Features({"image": feature, "label": datasets.Value("int64")})
    rows = datasets.Dataset.from_list([{"image": image, "label": 0}], features=features)
    rows.to_parquet(tmp_path / "images.parquet")
    return str(tmp_path / "images.parquet")


@pytest.mark.parametrize(
    "feature",
    [datasets.Image(), {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}],
    ids=["image-feature", "plain-bytes"],
)
def test_an_image_that_cannot_be_decoded(image_folder: Path, tmp_path: Path, feature: Any) -> None:
    rows = image_file(tmp_path, {"bytes": b"junk", "path": None}, feature)
    message = (
        r"the image that begins with b'junk' in column 'image' cannot be decoded, in row 0: "
        r"Pillow knows no .* Remove that row"
    )
    with pytest.raises(DataError, match=message):
        AutoModelForImageClassification.from_pretrained(image_folder, quantization_config=config(rows))


def test_an_image_cut_short(image_folder: Path, tmp_path: Path) -> None:
    image_rows(1)[0]["image"].save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-1000])
    rows = [{"image": str(tmp_path / "half.png"), "label": 0}]
    with pytest.raises(
        DataError, match=r"the image .*half\.png in column 'image' cannot be decoded, in row 0: .* Remove that row"
    ):
        AutoModelForImageClassification.from_pretrained(image_folder, quantization_config=config(rows))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"image": "nowhere.png", "label": 0}], r"the image nowhere\.png .* No such file .* Remove that row"),
        (
            [{"image": 5, "label": 0}],
            r"column 'image' holds int where an image is expected, in row 0\. Give PIL images",
        ),
        (ROWS, r"no image column: looked for image, img, pixel_values, found text, label\. Rename"),
    ],
    ids=["no-file", "number", "texts"],
)
def test_data_for_an_image_model(image_folder: Path, rows: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        AutoModelForImageClassification.from_pretrained(image_folder, quantization_config=config(rows))


def test_no_labels_and_nothing_that_could_stand_in(tmp_path: Path) -> None:
    tiny = TINY_MODELS["t5"]
    tiny.build().save_pretrained(tmp_path)
    message = (
        r'no "labels" \(found input_ids, decoder_input_ids\), .* T5ForConditionalGeneration does none .* '
        r'Add "labels" to every'
    )
    with pytest.raises(DataError, match=message):
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path, quantization_config=config([tiny.inputs()]))


def test_a_model_without_a_known_task(tmp_path: Path) -> None:
    TINY_MODELS["t5"].build().save_pretrained(tmp_path)
    with pytest.raises(
        ConfigurationError, match=r"T5ForConditionalGeneration does none of the tasks .* Take a model with the head"
    ):
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path, quantization_config=config())


def test_a_model_without_a_head(text_folder: Path) -> None:
    with pytest.raises(CalibrationError, match=r"BertModel returned no loss .* load the model with a task head"):
        AutoModel.from_pretrained(
            text_folder,
            quantization_config=config([TINY_MODELS["bert"].inputs() | {"labels": torch.zeros(3)}]),
        )


@pytest.mark.parametrize(
    "settings",
    [{"num_labels": 1}, {"problem_type": "multi_label_classification"}],
    ids=["regression", "several-labels"],
)
def test_a_head_that_does_not_choose_one_label(text_folder: Path, settings: dict[str, Any]) -> None:
    model = AutoModelForSequenceClassification.from_pretrained
    with pytest.raises(ConfigurationError, match=r"does not choose one label of several \(num_labels=\d.* Give ready"):
        model(text_folder, quantization_config=config(), ignore_mismatched_sizes=True, **settings)


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    TINY_MODELS["bert"].build().save_pretrained(tmp_path)
    with pytest.raises(
        ConfigurationError, match=r"has no tokenizer: .* Save the model's tokenizer there, or pass it as"
    ):
        compress_text(tmp_path)


def test_a_tokenizer_without_a_padding_token(tmp_path: Path) -> None:
    GPT2ForSequenceClassification(TINY_MODELS["gpt2"].config).save_pretrained(tmp_path)
    without_padding = tokenizer()
    without_padding.pad_token = None
    with pytest.raises(ConfigurationError, match=r"has no padding token.* tokenizer\.pad_token = tokenizer\.eos_token"):
        compress_text(tmp_path, processor=without_padding)


# Losses that cannot be measured


@pytest.mark.parametrize(
    ("biases", "labels", "value"),
    [([float("nan"), 0.0, 0.0], [0, 1, 2], "nan"), ([3e38, -3e38, 0.0], [1, 1, 1], "inf")],
    ids=["nan", "infinite"],
)
def test_a_loss_that_is_not_finite(tmp_path: Path, biases: list[float], labels: list[int], value: str) -> None:
    folder = save_text_model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "classifier.bias": torch.tensor(biases)}, folder / "model.safetensors", {"format": "pt"})
    rows = [{**row, "label": label} for row, label in zip(ROWS, labels, strict=False)]
    with pytest.raises(CalibrationError, match=rf"the loss of calibration batch 1 of 1 is {value}\. Check that batch"):
        compress_text(folder, rows)


def test_a_loss_that_does_not_depend_on_the_layers() -> None:
    with pytest.raises(
        CalibrationError, match=r"does not depend on any layer .* Check that the model's forward is diff"
    ):
        compress(perceptron(), BATCHES, config(), loss=lambda model, batch: torch.tensor(1.0))


def test_no_batches() -> None:
    with pytest.raises(DataError, match=r"there are no calibration batches\. Give at least one"):
        compress(perceptron(), [], config())


# Compressed already


def test_a_compressed_folder_is_not_compressed_again(compressed_folder: Path) -> None:
    # It is transformers that compares the two classes, before a plug-in is asked.
    with pytest.raises(
        ValueError, match=r"quantized with LosslessCheckpointConfig but you are passing a LosslessCompres"
    ):
        compress_text(compressed_folder)


def test_a_compressed_model_is_not_compressed_again() -> None:
    model = perceptron()
    compress(model, BATCHES, config(ratio=1))
    with pytest.raises(ConfigurationError, match=r"this Sequential is compressed already\. Load the original"):
        compress(model, BATCHES, config())


# Saved folders that were altered


@pytest.fixture(scope="module")
def compressed_folder(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed classifier; not to be written to."""
    folder = tmp_path_factory.mktemp("compressed") / "model"
    compress_text(text_folder).save_pretrained(folder)
    return folder


@pytest.fixture
def altered(compressed_folder: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoilt."""
    return Path(shutil.copytree(compressed_folder, tmp_path / "altered"))


QUERY = "bert.encoder.layer.0.attention.self.query"
Tensors = dict[str, Tensor]


def dropped(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: change(tensors[name])}


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (dropped(f"{QUERY}.codes"), rf"the tensor '{QUERY}\.codes' is missing"),
        (dropped(f"{QUERY}.scales"), rf"the tensor '{QUERY}\.scales' is missing"),
        (dropped(f"{QUERY}.bias"), rf"the tensor '{QUERY}\.bias' is missing"),
        (dropped("bert.embeddings.LayerNorm.bias"), r"the tensor 'bert\.embeddings\.LayerNorm\.bias' is missing"),
        (lambda tensors: {**tensors, "intruder": torch.ones(2)}, r"the tensor 'intruder' in .* does not belong"),
        (
            lambda tensors: {**tensors, f"{QUERY}.zeros": torch.ones(2)},
            rf"the tensor '{QUERY}\.zeros' in .* does not belong",
        ),
        (
            changed(f"{QUERY}.codes", lambda codes: codes.view(torch.int8)),
            rf"the tensor '{QUERY}\.codes' in .*model\.safetensors is of type I8, the plan needs U8",
        ),
        (
            changed(f"{QUERY}.scales", torch.Tensor.float),
            rf"the tensor '{QUERY}\.scales' in .* is of type F32, the plan needs F16",
        ),
        (
            changed("classifier.bias", torch.Tensor.int),
            r"the tensor 'classifier\.bias' in .* is of type I32, the plan needs F32",
        ),
        (
            changed(f"{QUERY}.codes", lambda codes: codes[:, :-1].contiguous()),
            rf"the tensor '{QUERY}\.codes' in .*model\.safetensors has shape \[1, \d+\], the plan needs \[1, \d+\]",
        ),
        (
            changed(f"{QUERY}.scales", lambda scales: scales.T.contiguous()),
            rf"the tensor '{QUERY}\.scales' in .* has shape \[1, 32\], the plan needs \[32, 1\]",
        ),
        (
            changed("classifier.bias", lambda bias: bias[:2].clone()),
            r"the tensor 'classifier\.bias' in .* has shape \[2\], the plan needs \[3\]",
        ),
    ],
    ids=[
        *("missing-codes", "missing-scales", "missing-bias-of-a-layer", "missing-norm", "extra", "extra-of-a-layer"),
        *("codes-of-wrong-type", "scales-of-wrong-type", "bias-of-wrong-type"),
        *("codes-of-wrong-shape", "scales-of-wrong-shape", "bias-of-wrong-shape"),
    ],
)
def test_a_tensor(altered: Path, alter: Callable[[Tensors], Tensors], message: str) -> None:
    file = altered / "model.safetensors"
    save_file(alter(load_file(file)), file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{message}.*Take the folder again from where it came from"):
        AutoModelForSequenceClassification.from_pretrained(altered)


@pytest.mark.parametrize("kept", [0, 5, 100, -1], ids=lambda kept: f"{kept}-bytes")
def test_a_truncated_file(altered: Path, kept: int) -> None:
    file = altered / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors is truncated or no safetensors file: .* Take the fold"
    ):
        AutoModelForSequenceClassification.from_pretrained(altered)


def test_a_truncated_shard(text_folder: Path, tmp_path: Path) -> None:
    compress_text(text_folder).save_pretrained(tmp_path, max_shard_size="5KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"{shard.name} is truncated"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


LAYER = {"kind": "grid", "grid": {"bits": 4}, "cost_bytes": 10, "predicted_loss_change": 0.0}
EMPTY_PLAN = {"theory": "llc", "layers": {}, "other_bytes": 1, "original_bytes": 2}


@pytest.mark.parametrize(
    ("entry", "error_class", "message"),
    [
        (
            {"format_version": FORMAT_VERSION + 1},
            CheckpointError,
            rf"format version {FORMAT_VERSION + 1}, this release .* up to {FORMAT_VERSION}\. Upgrade with: pip install",
        ),
        (
            {"format_version": "1"},
            CheckpointError,
            r"format_version='1' in config\.json is not a version\. Take config",
        ),
        (
            {"format_version": None},
            CheckpointError,
            r"format_version=None .* is not a version\. Take config\.json again",
        ),
        ({"author": {}}, CheckpointError, r"unknown entries under quantization_config: \['author'\]\. Take"),
        (
            {"certificate": {"verdict": "certified"}},
            CheckpointError,
            r"the certificate is malformed at evidence: Field required .*, or certify the model again",
        ),
        ({"plan": None}, PlanError, r"malformed at its top: .* \(got None\)\. Take config\.json again"),
        ({"plan": {**EMPTY_PLAN, "theory": 1}}, PlanError, r"malformed at theory: .* \(got 1\)\. Take"),
        ({"plan": {**EMPTY_PLAN, "rank": 1}}, PlanError, r"malformed at rank: .*\. Take config\.json again"),
        ({"plan": {"layers": {}}}, PlanError, r"malformed at theory: Field required"),
        (
            {"plan": {**EMPTY_PLAN, "layers": {"classifier": {**LAYER, "grid": {"bits": 9}}}}},
            PlanError,
            r"malformed at layers\.classifier\.grid\.bits: .*less than or equal to 8 \(got 9\)",
        ),
        (
            {"plan": {**EMPTY_PLAN, "layers": {"classifier": {**LAYER, "kind": "kept"}}}},
            PlanError,
            r"malformed at layers\.classifier: .*kind 'kept' does not go with its parts, which make the kind 'grid'",
        ),
        (
            {"plan": {**EMPTY_PLAN, "layers": {"bert.decoder": LAYER}}},
            PlanError,
            r"the plan names the layer 'bert\.decoder', which BertForSequenceClassification does not have\. Load",
        ),
        (
            {"plan": {**EMPTY_PLAN, "layers": {"bert.embeddings.LayerNorm": LAYER}}},
            PlanError,
            r"the plan compresses 'bert\.embeddings\.LayerNorm', which is a LayerNorm and cannot be compressed\. Make",
        ),
    ],
    ids=[
        *(
            "newer-format",
            "format-a-string",
            "no-format",
            "unknown-entry",
            "bare-verdict",
            "no-plan",
            "wrong-type",
            "unknown-field",
        ),
        *("missing-field", "nine-bits", "kept-with-grid", "no-such-layer", "no-layer"),
    ],
)
def test_an_entry_of_config_json(
    altered: Path, entry: dict[str, Any], error_class: type[LosslessError], message: str
) -> None:
    alter_config(altered, entry)
    with pytest.raises(error_class, match=message):
        AutoModelForSequenceClassification.from_pretrained(altered)


@pytest.mark.parametrize(
    "entry", [{"format_version": FORMAT_VERSION + 1}, {"plan": None}], ids=["newer-format", "no-plan"]
)
def test_an_entry_of_config_json_on_the_command_line(
    altered: Path, text_file: Path, command: Callable[..., str], entry: dict[str, Any]
) -> None:
    alter_config(altered, entry)
    for arguments in (("inspect", altered), ("evaluate", altered, "--data", text_file)):
        assert re.search(rf"format version {FORMAT_VERSION + 1}|malformed at its top", command(*arguments))


def alter_config(folder: Path, entry: dict[str, Any]) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    values["quantization_config"] |= entry
    path.write_text(json.dumps(values))


# The command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ratio", 2, "--loss-budget", 1), r"several targets at once: \{'ratio': 2\.0, 'loss_budget': 1\.0\}"),
        (("--ratio", 2, "--tolerance", 0.02), r"several targets at once: \{'tolerance': 0\.02, 'ratio': 2\.0\}"),
        (("--confidence", 1), r"confidence=1\.0 is not between 0 and 1"),
        (("--metric-margin", 2), r"metric_margin=2\.0 is not between -1 and 1"),
        (("--ratio", 2, "--selection-data", "x.csv"), r"selection_dataset is given, but only the target tolerance="),
        (("--certification-data", "nowhere.csv"), r"the data file 'nowhere\.csv' does not exist"),
        (("--ratio", "nan"), r"ratio=nan is not a finite number above 0"),
        (("--ratio", 300), r"ratio=300 cannot be reached: .* a ratio of"),
        (
            ("--ratio", 2, "--bits", "2,x"),
            r"--bits '2,x' is not a list of widths\. Write for example --bits 2,3,4,8,16",
        ),
        (
            ("--ratio", 2, "--activation-bits", "8,wide"),
            r"--activation-bits '8,wide' is not a list of widths\. Write for example --activation-bits none,8",
        ),
        (
            ("--ratio", 2, "--theory", "llc", "--activation-bits", "8"),
            r"theory='llc' cannot say what quantised activations cost\. Take theory=\"curvature\"",
        ),
        (
            ("--ratio", 2, "--storage", "zip"),
            r"storage=\['zip'\] cannot be used because of \['zip'\]\. Choose of fixed",
        ),
        (("--ratio", 2, "--storage", "fixed,"), r"cannot be used because of \[''\]\. Choose of fixed, entropy"),
        (
            ("--ratio", 2, "--theory", "llc", "--storage", "entropy"),
            r"theory='llc' cannot say what entropy-coded layers cost\. Take theory=\"curvature\"",
        ),
        (
            ("--ratio", 2, "--ranks", "classifier"),
            r"--ranks 'classifier' is neither auto alone nor a layer with its ranks\. Write for example --ranks auto",
        ),
        (("--ratio", 2, "--ranks", "16"), r"--ranks '16' is neither auto alone"),
        (("--ratio", 2, "--ranks", "=16"), r"--ranks '=16' is neither auto alone"),
        (("--ratio", 2, "--ranks", "classifier="), r"--ranks 'classifier=' is neither auto alone"),
        (("--ratio", 2, "--ranks", "classifier=8,x"), r"--ranks 'classifier=8,x' is neither auto alone"),
        (("--ratio", 2, "--ranks", "auto", "--ranks", "classifier=2"), r"--ranks 'auto' is neither auto alone"),
        (("--ratio", 2, "--ranks", "classifier=0"), r"layer 'classifier' the rank \(0,\): a rank is a whole number"),
        (("--ratio", 2, "--ranks", "pooler.decoder=2"), r"ranks names 'pooler\.decoder', but no layer"),
        (("--ratio", 2, "--ranks", "query=16"), r"\[32, 32\] the rank 16, .* = 16\.0\. Give ranks from 1 to 15"),
        (("--ratio", 2, "--bits", "9"), r"bits=\(9,\) cannot be used"),
        (("--ratio", 2, "--theory", "magic"), r"theory='magic' is unknown\. Choose one of llc"),
        (("--ratio", 2, "--task", "poetry"), r"task='poetry' is unknown\. Choose one of text-classification"),
        (
            ("--ratio", 2, "--task", "image-classification"),
            r"a BertForSequenceClassification, which does not do the task image-classification: .* Take a checkpoint",
        ),
        (("--ratio", 2, "--split", "dev"), r"split='dev' is not in .*rows\.jsonl': a file has no splits\. Leave"),
        (("--ratio", 2, "--skip", "decoder"), r"'decoder', but the model has no such module\. Give"),
        (("--ratio", 2, "--samples", 0), r"num_samples=0 is not a whole number"),
    ],
    ids=lambda value: " ".join(map(str, value)) or "no-target" if isinstance(value, tuple) else "",
)
def test_an_option(
    text_folder: Path, text_file: Path, tmp_path: Path, command: Callable[..., str], arguments: Any, message: str
) -> None:
    said = command("compress", text_folder, "--data", text_file, "--out", tmp_path / "small", *arguments)
    assert re.search(message, said), said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", ["no such file", "no text column", "label too large"])
def test_data_on_the_command_line(text_folder: Path, tmp_path: Path, command: Callable[..., str], case: str) -> None:
    rows, _, _, message = BAD_DATA[case]
    (tmp_path / "data").mkdir()
    if not isinstance(rows, str):
        datasets.Dataset.from_list(rows).to_json(tmp_path / "data/rows.jsonl")
        rows = tmp_path / "data/rows.jsonl"
    said = command("compress", text_folder, "--data", rows, "--out", tmp_path / "out/small", "--ratio", 2)
    assert re.search(message, said), said
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_model_that_is_not_there(text_file: Path, tmp_path: Path, command: Callable[..., str]) -> None:
    for name in ("nowhere", "nobody/nothing", "no name!"):
        said = command("compress", name, "--data", text_file, "--out", tmp_path / "small", "--ratio", 2)
        assert re.search(
            rf"config\.json of {name} \(no folder here, and on the Hub\) cannot be read: .* Give a fo", said
        )
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_be_read(text_folder: Path, text_file: Path, tmp_path: Path, command: Any) -> None:
    folder = Path(shutil.copytree(text_folder, tmp_path / "model"))
    arguments = ("compress", folder, "--data", text_file, "--out", tmp_path / "small", "--ratio", 2)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    assert re.search(
        r"model\.safetensors is truncated or no safetensors file: .* Take the folder again", command(*arguments)
    )
    (folder / "config.json").write_text("{")
    assert re.search(
        r"the config\.json of .*model \(the folder\) cannot be read: .* Give a folder", command(*arguments)
    )
    assert not (tmp_path / "small").exists()


def test_a_model_without_the_head_of_a_task(text_folder: Path, text_file: Path, tmp_path: Path, command: Any) -> None:
    folder = Path(shutil.copytree(text_folder, tmp_path / "model"))
    AutoModel.from_pretrained(text_folder).save_pretrained(folder)
    arguments = ("compress", folder, "--data", text_file, "--out", tmp_path / "small", "--ratio", 2)
    assert re.search(r"BertModel does none of the tasks .* Take a model with the head", command(*arguments))
    said = command(*arguments, "--task", "text-classification")
    assert re.search(r"a BertModel, which does not do the task text-classification: a new head would be random", said)
    alter = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(alter | {"architectures": None}))
    assert re.search(r"names no architecture\. Name the task with --task", command(*arguments))


def test_a_quantised_folder(compressed_folder: Path, text_file: Path, tmp_path: Path, command: Any) -> None:
    said = command("compress", compressed_folder, "--data", text_file, "--out", tmp_path / "small", "--ratio", 2)
    assert re.search(r"is quantised already \(hf_lossless\)\. Compress the original checkpoint instead", said)
    assert not list(tmp_path.iterdir())


def test_an_occupied_output_folder_is_refused_before_anything_is_read(tmp_path: Path, command: Any) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "small/letter.txt").write_text("dear")
    for out in (tmp_path / "small", tmp_path / "small/letter.txt"):
        said = command("compress", "nowhere", "--data", "nowhere.jsonl", "--out", out, "--ratio", 2)
        assert re.search(rf"output folder {out} exists and is not empty\. Remove it, or name another one", said)
        assert re.search("exists and is not empty", command("demo", "--out", out))
    said = command(
        "compress", "nowhere", "--data", "nowhere.jsonl", "--out", tmp_path / "small/letter.txt/x", "--ratio", 2
    )
    assert re.search(r"letter\.txt/x cannot be written: .*letter\.txt is not a folder .* Name another one", said)
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*")] == [Path("small"), Path("small/letter.txt")]


def test_evaluation(
    text_folder: Path, text_file: Path, tmp_path: Path, command: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets.Dataset.from_list(without(ROWS, "label")).to_json(tmp_path / "rows.jsonl")
    said = command("evaluate", text_folder, "--data", tmp_path / "rows.jsonl")
    assert re.search(r"no label column: looked for label, labels, fine_label, found text\. .* rename a column", said)
    monkeypatch.setattr(cli_models, "answers", None)  # the original is looked for before the first model takes its time
    said = command("evaluate", text_folder, "--data", text_file, "--against", "nowhere")
    assert re.search(r"the config\.json of nowhere", said)


def test_the_evaluation_of_a_broken_model(tmp_path: Path, text_file: Path, command: Callable[..., str]) -> None:
    folder = save_text_model(tmp_path / "model")
    model = BertForSequenceClassification.from_pretrained(folder)
    model.classifier.bias.data[0] = torch.nan
    model.save_pretrained(folder)
    said = command("evaluate", folder, "--data", text_file, "--json")
    assert re.search(
        r"the loss of BertForSequenceClassification on these 12 rows is nan\. Check the model's weights", said
    )


def test_inspection(text_folder: Path, tmp_path: Path, command: Callable[..., str]) -> None:
    assert re.search(r"holds no model compressed by hf_lossless\. Compress one with", command("inspect", text_folder))
    assert re.search(r"nowhere/config\.json cannot be read: .* Give a folder", command("inspect", tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text("{")
    assert re.search(r"config\.json is not JSON: .* Take the folder again", command("inspect", tmp_path))


def test_no_image_processor(tmp_path: Path, image_file: Path, command: Callable[..., str]) -> None:
    folder = save_image_model(tmp_path / "model")
    (folder / "preprocessor_config.json").unlink()
    said = command("compress", folder, "--data", image_file, "--out", tmp_path / "small", "--ratio", 2)
    assert re.search(r"preprocessor_config\.json", said)
    assert not (tmp_path / "small").exists()
