"""compression.json: made of a compression, written whole, read strictly."""

import json
import math
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hand_made_folders import LAYERS, plan_of, record_for, save_folder
from torch import nn

from hf_lossless import CheckpointError, LosslessCompressionConfig, compress
from hf_lossless.checkpoints.record import (
    FILE_NAME,
    MAX_POINTS,
    plan_in_order,
    record_of,
    write_record,
)
from hf_lossless.checkpoints.saved_folder import SavedFolder
from hf_lossless.compression import CompressionResult
from hf_lossless.planning.knapsack import frontier
from hf_lossless.planning.loss_check import loss_check


def compressed(batches: int = 3, **settings) -> CompressionResult:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 3))
    rows = [(torch.randn(16, 24), torch.randint(0, 3, (16,))) for _ in range(batches)]
    return compress(model, rows, LosslessCompressionConfig(**{"ratio": 5, **settings}))


@pytest.fixture(scope="module")
def result() -> CompressionResult:
    return compressed()


def test_it_says_what_the_result_does(result: CompressionResult) -> None:
    record = record_of(result)
    plan = result.plan
    assert record.chosen == (plan.tensor_bytes, plan.predicted_loss_change)
    assert (record.size_bytes, record.original_bytes) == (result.size_bytes, plan.original_bytes)
    assert record.ratio == result.ratio
    assert record.measured_loss_change == result.measured_loss_change
    assert record.measured_loss_change_error > 0
    assert (record.calibration_rows, record.calibration_loss) == (48, result.calibration.loss)
    assert record.layer_order == tuple(plan.layers) == ("0", "2", "4")
    assert record.bound is None and record.not_smaller is None and record.versions["torch"]


def test_the_finished_model_is_measured_last(result: CompressionResult) -> None:
    checks = record_of(result).checks
    assert checks[-1].checked == "model" and checks[-2].checked == "plan"
    assert all(check.tensor_bytes == result.plan.tensor_bytes for check in checks[-2:])
    assert checks[-1].measured_loss_change == result.measured_loss_change


def test_a_theory_that_is_not_checked_has_the_finished_model_alone() -> None:
    [check] = record_of(compressed(theory="llc")).checks
    assert check.checked == "model"


def test_one_batch_has_no_standard_error() -> None:
    record = record_of(compressed(batches=1))
    assert record.measured_loss_change is not None and record.measured_loss_change_error is None


def test_a_loss_that_is_not_finite_is_none(result: CompressionResult) -> None:
    check = loss_check(result.plan, (math.inf, math.nan), 3)
    record = record_of(replace(result, checks=(check,)))
    assert record.measured_loss_change is None and record.measured_loss_change_error is None
    assert json.loads(record.model_dump_json())["checks"][0]["measured_loss_change"] is None


def test_a_short_frontier_is_kept_whole(result: CompressionResult) -> None:
    record = record_of(result)
    assert len(result.frontier) == record.frontier_plans == len(record.frontier) < MAX_POINTS
    sizes = [size - result.plan.other_bytes for size, _ in record.frontier]
    assert sizes == result.frontier.cost_bytes.tolist()
    assert [loss for _, loss in record.frontier] == pytest.approx(result.frontier.predicted_loss_change.tolist())


def test_a_long_frontier_is_thinned(result: CompressionResult) -> None:
    generator = np.random.default_rng(0)
    costs = np.sort(generator.integers(1, 10**6, (12, 6)), axis=1)
    losses = 1e5 * generator.random((12, 1)) / costs
    long = frontier(costs.tolist(), losses.tolist())
    place = len(long) // 3
    plan = result.plan.model_copy(
        update={
            "layers": {
                "0": LAYERS["kept"].model_copy(
                    update={
                        "cost_bytes": int(long.cost_bytes[place]),
                        "predicted_loss_change": float(long.predicted_loss_change[place]),
                    }
                )
            }
        }
    )
    record = record_of(replace(result, plan=plan, frontier=long))
    everything = dict(
        zip((long.cost_bytes + plan.other_bytes).tolist(), long.predicted_loss_change.tolist(), strict=True)
    )
    assert record.frontier_plans == len(long) > 2 * MAX_POINTS
    assert 100 < len(record.frontier) <= MAX_POINTS
    assert set(record.frontier) <= set(everything.items())
    assert record.chosen in record.frontier
    assert [record.frontier[0][0], record.frontier[-1][0]] == [min(everything), max(everything)]
    steps = np.diff(np.log([size for size, _ in record.frontier]))
    assert steps.max() < 0.1  # no part of the picture is left empty


