"""The folder of models and data: the flag, the variable, and what is said where neither leads anywhere."""

import argparse
import subprocess
import sys
from pathlib import Path

import assets as benchmark_assets
import pytest

BENCHMARKS = Path(benchmark_assets.__file__).parent
NAMES = sorted(path.stem for path in BENCHMARKS.glob("*.py") if '__name__ == "__main__"' in path.read_text())
NEED_NONE = {"decoding", "imports", "runtime"}


def folder_of(*options: str) -> Path:
    parser = argparse.ArgumentParser()
    benchmark_assets.add_assets_option(parser)
    return benchmark_assets.assets_folder(parser, parser.parse_args(options))


def test_the_flag_wins_over_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_LOSSLESS_ASSETS", str(tmp_path))
    assert folder_of() == tmp_path
    (tmp_path / "other").mkdir()
    assert folder_of("--assets", str(tmp_path / "other")) == tmp_path / "other"


@pytest.mark.parametrize("value", [None, ""], ids=["unset", "empty"])
def test_neither(value: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("HF_LOSSLESS_ASSETS", raising=False)
    if value is not None:
        monkeypatch.setenv("HF_LOSSLESS_ASSETS", value)
    with pytest.raises(SystemExit):
        folder_of()
    assert "Give --assets DIR, or set HF_LOSSLESS_ASSETS=DIR" in capsys.readouterr().err


def test_a_folder_that_is_not_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_LOSSLESS_ASSETS", "nowhere")
    with pytest.raises(SystemExit):
        folder_of()
    assert "there is no folder 'nowhere'" in capsys.readouterr().err


def test_every_script_shows_its_help_in_any_folder(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", HELP_OF_ALL, str(BENCHMARKS), *NAMES], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert set(NAMES) > NEED_NONE
    assert result.stdout.count("--assets DIR ") == len(NAMES) - len(NEED_NONE)


HELP_OF_ALL = """
import runpy, sys
_, folder, *names = sys.argv
sys.path[0] = folder  # as Python does for a script in it
for name in names:
    sys.argv = [name, "--help"]
    try:
        runpy.run_path(f"{folder}/{name}.py", run_name="__main__")
    except SystemExit as end:
        assert not end.code, name
"""
