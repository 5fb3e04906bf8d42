"""What the README shows is run: its Python, its shell commands, its tables."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from tiny_checkpoints import save_text_model, text_rows
from tiny_models import LABELS, TinyModel
from tiny_models import TINY_MODELS as MODELS
from transformers import AutoModelForSequenceClassification, BertConfig

from hf_lossless.cli import main as cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = typer.main.get_command(cli.app).commands


def blocks(marker: str) -> list[str]:
    """The fenced blocks after `<!-- marker -->`."""
    return re.findall(rf"^<!-- {re.escape(marker)} -->\n```\w+\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def table(heading: str) -> list[list[str]]:
    """The rows of the table that has this heading in its first column, without marks of code."""
    [body] = re.findall(rf"^\| {re.escape(heading)} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", README, re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines()]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the files that the README names."""
    monkeypatch.chdir(tmp_path)
    vocabulary = 2000  # most of the bytes are in the embedding, so that ratio 6 is within reach
    config = BertConfig(
        **{**MODELS["bert"].config.to_diff_dict(), "vocab_size": vocabulary, "num_labels": LABELS},
    )
    tiny = MODELS["bert"]
    save_text_model(tmp_path / "my-model", TinyModel(tiny.auto_class, tiny.model_class, config, tiny.make_batch))
    for seed, (name, count) in enumerate({"validation.jsonl": 80, "test.jsonl": 700}.items()):
        rows = text_rows(count, seed, vocabulary)
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_quick_start(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [code] = blocks("quickstart")
    names: dict[str, object] = {}
    exec(code, names)
    model, again = names["model"], names["again"]
    assert again.config.quantization_config.plan == model.config.quantization_config.plan
    assert again.config.quantization_config.certificate == model.config.quantization_config.certificate
    assert again.config.quantization_config.plan.original_bytes / again.config.quantization_config.size_bytes > 1
    assert capsys.readouterr().out.startswith("Not certified: ")  # of so few rows
    [code] = blocks("report")
    exec(code, names)
    assert Path("report.html").read_text(encoding="utf-8").count("<img ") == 3


def test_modules(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    codes = blocks("module")
    assert codes
    names: dict[str, object] = {}
    for code in codes:  # each goes on where the one before ended
        exec(code, names)
    assert float(capsys.readouterr().out.split()[0]) >= 4


def test_shell_commands(workplace: Path) -> None:
    [compress], [export], [entropy] = blocks("cli"), blocks("export"), blocks("entropy")
    commands = compress + export + entropy
    scripts = str(Path(sys.executable).parent)  # where hf-lossless is installed
    environment = {**os.environ, "PATH": os.pathsep.join([scripts, os.environ["PATH"]])}
    result = subprocess.run(["bash", "-euc", commands], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    for word in (
        "times smaller",
        "compressed",
        "original",
        "everything else",
        "KL divergence",
        "certificate",
        "format dense",
        "the certificate stays with my-model-small",
    ):
        assert word in result.stdout
    for folder in ("my-model-small", "my-model-dense", "my-model-coded"):
        assert AutoModelForSequenceClassification.from_pretrained(workplace / folder) is not None
    assert "certificate" in (workplace / "my-model-small/config.json").read_text()
    assert "certificate" not in (workplace / "my-model-dense/config.json").read_text()


def test_the_table_of_commands_lists_each_with_its_arguments() -> None:
    rows = table("command")
    assert {re.match(r"`hf-lossless (\w+)", row[0])[1] for row in rows} == COMMANDS.keys()
    for usage, meaning in rows:
        command = COMMANDS[usage.split()[1]]
        known = {option for parameter in command.params for option in parameter.opts}
        assert set(re.findall(r"--[\w-]+", usage + meaning)) <= known, usage


def test_the_table_of_options_lists_those_of_compress() -> None:
    rows = table("option of `compress`")
    named = {option: row for row in rows for option in re.findall(r"--[\w-]+", row[0])}
    [usage] = [row for row in table("command") if row[0].startswith("`hf-lossless compress")]
    named_above = set(re.findall(r"--[\w-]+", " ".join(usage)))
    options = {
        parameter.opts[0]: parameter
        for parameter in COMMANDS["compress"].params
        if parameter.param_type_name == "option"
    }
    assert named.keys() | named_above == options.keys()
    assert not named.keys() & named_above
    for name, (options_cell, default, _) in named.items():
        listed = re.findall(r"--[\w-]+", options_cell)
        cells = [cell.strip(" `") for cell in (default.split(", ") if len(listed) > 1 else [default])]
        actual = options[name].default
        if isinstance(actual, bool):
            actual = "on" if actual else "off"
        if actual is not None:  # else the cell says in words what happens
            assert cells[listed.index(name)] == str(actual), name


def test_the_set_up_commands_are_those_that_ci_runs() -> None:
    script = (ROOT / ".ci/run").read_text()
    [function] = re.findall(r"^readme_command\(\) \{.*?^\}$", script, re.DOTALL | re.MULTILINE)
    for name in ("demo", "tests"):
        [command] = blocks(f"setup: {name}")
        assert f'"$(readme_command {name})"' in script
        extracted = subprocess.run(
            ["bash", "-euc", f"{function}\nreadme_command {name}"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert extracted.stdout == command
        assert len(command.splitlines()) == 1
    assert set(re.findall(r"^<!-- setup: (\w+) -->$", README, re.MULTILINE)) == {"demo", "tests"}
