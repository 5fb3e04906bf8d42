"""Every command of the README's table, in one process; test_readme.py runs them as a shell does."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import text_rows, without
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from hf_lossless.certification.certificate import Certificate
from hf_lossless.checkpoints.saved_folder import SavedFolder
from hf_lossless.cli import demo
from hf_lossless.data import rows as calibration_data
from hf_lossless.data.splits import three_splits
from hf_lossless.reports.tables import SAVES_TIME
from hf_lossless.storage.modules.base import CompressedModule
from hf_lossless.storage.plan import CompressionPlan

HEAD = "classifier"
OutputOf = Callable[..., str]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def plan_with(
    output_of: OutputOf, text_folder: Path, text_file: Path, tmp_path: Path
) -> Callable[..., CompressionPlan]:
    """The plan that `hf-lossless compress` with these options saves."""

    def plan_with(*options: object, data: Path = text_file) -> CompressionPlan:
        out = tmp_path / f"small-{len(list(tmp_path.iterdir()))}"
        output_of("compress", text_folder, "--data", data, "--out", out, *options)
        return SavedFolder.read(out).entry.plan

    return plan_with


def test_text_from_compress_to_inspect(output_of: OutputOf, text_folder: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "new/small"
    said = output_of("compress", text_folder, "--data", text_file, "--out", out, "--ratio", 3)

    files = {"config.json", "model.safetensors", "tokenizer.json", "compression.json"}
    assert {path.name for path in out.iterdir()} >= files
    assert [path.name for path in out.parent.iterdir()] == ["small"]
    assert len(AutoTokenizer.from_pretrained(out)) == len(AutoTokenizer.from_pretrained(text_folder))
    model = AutoModelForSequenceClassification.from_pretrained(out)
    assert any(isinstance(module, CompressedModule) for module in model.modules())
    assert f"{SavedFolder.read(out).entry.size_bytes:,} bytes" in said and "hf-lossless evaluate" in said

    alone = json.loads(output_of("evaluate", out, "--data", text_file, "--json"))
    beside = json.loads(output_of("evaluate", out, "--data", text_file, "--against", text_folder, "--json"))
    keys = {"loss", "accuracy", "num_examples", "size_bytes", "ratio"}
    assert alone.keys() == keys
    compared = {"loss_change", "loss_change_error", "flips", "right_to_wrong", "wrong_to_right", "mean_kl"}
    assert beside.keys() == keys | compared | {"original"} and beside["original"].keys() == keys
    assert beside["loss_change"] == pytest.approx(beside["loss"] - beside["original"]["loss"], abs=1e-6)
    assert 0 <= beside["flips"] <= len(text_rows()) and beside["mean_kl"] > 0
    said = output_of("evaluate", out, "--data", text_file, "--against", text_folder)
    assert f"{beside['flips']} predictions changed" in said and f"KL divergence {beside['mean_kl']:.2g}" in said
    assert {key: beside[key] for key in keys} == alone
    assert beside["original"]["ratio"] == 1.0
    assert alone["ratio"] == beside["original"]["size_bytes"] / alone["size_bytes"] >= 3
    assert alone["num_examples"] == len(text_rows())
    assert 0 <= alone["accuracy"] <= 1

    record = SavedFolder.read(out).record
    assert (
        record.size_bytes == alone["size_bytes"] and record.chosen[0] == SavedFolder.read(out).entry.plan.tensor_bytes
    )
    output_of("report", out)
    page = tmp_path / "page.html"
    assert str(page) in output_of("report", out, "--out", page)
    assert page.read_text() == (out / "report.html").read_text() and page.read_text().count("<img ") == 3

    inspected = json.loads(output_of("inspect", out, "--json"))
    assert inspected["size_bytes"] == alone["size_bytes"] and inspected["ratio"] == alone["ratio"]
    layer = inspected["layers"][HEAD]
    assert layer.keys() == {
        *("kind", "bits", "group_size", "rank", "factor_bits", "multiplications", "saves_time"),
        *("activation", "cost_bytes", "predicted_loss_change", "regime"),
    }
    assert [layer[key] for key in ("rank", "factor_bits", "multiplications", "saves_time", "regime")] == [
        *(None, None, 1.0, False, None)
    ]
    assert {name for name, module in model.named_modules() if isinstance(module, CompressedModule)} == {
        name for name, layer in inspected["layers"].items() if layer["kind"] == "grid"
    }


def test_images_from_compress_to_inspect(
    output_of: OutputOf, image_folder: Path, image_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "small"
    output_of(
        "compress", image_folder, "--data", image_file, "--out", out, "--ratio", 3, "--task", "image-classification"
    )
    assert AutoImageProcessor.from_pretrained(out, backend="pil").to_dict() == (
        AutoImageProcessor.from_pretrained(image_folder, backend="pil").to_dict()
    )
    assert (
        AutoModelForImageClassification.from_pretrained(out).config.quantization_config.plan
        == SavedFolder.read(out).entry.plan
    )
    evaluated = json.loads(output_of("evaluate", out, "--data", image_file, "--against", image_folder, "--json"))
    assert evaluated["ratio"] >= 3
    assert json.loads(output_of("inspect", out, "--json"))["ratio"] == evaluated["ratio"]


def test_size_bytes_are_those_of_the_folder(
    output_of: OutputOf, text_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    output_of("compress", text_folder, "--data", text_file, "--out", tmp_path / "small", "--ratio", 3)
    tensors = sum(tensor.nbytes for tensor in load_file(tmp_path / "small/model.safetensors").values())
    text = (tmp_path / "small/config.json").read_text()
    values = json.loads(text)
    del values["quantization_config"]
    plan = len(text) - len(json.dumps(values, indent=2, sort_keys=True) + "\n")
    said = json.loads(output_of("inspect", tmp_path / "small", "--json"))
    assert said["size_bytes"] == tensors + plan
    assert said["original_bytes"] == sum(
        tensor.nbytes for tensor in load_file(text_folder / "model.safetensors").values()
    )


def test_tables_lose_nothing_on_a_narrow_terminal(
    output_of: OutputOf, text_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output_of("compress", text_folder, "--data", text_file, "--out", tmp_path / "small", "--ratio", 3)
    monkeypatch.setenv("COLUMNS", "60")
    plan = SavedFolder.read(tmp_path / "small").entry.plan
    said = output_of("inspect", tmp_path / "small")
    columns = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.splitlines() if "│" in line]
    names = "".join(cells[0] for cells in columns)
    for name, layer in plan.layers.items():
        assert name in names
        assert f"{layer.cost_bytes:,}" in said
    assert "predicted" in said and "everything else" in said

    said = output_of("evaluate", tmp_path / "small", "--data", text_file, "--against", text_folder)
    assert all(word in said for word in ("compressed", "original", "bytes", "ratio", "loss", "accuracy", "rows"))


def test_ranks_from_compress_to_inspect(
    output_of: OutputOf, text_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "small"
    said = output_of(
        *("compress", text_folder, "--data", text_file, "--out", out),
        *("--ratio", 1.5, "--bits", "4,16", "--ranks", "auto"),
    )
    assert "rank" in said and "work" in said
    plan = SavedFolder.read(out).entry.plan
    factored = {name: layer for name, layer in plan.layers.items() if layer.low_rank is not None}
    assert factored
    inspected = json.loads(output_of("inspect", out, "--json"))
    assert inspected["layers"].keys() == plan.layers.keys()
    for name, layer in inspected["layers"].items():
        low_rank = plan.layers[name].low_rank
        assert layer["regime"] is None and layer["bits"] == plan.layers[name].bits
        if low_rank is None:
            assert layer["rank"] is layer["factor_bits"] is None and not layer["saves_time"]
            assert layer["multiplications"] == 1
            continue
        outputs, inputs = low_rank.shape
        work = low_rank.rank * (outputs + inputs) / (outputs * inputs) + (layer["kind"] == "sum")
        assert layer["rank"] == low_rank.rank and layer["multiplications"] == pytest.approx(work)
        assert layer["saves_time"] == (work < SAVES_TIME)
        assert len(layer["factor_bits"]) == 2 and set(layer["factor_bits"]) <= {4, 16}
    assert any(layer["multiplications"] < 1 for layer in inspected["layers"].values())
    assert json.loads(output_of("evaluate", out, "--data", text_file, "--json"))["ratio"] >= 1.5


def test_ranks_by_layer(plan_with: Callable[..., CompressionPlan]) -> None:
    query, output = "bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.output.dense"
    options = ("--bits", "16", "--loss-budget", 100, "--theory", "curvature")
    plan = plan_with(*options, "--ranks", f"{query}=5", "--ranks", "1.output.dense=3,4")
    ranks = {name: layer.low_rank.rank for name, layer in plan.layers.items() if layer.low_rank is not None}
    assert ranks == {query: 5, output: 3}
    again = plan_with(*options, "--ranks", f"{query}=9", "--ranks", f"{query}=7,8")  # a layer may be named twice
    assert {layer.low_rank.rank for layer in again.layers.values() if layer.low_rank is not None} == {7}
    assert not any(layer.low_rank for layer in plan_with(*options).layers.values())


def test_regimes_of_lod(output_of: OutputOf, text_folder: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    said = output_of("compress", text_folder, "--data", text_file, "--out", out, "--ratio", 3, "--theory", "lod")
    assert "regime" in said and "measured" in said
    inspected = json.loads(output_of("inspect", out, "--json"))
    assert inspected["theory"] == "lod"
    for layer in inspected["layers"].values():
        if layer["kind"] == "kept":
            assert layer["regime"] is None
            continue
        regime = layer["regime"]
        assert regime.keys() == {"verdict", "snr", "chebyshev", "central_limit"}
        assert regime["verdict"] in ("analytic", "measured") and regime["snr"] >= 0
        assert 0 <= regime["central_limit"] <= regime["chebyshev"] <= 1
        assert regime["verdict"] == "measured" or regime["chebyshev"] <= 0.05


def test_bits(plan_with: Callable[..., CompressionPlan]) -> None:
    assert {layer.bits for layer in plan_with("--ratio", 2, "--bits", "5").layers.values()} == {5}
    kept = plan_with("--ratio", 0.9, "--bits", "16")
    assert {layer.kind for layer in kept.layers.values()} == {"kept"}
    assert kept.tensor_bytes == kept.original_bytes


def test_group_size(plan_with: Callable[..., CompressionPlan]) -> None:
    query = "bert.encoder.layer.0.attention.self.query"
    assert plan_with("--ratio", 2, "--bits", "4", "--group-size", 16).layers[query].grid.group_size == 16
    assert plan_with("--ratio", 2, "--bits", "4", "--group-size", 0).layers[query].grid.group_size is None


def test_asymmetric(plan_with: Callable[..., CompressionPlan]) -> None:
    for options, symmetric in (((), True), (("--asymmetric",), False)):
        plan = plan_with("--ratio", 2, "--bits", "4", *options)
        assert {layer.grid.symmetric for layer in plan.layers.values()} == {symmetric}


def test_skip_and_keep_head(plan_with: Callable[..., CompressionPlan]) -> None:
    everything = plan_with("--ratio", 2).layers.keys()
    assert HEAD in everything
    assert plan_with("--ratio", 2, "--keep-head").layers.keys() == everything - {HEAD}
    left = plan_with("--ratio", 2, "--skip", "bert.embeddings", "--skip", "query").layers.keys()
    assert (
        left == {name for name in everything if "embeddings" not in name and not name.endswith("query")} != everything
    )


def test_targets(plan_with: Callable[..., CompressionPlan], text_folder: Path) -> None:
    smaller, larger = plan_with("--max-bytes", 16_000), plan_with("--max-bytes", 30_000)
    assert smaller.tensor_bytes < 16_000 and larger.tensor_bytes < 30_000
    assert smaller.predicted_loss_change >= larger.predicted_loss_change
    none, some = plan_with("--loss-budget", 0), plan_with("--loss-budget", 0.01)
    assert none.predicted_loss_change == 0 and 0 <= some.predicted_loss_change <= 0.01
    assert none.tensor_bytes >= some.tensor_bytes


def test_the_same_seed_gives_the_same_plan(plan_with: Callable[..., CompressionPlan]) -> None:
    options = ("--ratio", 2, "--bits", "2,3", "--samples", 4)
    first = plan_with(*options, "--seed", 1)
    assert plan_with(*options, "--seed", 1) == first
    assert plan_with(*options, "--seed", 2) != first


def test_activation_noise(plan_with: Callable[..., CompressionPlan]) -> None:
    shared = "--ratio", 2, "--bits", "3", "--theory", "llc"
    without, counted = (plan_with(*shared, *options) for options in ((), ("--activation-noise",)))
    assert not without.activation_noise and counted.activation_noise
    assert counted.predicted_loss_change > without.predicted_loss_change


def test_activation_bits(plan_with: Callable[..., CompressionPlan]) -> None:
    plan = plan_with("--ratio", 3, "--bits", "3", "--theory", "curvature", "--activation-bits", "none, 8")
    assert plan.activations == "quantised"
    assert {layer.activation.bits for layer in plan.layers.values() if layer.activation is not None} == {8}
    plain = plan_with("--ratio", 3, "--bits", "3", "--theory", "curvature", "--activation-bits", "none")
    assert plain == plan_with("--ratio", 3, "--bits", "3", "--theory", "curvature") and plain.activations == "float"


def test_storage(output_of: OutputOf, text_folder: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    options = ("--storage", "entropy", "--ratio", 4)
    said = output_of("compress", text_folder, "--data", text_file, "--out", out, *options)
    assert f"{SavedFolder.read(out).entry.size_bytes:,} bytes" in said
    layers = json.loads(output_of("inspect", out, "--json"))["layers"]
    coded = {name: layer for name, layer in layers.items() if layer["kind"] == "coded"}
    assert coded and all(layer["group_size"] is None and 0 < layer["bits"] < 64 for layer in coded.values())
    tensors = load_file(out / "model.safetensors")
    assert all(tensors[f"{name}.coded"].nbytes == layer["cost_bytes"] for name, layer in coded.items())
    shown = output_of("inspect", out)
    assert all(f"{layer['bits']:.2f} coded" in shown for layer in coded.values())
    evaluated = json.loads(output_of("evaluate", out, "--data", text_file, "--json"))
    assert evaluated["ratio"] >= 4


def test_samples(plan_with: Callable[..., CompressionPlan], monkeypatch: pytest.MonkeyPatch) -> None:
    make_batches, seen = calibration_data.make_batches, []

    def watched(rows: datasets.Dataset, *arguments: Any) -> Any:
        seen.append(len(rows))
        return make_batches(rows, *arguments)

    monkeypatch.setattr(calibration_data, "make_batches", watched)
    plan_with("--ratio", 2, "--samples", 5)
    plan_with("--ratio", 2)
    assert seen == [5, len(text_rows())]


def test_a_split_of_a_saved_data_set(
    plan_with: Callable[..., CompressionPlan], tmp_path: Path, text_file: Path
) -> None:
    splits = {"train": text_rows(seed=1), "validation": text_rows()}
    saved = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()})
    saved.save_to_disk(tmp_path / "data")
    plan = plan_with("--ratio", 2, "--split", "validation", data=tmp_path / "data")
    assert plan == plan_with("--ratio", 2) != plan_with("--ratio", 2, "--split", "train", data=tmp_path / "data")


def test_rows_without_labels_are_calibrated_on_the_models_predictions(
    plan_with: Callable[..., CompressionPlan], text_folder: Path, tmp_path: Path
) -> None:
    rows = without(text_rows(), "label")
    model, tokenizer = (
        kind.from_pretrained(text_folder) for kind in (AutoModelForSequenceClassification, AutoTokenizer)
    )
    with torch.no_grad():
        predictions = [model(**tokenizer(row["text"], return_tensors="pt")).logits.argmax().item() for row in rows]
    labelled = [{**row, "label": label} for row, label in zip(rows, predictions, strict=True)]
    for name, table in (("bare", rows), ("labelled", labelled)):
        datasets.Dataset.from_list(table).to_csv(tmp_path / f"{name}.csv")
    assert plan_with("--ratio", 2, data=tmp_path / "bare.csv") == plan_with(
        "--ratio", 2, data=tmp_path / "labelled.csv"
    )


def test_an_empty_output_folder_is_taken(
    output_of: OutputOf, text_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "small").mkdir()
    output_of("compress", text_folder, "--data", text_file, "--out", tmp_path / "small", "--ratio", 2)
    assert SavedFolder.read(tmp_path / "small").entry.plan.layers


def test_neighbourhood_of_a_text_model(output_of: OutputOf, text_folder: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "new/found"
    layers = ("--layer", "bert.encoder.layer.1.*.query", "--layer", "word_embeddings", "--layer", HEAD)
    said = output_of("neighbourhood", text_folder, "--data", text_file, "--out", out, *layers)
    assert {path.name for path in out.iterdir()} == {"neighbourhood.json", "neighbourhood.png"}
    saved = json.loads((out / "neighbourhood.json").read_text())
    query = "bert.encoder.layer.1.attention.self.query"
    assert list(saved["layers"]) == ["bert.embeddings.word_embeddings", query, HEAD]
    assert saved["layers"]["bert.embeddings.word_embeddings"]["inputs"] is None
    assert saved["num_examples"] == len(text_rows()) and saved["model"] == str(text_folder)
    assert "noise in weights" in said and "noise in activations" in said and HEAD in said and str(out) in said
    for gap in saved["layers"][HEAD]["weight"]["gaps"]:
        assert gap["first_order_gap"] == pytest.approx(abs(gap["measured"] - gap["first"]))
    assert json.loads(output_of("neighbourhood", text_folder, "--data", text_file, *layers, "--json")) == saved
    other = json.loads(output_of("neighbourhood", text_folder, "--data", text_file, *layers, "--json", "--seed", 1))
    assert other["layers"] != saved["layers"]


def test_neighbourhood_of_an_image_model(output_of: OutputOf, image_folder: Path, image_file: Path) -> None:
    options = ("--samples", 4, "--task", "image-classification", "--json")
    found = json.loads(output_of("neighbourhood", image_folder, "--data", image_file, *options))
    assert found["num_examples"] == 4
    assert len(found["layers"]) == 8 and HEAD in found["layers"]  # spread over all
    for layer in found["layers"].values():
        for response in layer.values():
            assert response["second_order_until"] is not None
            assert response["gaps"][0]["second_order_gap"] < 1e-5


def test_neighbourhood_of_rows_without_labels(output_of: OutputOf, text_folder: Path, tmp_path: Path) -> None:
    rows = tmp_path / "bare.csv"
    datasets.Dataset.from_list(without(text_rows(), "label")).to_csv(rows)
    found = json.loads(output_of("neighbourhood", text_folder, "--data", rows, "--layer", HEAD, "--json"))
    assert found["loss"] < math.log(3)  # of the model's own predictions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--layer", "nowhere"), "--layer 'nowhere' names none of the model's 17 layers"),
        (("--samples", 0), "num_samples=0 is not a whole number of at least 1"),
        (("--task", "image-classification"), "which does not do the task image-classification"),
    ],
    ids=["layer", "samples", "task"],
)
def test_neighbourhood_says_what_is_wrong(
    options: tuple[object, ...],
    message: str,
    text_folder: Path,
    text_file: Path,
    tmp_path: Path,
    run: Run,
) -> None:
    arguments = ("neighbourhood", text_folder, "--data", text_file, "--out", tmp_path / "out", *options)
    status, _, complaint = run(*arguments)
    assert status == 1 and message in complaint
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def many_rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Rows to compress with, and others to certify on."""
    rows = three_splits(datasets.Dataset.from_list(text_rows(2000, seed=1)), 7, (0.1, 0.1, 0.8))
    folder = tmp_path_factory.mktemp("many")
    rows.calibration.to_json(folder / "rows.jsonl")
    rows.certification.to_json(folder / "held-out.jsonl")
    return folder / "rows.jsonl", folder / "held-out.jsonl"


