"""From rows to a certified model: the search, the walk, what is saved; alone and in two processes."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoints import save_text_model, text_rows, without
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel
from two_processes import in_two_processes

from hf_lossless import CalibrationError, ConfigurationError, DataError, LosslessCompressionConfig, compress
from hf_lossless import certified_search as certified
from hf_lossless.calibration.perturbation import LossChange
from hf_lossless.certification.certify import certify
from hf_lossless.certification.evaluation import answers
from hf_lossless.checkpoints.saved_folder import SavedFolder
from hf_lossless.compression import CompressionResult
from hf_lossless.data.splits import fingerprint, three_splits
from hf_lossless.data.tasks.question_answering import QuestionAnswering
from hf_lossless.data.tasks.registry import TASKS
from hf_lossless.data.tasks.text_classification import TextClassification

TASK = TASKS["text-classification"]
ROWS = text_rows(1800)  # some 1,080 of them certify
STEPS = 5


def compressed(folder: Path, dataset: Any = ROWS, steps: int = 2, **settings: Any) -> PreTrainedModel:
    settings = {"num_samples": 64, "group_size": 16, "bits": (4, 8, 16), **settings}
    config = LosslessCompressionConfig(dataset, **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certified, "SEARCH_STEPS", steps)
        return AutoModelForSequenceClassification.from_pretrained(folder, quantization_config=config)


def result_of(model: PreTrainedModel) -> CompressionResult:
    return model.hf_quantizer.result


@pytest.fixture(scope="module")
def passes() -> Counter[str]:
    """How often models were run over which rows, in the compression below."""
    return Counter()


@pytest.fixture(scope="module")
def model(text_folder: Path, passes: Counter[str]) -> PreTrainedModel:
    """Compressed without a target."""

    def counted(judged: Any, rows: Any, task: Any, processor: Any, what: str) -> Any:
        passes[what] += 1
        return answers(judged, rows, task, processor, what)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certified, "answers", counted)
        return compressed(text_folder, steps=STEPS, bits=(2, 3, 4, 8, 16))


@pytest.fixture(scope="module")
def saved(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certified") / "small"
    model.save_pretrained(folder)
    return folder


def test_no_target_gives_a_certified_model(model: PreTrainedModel) -> None:
    result = result_of(model)
    assert result.certificate is not None and result.certificate.passed, result.certificate
    assert result.ratio > 1.5 and result.not_smaller
    assert result.model is model and not model.training
    assert model.config.quantization_config.certificate == result.certificate


def test_what_it_says_is_what_the_returned_model_does(model: PreTrainedModel, saved: Path, text_folder: Path) -> None:
    """The very tensors that were judged are in the model, before and after saving."""
    rows = three_splits(datasets.Dataset.from_list(ROWS), 0)
    stored = result_of(model).certificate
    made = stored.provenance
    assert made.data_fingerprint == fingerprint(rows.certification)
    assert (made.calibration_rows, made.selection_rows) == (64, len(rows.selection))
    assert (made.theory, made.seed) == ("curvature", 0)
    processor = TASK.load_processor(str(text_folder))
    original = TASK.load_model(str(text_folder))
    one = answers(original, rows.certification, TASK, processor).outputs
    for again in (model, TASK.load_model(str(saved))):
        two = answers(again, rows.certification, TASK, processor).outputs
        assert certify(one, two, made, metric_name="accuracy") == stored


def test_how_often_models_are_run(model: PreTrainedModel, passes: Counter[str]) -> None:
    assert passes["original, selection rows"] == passes["original, certification rows"] == 1
    assert 1 < passes["a plan, selection rows"] <= STEPS + 1
    assert 1 <= passes["a plan, certification rows"] <= passes["a plan, selection rows"]


def test_it_survives_the_disk(model: PreTrainedModel, saved: Path, tmp_path: Path) -> None:
    certificate = result_of(model).certificate
    entry = SavedFolder.read(saved).entry
    assert entry.certificate == certificate
    text = (saved / "config.json").read_text()
    values = json.loads(text)
    del values["quantization_config"]
    tensors = sum(tensor.nbytes for tensor in load_file(saved / "model.safetensors").values())
    said = tensors + len(text) - len(json.dumps(values, indent=2, sort_keys=True) + "\n")
    assert entry.size_bytes == result_of(model).size_bytes == said

    again = AutoModelForSequenceClassification.from_pretrained(saved)
    assert again.config.quantization_config.certificate == certificate
    again.save_pretrained(tmp_path / "again")
    assert SavedFolder.read(tmp_path / "again").entry.certificate == certificate


def test_a_part_of_the_model_has_no_certificate(saved: Path, tmp_path: Path) -> None:
    base = AutoModel.from_pretrained(saved)
    assert base.config.quantization_config.certificate is None
    base.save_pretrained(tmp_path / "base")
    assert SavedFolder.read(tmp_path / "base").entry.certificate is None


def test_the_three_splits_given_separately(text_folder: Path) -> None:
    parts = [text_rows(count, seed) for count, seed in ((80, 1), (150, 2), (700, 3))]
    rows = three_splits(datasets.Dataset.from_list([row for part in parts for row in part]), 0)  # no row in two
    calibration, selection, certification = rows.calibration, rows.selection, rows.certification
    given = compressed(
        text_folder, calibration, selection_dataset=selection, certification_dataset=certification, tolerance=0.05
    )
    certificate = result_of(given).certificate
    assert certificate.provenance.data_fingerprint == fingerprint(certification)
    assert certificate.provenance.selection_rows == len(selection)
    assert certificate.evidence.tolerance == 0.05


@pytest.mark.parametrize("name", ["selection_dataset", "certification_dataset"])
def test_one_split_given_separately(text_folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [{"text": f"{row['text']} w7 w7 w7 w7", "label": row["label"]} for row in text_rows(40, 5)]
    config = LosslessCompressionConfig(ROWS, **{name: given})
    splits = certified._splits(config.rows, TASK)
    rest = splits.certification if name == "selection_dataset" else splits.selection
    assert len(splits.calibration) + len(rest) == len(ROWS)
    assert len(splits.calibration) == pytest.approx(0.2 * len(ROWS), rel=0.25)


@pytest.mark.parametrize("given", [None, "selection_dataset"])
def test_the_questions_on_a_context_are_in_one_split(given: str | None) -> None:
    rows = [
        {"question": f"w{number}", "context": f"w{number % 60} w7", "answers": {"text": ["w7"], "answer_start": [0]}}
        for number in range(300)
    ]
    others = [{**row, "context": f"w9 {row['context']}"} for row in rows[:10]]
    config = LosslessCompressionConfig(rows, **({} if given is None else {given: others}))
    splits = certified._splits(config.rows, QuestionAnswering())
    parts = [set(splits.calibration["context"]), set(splits.certification["context"])]
    assert parts[0] and parts[1] and not parts[0] & parts[1]
    assert len(splits.calibration) > len(parts[0])


def test_too_few_rows_certify_nothing(text_folder: Path) -> None:
    result = result_of(compressed(text_folder, ROWS[:150]))
    assert verdict_of(result).startswith("not certified: ")
    assert "rows are fewer than the 500 that a certificate takes" in verdict_of(result)
    assert "are too few to tell; about" in verdict_of(result)  # how many the margin needs
    assert result.ratio > 1 and result.not_smaller is None


def verdict_of(result: CompressionResult) -> str:
    assert result.certificate is not None
    return result.certificate.verdict


@pytest.mark.parametrize("tolerance", [0, -0.5])
def test_superiority_is_demanded_and_the_text_says_so(text_folder: Path, tolerance: float) -> None:
    certificate = result_of(compressed(text_folder, ROWS[:1200], tolerance=tolerance)).certificate
    assert f"a fall of {abs(tolerance)} of the original's loss was demanded" in certificate.paragraph()
    if tolerance:
        assert f"is not shown to have fallen by more than {-tolerance} of the original's" in certificate.verdict


def refused(folder: Path, error: type[Exception], message: str, dataset: Any = ROWS, **settings: Any) -> None:
    with pytest.raises(error, match=message):
        compressed(folder, dataset, **settings)


def test_rows_that_were_used_before_are_refused(text_folder: Path) -> None:
    held_out, shared = [{"text": f"w9 w9 w9 w9 w9 {row['text']}", "label": 0} for row in text_rows(9, 4)], ROWS[3:5]
    remedy = r"Give rows that were not used before, or one data set"
    for what, given in (
        ("calibration", {"selection_dataset": ROWS[50:60], "certification_dataset": [*held_out, *shared]}),
        ("selection", {"selection_dataset": held_out[:4], "certification_dataset": held_out}),
    ):
        count = len(ROWS[:20]) if what == "calibration" else 4
        message = rf"[24] of (11|9) certification rows are among the {count} {what} rows too, .*{remedy}"
        refused(text_folder, DataError, message, ROWS[:20], **given)


def test_rows_that_cannot_certify(text_folder: Path) -> None:
    bare = without(ROWS, "label")
    message = r"no label column: .*A certificate needs labels \(the targets ratio=, .* do not\)"
    refused(text_folder, DataError, message, bare)
    refused(text_folder, DataError, message, ROWS[:9], selection_dataset=ROWS[20:29], certification_dataset=bare[40:])
    refused(text_folder, DataError, r"3 rows split into .* for calibration, selection and certif", ROWS[:3])
    one_row = {"selection_dataset": ROWS[20:29], "certification_dataset": [{"text": "w5 w5 w5 w6 w6", "label": 1}]}
    refused(
        text_folder, DataError, r"there are 9, 9 and 1 rows .* takes at least 500 .* say ratio=6", ROWS[:9], **one_row
    )
    broken = [{**row, "label": None if index == 9 else row["label"]} for index, row in enumerate(ROWS[:100])]
    refused(text_folder, DataError, r"the label None in column 'label' is not one of the model's 3 labels", broken)


def test_ready_batches_cannot_be_split(text_folder: Path) -> None:
    targets = r"Give one of ratio=, max_bytes=, loss_budget=; or, .* rows as dataset"
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": torch.tensor([0, 1])}
    refused(text_folder, ConfigurationError, rf"tolerance=0\.01 \(the default\), .*{targets}", [batch])
    plain = torch.nn.Sequential(torch.nn.Linear(6, 2))
    with pytest.raises(ConfigurationError, match=targets):
        compress(plain, [(torch.randn(4, 6), torch.tensor([0, 1, 0, 1]))], LosslessCompressionConfig())
    assert type(plain[0]) is torch.nn.Linear


def test_an_original_with_losses_that_are_not_finite(tmp_path: Path) -> None:
    folder = save_text_model(tmp_path / "model")
    broken = AutoModelForSequenceClassification.from_pretrained(folder)
    broken.classifier.bias.data[0] = torch.nan
    broken.save_pretrained(folder)
    refused(folder, CalibrationError, r"the loss is nan on row 0 and not finite on \d+ of \d+ rows\. Check the model's")


def test_a_plan_with_losses_that_are_not_finite(text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no chance, and the others are none the worse for it."""

    def breaking(twin: Any, problem: Any, planned: Any, runtime: Any) -> LossChange:
        change = realise(twin, problem, planned, runtime)
        if planned.plan.original_bytes / planned.plan.tensor_bytes > 2:
            twin.classifier.bias.data[0] = torch.nan
        return change

    realise = certified.realise
    monkeypatch.setattr(certified, "realise", breaking)
    result = result_of(compressed(text_folder))
    assert result.certificate.passed and result.plan.original_bytes / result.plan.tensor_bytes <= 2
    assert "smaller plans" in result.not_smaller or "the next plan" in result.not_smaller


