"""Folders appear whole or not at all; what is refused on reading is in test_errors.py."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_lossless import CheckpointError, LosslessCompressionConfig, compress
from hf_lossless.checkpoints.files import new_folder, refuse_occupied
from hf_lossless.checkpoints.guards import guard_names, state_dict_with_guards


def test_a_folder_takes_its_name_when_all_went_well(tmp_path: Path) -> None:
    target = tmp_path / "a/b/small"
    with new_folder(target) as folder:
        (folder / "letter.txt").write_text("dear")
        assert not target.exists()
        assert folder.parent == target.parent and folder.name.startswith(".small.")
    assert [path.name for path in target.parent.iterdir()] == ["small"]
    assert (target / "letter.txt").read_text() == "dear"
    assert stat.S_IMODE(target.stat().st_mode) == 0o755


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), new_folder(tmp_path / "small") as folder:
        (folder / "half.txt").write_text("de")
        raise error
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    with new_folder(tmp_path / "small") as folder:
        (folder / "letter.txt").write_text("dear")
    assert (tmp_path / "small/letter.txt").exists()


def test_the_current_folder_if_it_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with new_folder(".") as folder:
        (folder / "letter.txt").write_text("dear")
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    assert (tmp_path / "here/letter.txt").exists()


def test_an_occupied_target_is_refused(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    for target in (tmp_path, tmp_path / "letter.txt"):
        with pytest.raises(CheckpointError, match=r"exists and is not empty\. Remove it, or name another one"):
            refuse_occupied(target)
        with pytest.raises(CheckpointError, match=r"exists and is not empty"), new_folder(target):
            pytest.fail("the block must not run")
    assert (tmp_path / "letter.txt").read_text() == "dear"


def test_a_target_that_comes_meanwhile_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "small"
    with pytest.raises(CheckpointError, match=r"exists and is not empty"), new_folder(target):
        target.mkdir()
        (target / "letter.txt").write_text("dear")
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
    assert (target / "letter.txt").read_text() == "dear"


def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(CheckpointError, match=r"letter\.txt is not a folder that you may write to\. Name another one"):
        refuse_occupied(tmp_path / "letter.txt/a/b")
    (tmp_path / "closed").mkdir(mode=0o555)
    if not os.access(tmp_path / "closed", os.W_OK):  # root may write anywhere
        with pytest.raises(CheckpointError, match=r"closed is not a folder that you may write to"):
            refuse_occupied(tmp_path / "closed/small")


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_a_process_that_ends_in_the_middle(tmp_path: Path, signal_number: signal.Signals) -> None:
    script = """
import sys, time
from hf_lossless.checkpoints.files import new_folder
with new_folder(sys.argv[1]) as folder:
    (folder / "half.txt").write_text("de")
    print("half", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "small")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout.readline() == "half\n"
        process.send_signal(signal_number)
    left = [path.name for path in tmp_path.iterdir()]
    assert all(name.startswith(".small.") for name in left)
    assert len(left) == (1 if signal_number == signal.SIGKILL else 0)


def test_each_compressed_layer_has_a_guard() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3))
    batch = (torch.randn(4, 8), torch.tensor([0, 1, 2, 0]))
    settings = LosslessCompressionConfig(ratio=1, bits=(4,), modules_to_not_convert=["2"])
    compress(model, [batch], settings)
    assert guard_names(model) == {"0.weight"}
    tensors = state_dict_with_guards(model)
    assert tensors.keys() == model.state_dict().keys() | {"0.weight"}
    assert tensors["0.weight"].shape == (0,)