def test_from_compress_to_certify(
    output_of: OutputOf,
    run: Run,
    text_folder: Path,
    many_rows: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hf_lossless.certified_search.SEARCH_STEPS", 2)
    (rows, held_out), out = many_rows, tmp_path / "small"
    settings = ("--tolerance", 0.02, "--confidence", 0.9, "--metric-margin", 0.01)
    split = ("--certification-data", held_out, "--samples", 32, "--bits", "4,8,16")
    said = output_of("compress", text_folder, "--data", rows, "--out", out, *settings, *split)
    certificate = SavedFolder.read(out).entry.certificate
    assert certificate.passed and certificate.paragraph() in said and "Not smaller: " in said
    assert (certificate.evidence.tolerance, certificate.evidence.confidence) == (0.02, 0.9)
    assert certificate.evidence.metric_margin == 0.01
    assert f"certificate: {certificate.verdict}" in output_of("inspect", out)
    assert json.loads(output_of("inspect", out, "--json"))["certificate"] == certificate.to_dict()

    check = ("certify", out, "--against", text_folder, "--data", held_out)
    again = Certificate.from_dict(json.loads(output_of(*check, *settings, "--json")))
    assert again.evidence == certificate.evidence
    assert again.provenance.calibration_rows is None
    assert again.provenance.data_fingerprint == certificate.provenance.data_fingerprint
    assert again.paragraph() in output_of(*check, *settings)

    for options, message in (
        (("--tolerance", -0.5), "the loss is not shown to have fallen by more than 0.5 of the original's"),
        (("--data", rows), "rows are fewer than the 500 that a certificate takes"),
    ):
        status, said, _ = run(*check, *options)
        assert status == 1 and message in said


def test_no_certificate_for_want_of_rows_is_no_error(output_of: OutputOf, text_folder: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    datasets.Dataset.from_list(text_rows(60)).to_json(rows)
    said = output_of("compress", text_folder, "--data", rows, "--out", tmp_path / "small")
    assert "Not certified: " in said and "are fewer than the 500 that a certificate takes" in said
    assert not SavedFolder.read(tmp_path / "small").entry.certificate.passed


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("original", "holds no model compressed by hf_lossless"),
        ("unlabelled", "A certificate needs labels: rename a column"),
        ("confidence", "confidence=1.5 is not between 0 and 1"),
        ("nan", "the loss is nan on row 0"),
    ],
)
def test_certify_says_what_is_wrong(
    output_of: OutputOf,
    case: str,
    message: str,
    text_folder: Path,
    text_file: Path,
    tmp_path: Path,
    run: Run,
) -> None:
    out, rows, options = tmp_path / "small", text_file, ()
    output_of("compress", text_folder, "--data", text_file, "--out", out, "--ratio", 2, "--bits", "8")
    if case == "original":
        out = text_folder
    if case == "unlabelled":
        rows = tmp_path / "rows.jsonl"
        datasets.Dataset.from_list(without(text_rows(), "label")).to_json(rows)
    if case == "confidence":
        options = ("--confidence", 1.5)
    if case == "nan":
        tensors = load_file(out / "model.safetensors")
        tensors["classifier.bias"][0] = torch.nan
        save_file(tensors, out / "model.safetensors", {"format": "pt"})
    status, _, complaint = run("certify", out, "--against", text_folder, "--data", rows, *options)
    assert status == 1 and message in complaint