def test_it_comes_back_as_it_was(tmp_path: Path) -> None:
    plan = plan_of()
    record = record_for(plan, bound=((10, 0.5), (20, 0.25)), not_smaller="there is hardly a smaller plan")
    folder = save_folder(tmp_path / "small", plan, record=record)
    assert SavedFolder.read(folder).record == record
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
    assert stat.S_IMODE((folder / FILE_NAME).stat().st_mode) == 0o644
    write_record(folder, record.model_copy(update={"not_smaller": None}))
    assert SavedFolder.read(folder).record.not_smaller is None


def test_a_folder_without_one(tmp_path: Path) -> None:
    assert SavedFolder.read(save_folder(tmp_path / "small", plan_of())).record is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frontier": []}, r"malformed at frontier: .*Delete .*compression\.json, which only reports need, or take it"),
        ({"frontier": [[5, 0.5], [5, 0.25]]}, r"malformed at frontier: .*bytes do not ascend"),
        ({"frontier": [[5, float("nan")]]}, r"malformed at frontier\.0\.1"),
        ({"bound": [[5, 0.5], [4, 0.25]]}, r"malformed at bound: .*bytes do not ascend"),
        ({"format_version": 2}, r"malformed at format_version"),
        ({"more": 1}, r"malformed at more: .*got 1"),
        ({"calibration_rows": "8"}, r"malformed at calibration_rows"),
        ({"theory": "llc"}, r"is of another plan \(llc, .*than the one in config\.json \(curvature, .*Delete"),
        ({"chosen": [4300, 0.5]}, r"is of another plan \(curvature, predicted change 0\.5\) than .*0\.3125\)"),
    ],
    ids=["empty", "ascent", "nan", "bound", "version", "unknown", "type", "theory", "plan"],
)
def test_what_is_wrong_is_named(change: dict, message: str, tmp_path: Path) -> None:
    plan = plan_of()
    folder = save_folder(tmp_path / "small", plan, record=record_for(plan))
    values = json.loads((folder / FILE_NAME).read_text())
    (folder / FILE_NAME).write_text(json.dumps(values | change))
    with pytest.raises(CheckpointError, match=message):
        _ = SavedFolder.read(folder).record


def test_what_is_no_json(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "small", plan_of())
    (folder / FILE_NAME).write_text("{")
    with pytest.raises(CheckpointError, match=r"compression\.json is not JSON: .*Delete"):
        _ = SavedFolder.read(folder).record
    (folder / FILE_NAME).unlink()
    (folder / FILE_NAME).mkdir()
    with pytest.raises(CheckpointError, match=r"compression\.json cannot be read: .*Delete"):
        _ = SavedFolder.read(folder).record


def test_nothing_is_left_where_it_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = record_for(plan_of())
    with pytest.raises(CheckpointError, match=r"compression\.json cannot be written: No such file or directory"):
        write_record(tmp_path / "nowhere", record)
    (tmp_path / FILE_NAME).write_text("old")

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(CheckpointError, match=r"cannot be written: No space left on device"):
        write_record(tmp_path, record)
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    assert (tmp_path / FILE_NAME).read_text() == "old"


def test_layers_come_in_the_order_of_the_model(tmp_path: Path) -> None:
    names = ("embeddings", "layer.2", "layer.10", "head")
    plan = plan_of({name: LAYERS["kept"] for name in names})
    read = SavedFolder.read(save_folder(tmp_path / "small", plan)).entry.plan
    assert list(read.layers) == ["embeddings", "head", "layer.10", "layer.2"]  # as transformers writes them
    assert list(plan_in_order(read, None).layers) == ["embeddings", "head", "layer.2", "layer.10"]
    assert list(plan_in_order(read, record_for(plan)).layers) == list(names)
    assert plan_in_order(read, record_for(plan)) == plan