class BalancedAccuracy(TextClassification):
    """A metric that one class leaves undefined."""

    metric_name = "balanced accuracy"
    needs_two_classes = True


def test_a_metric_that_is_undefined_on_one_class(text_folder: Path) -> None:
    original, processor = TASK.load_model(str(text_folder)), TASK.load_processor(str(text_folder))
    rows = datasets.Dataset.from_list([{**row, "label": 1} for row in ROWS[:20]])
    assert answers(original, rows, TASK, processor).outputs.num_rows == 20  # accuracy is defined
    with pytest.raises(DataError, match=r"balanced accuracy needs rows of two classes or more, and all 20 labels are"):
        _ = answers(original, rows, BalancedAccuracy(), processor).outputs


def test_another_theory(text_folder: Path) -> None:
    result = result_of(compressed(text_folder, ROWS[:1500], theory="hawq"))
    assert result.certificate is not None and result.certificate.provenance.theory == "hawq"


# Two processes


def outcome(folder: str) -> dict[str, Any]:
    """Everything that is to agree, JSON-ready."""
    model = compressed(Path(folder), ROWS[:1201])
    result = result_of(model)
    assert result.certificate is not None
    return {
        "certificate": result.certificate.to_dict(),
        "size_bytes": result.size_bytes,
        "not_smaller": result.not_smaller,
        "codes": {name: value.tolist() for name, value in model.state_dict().items() if "codes" in name},
    }


def test_two_processes_pass_the_same_verdict(text_folder: Path, tmp_path: Path) -> None:
    one, two = in_two_processes(outcome, tmp_path, str(text_folder))
    assert one == two
    alone = json.loads(json.dumps(outcome(str(text_folder))))
    assert one["certificate"]["verdict"] == alone["certificate"]["verdict"]
    assert one["certificate"]["provenance"] == alone["certificate"]["provenance"]
    for name in ("original_loss", "original_metric"):
        assert one["certificate"]["evidence"][name]["value"] == pytest.approx(
            alone["certificate"]["evidence"][name]["value"], rel=1e-4
        )