def test_demo(output_of: OutputOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it does is in test_demo.py; here, where it does it."""
    folders: list[Path] = []
    monkeypatch.setattr(demo, "run_demo", lambda out, console: folders.append(out))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    output_of("demo", "--out", tmp_path / "out")
    output_of("demo")
    assert folders[0] == tmp_path / "out"
    assert folders[1].parent == tmp_path and not list(folders[1].iterdir())


def test_python_m() -> None:
    result = subprocess.run([sys.executable, "-m", "hf_lossless", "--help"], capture_output=True, text=True, check=True)
    for command in ("demo", "compress", "evaluate", "certify", "inspect", "neighbourhood"):
        assert command in result.stdout
    assert result.stderr == ""


@pytest.mark.slow
def test_minilm_is_six_times_smaller_and_no_worse(output_of: OutputOf, tmp_path: Path, assets: Path) -> None:
    model = assets / "minilm-sst2"
    out, test = tmp_path / "small", tmp_path / "test.jsonl"
    test.write_text("".join((model / "test.jsonl").read_text().splitlines(keepends=True)[:800]))
    options = ("--ratio", 6, "--bits", "4,8", "--samples", 64)
    output_of("compress", model, "--data", model / "validation.jsonl", "--out", out, *options)
    held_out = json.loads(output_of("evaluate", out, "--data", test, "--against", model, "--json"))
    assert held_out["ratio"] >= 6
    assert held_out["loss"] <= held_out["original"]["loss"] + 0.01
    assert held_out["accuracy"] >= held_out["original"]["accuracy"] - 0.01
