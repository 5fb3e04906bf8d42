"""The demo from beginning to end; all the tests share one run."""

import io
import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from rich.console import Console
from round_trips import assert_same_model
from transformers import AutoModelForImageClassification

from hf_lossless import html_report
from hf_lossless.certification.evaluation import Evaluation, evaluate
from hf_lossless.checkpoints.saved_folder import SavedFolder
from hf_lossless.cli import demo
from hf_lossless.data.tasks.image_classification import ImageClassification
from hf_lossless.errors import CheckpointError

MARGIN = 0.01
"""Nats that the held-out loss may rise by; its standard error on 741 digits is about 0.003."""


@dataclass(frozen=True)
class DemoRun:
    folder: Path
    said: str


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> DemoRun:
    console = Console(file=io.StringIO(), width=120)
    folder = tmp_path_factory.mktemp("demo") / "out"
    demo.run_demo(folder, console)
    return DemoRun(folder, console.file.getvalue())


def test_files(demo_run: DemoRun) -> None:
    assert {path.name for path in demo_run.folder.iterdir()} == {"original", "compressed", "frontier.png"}
    assert [path.name for path in demo_run.folder.parent.iterdir()] == ["out"]
    for name in ("original", "compressed"):
        files = {path.name for path in (demo_run.folder / name).iterdir()}
        expected = {"config.json", "model.safetensors", "preprocessor_config.json"}
        assert files == expected | ({"compression.json"} if name == "compressed" else set())
    assert (demo_run.folder / "frontier.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_sizes(demo_run: DemoRun) -> None:
    entry = SavedFolder.read(demo_run.folder / "compressed").entry
    assert entry.plan.original_bytes / entry.size_bytes >= 3
    on_disk = {
        name: (demo_run.folder / name / "model.safetensors").stat().st_size for name in ("original", "compressed")
    }
    assert on_disk["original"] / on_disk["compressed"] > 3  # headers are not counted in the ratio
    assert f"{entry.size_bytes:,}" in demo_run.said


def test_a_reload_is_the_same_model(demo_run: DemoRun) -> None:
    one, other = (AutoModelForImageClassification.from_pretrained(demo_run.folder / "compressed") for _ in range(2))
    pixels = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert_same_model(one, other, {"pixel_values": pixels})
    assert "tensors equal the saved one's, bit for bit, and its outputs to within rounding" in demo_run.said


def test_a_reload_that_differs_is_an_error(demo_run: DemoRun) -> None:
    one, other = (AutoModelForImageClassification.from_pretrained(demo_run.folder / "original") for _ in range(2))
    batch = {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    demo._refuse_difference(one, other, batch)
    other.classifier.register_forward_hook(lambda module, inputs, output: output * (1 + 1e-6))
    demo._refuse_difference(one, other, batch)  # as much as rounding may do
    other.classifier.register_forward_hook(lambda module, inputs, output: output + 0.5)
    with pytest.raises(CheckpointError, match=r"outputs differ from the saved one's by up to 0\.5, .* Please report"):
        demo._refuse_difference(one, other, batch)
    other.classifier.bias.data[0] += 1e-7
    with pytest.raises(CheckpointError, match=r"^1 of .* tensors differ .* 'classifier\.bias'\. Please report"):
        demo._refuse_difference(one, other, batch)
    other.half()
    with pytest.raises(CheckpointError, match=rf"^{len(other.state_dict())} of the reloaded model's tensors differ"):
        demo._refuse_difference(one, other, batch)


def test_the_held_out_loss_did_not_rise(demo_run: DemoRun) -> None:
    *others, held_out = demo._digits()
    assert [*map(len, others), len(held_out)] == [800, 128, 128, 741]
    task = ImageClassification()
    evaluations: dict[str, Evaluation] = {}
    for name in ("original", "compressed"):
        folder = str(demo_run.folder / name)
        evaluations[name] = evaluate(task.load_model(folder), held_out, task, task.load_processor(folder))
        assert f"{evaluations[name].loss:.4f}" in demo_run.said
    assert evaluations["compressed"].loss <= evaluations["original"].loss + MARGIN
    assert evaluations["original"].metric > 0.93
    assert evaluations["compressed"].metric >= evaluations["original"].metric - 0.02


def test_it_is_certified(demo_run: DemoRun) -> None:
    certificate = SavedFolder.read(demo_run.folder / "compressed").entry.certificate
    assert certificate.passed, certificate.verdict
    assert certificate.paragraph() in demo_run.said and "Not smaller: " in demo_run.said
    assert certificate.evidence.num_rows == 741


def test_digits_are_disjoint() -> None:
    splits = demo._digits()
    images = [[image["image"].tobytes() for image in split] for split in splits]
    everything = [image for split in images for image in split]
    assert len(everything) == 1797
    assert len(set(everything)) >= 1790  # a few digits are written alike


def test_every_plan_of_the_walk_is_in_its_record(demo_run: DemoRun) -> None:
    record, plan = (
        SavedFolder.read(demo_run.folder / "compressed").record,
        SavedFolder.read(demo_run.folder / "compressed").entry.plan,
    )
    finished = [check for check in record.checks if check.checked == "model"]
    assert len(finished) > 5 and len({check.tensor_bytes for check in finished}) == len(finished)
    assert finished[-1].tensor_bytes == record.chosen[0] == plan.tensor_bytes
    assert finished[-1].measured_loss_change == record.measured_loss_change
    assert f"Not smaller: {record.not_smaller}." in demo_run.said
    assert html_report(demo_run.folder / "compressed").count("<img ") == 3


def test_numbers_that_are_shown_are_numbers(demo_run: DemoRun) -> None:
    rows = re.findall(
        r"│ (original|compressed) +│ +([\d,]+) │ +([\d.]+) │ +([\d.]+) │ +([\d.]+) │ +([\d.]+) │ +741 │", demo_run.said
    )
    assert "top_5_accuracy" in demo_run.said
    assert [row[0] for row in rows] == ["original", "compressed"]
    assert json.loads(rows[0][2]) == 1.0
