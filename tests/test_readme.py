"""What the READMEs show is run: their Python, their shell commands, their tables; their links lead somewhere."""

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from readmes import PACKAGE, READMES, ROOT, blocks, snippets
from tiny_checkpoints import save_text_model, text_rows
from tiny_models import LABELS, TinyModel
from tiny_models import TINY_MODELS as MODELS
from transformers import AutoModelForSequenceClassification, BertConfig

from hf_lossless.cli import main as cli

TOP = READMES[ROOT / "README.md"]
LARGEST = 9216
COMMANDS = typer.main.get_command(cli.app).commands
RUN = {
    *("setup: demo", "setup: tests"),  # by .ci/run
    *("quickstart", "optimize", "report", "module", "cli", "export", "entropy"),  # here
    "push",  # in reports/hub/test_push.py, where there is a Hub
}


def table(heading: str) -> list[list[str]]:
    """The rows of the table that has this heading in its first column."""
    pattern = re.compile(rf"^\| {re.escape(heading)} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", re.MULTILINE)
    [body] = [match[1] for text in PACKAGE.values() for match in pattern.finditer(text)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines()]


def recorded(name: str) -> Any:
    return json.loads((ROOT / "recipes/benchmarks" / name).read_text(encoding="utf-8"))


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the files that the READMEs name."""
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


def test_every_snippet_has_the_marker_of_a_test_that_runs_it() -> None:
    assert {marker for marker, _ in snippets()} == RUN
    assert len(snippets()) == sum(text.count("```python\n") + text.count("```bash\n") for text in PACKAGE.values())


def test_the_top_is_short() -> None:
    assert len(TOP.encode()) <= LARGEST


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_to_files_and_headings_that_are_there(path: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", READMES[path], flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, heading = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists() and target.is_relative_to(ROOT), link
        if heading:
            assert heading in headings(target), link


def headings(path: Path) -> set[str]:
    """The names under which GitHub reaches the headings of a file."""
    lines = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


def test_the_table_of_figures_shows_what_was_recorded() -> None:
    limits, peers = recorded("information_limit.json")["models"], recorded("compare.json")["models"]
    shown = table("held-out rows")
    for name in ("minilm-sst2", "vit-fashion-mnist", "resnet-fashion-mnist"):
        original, fixed, like_fixed, entropy, like_entropy = (shown.pop(0) for _ in range(5))
        assert original[0] == f"{name}, {limits[name]['test_rows']:,}"
        assert original[2:6] == figures({"ratio": 1, **limits[name]["original"]}, "1", "")
        for row, storage, ratio, peer_row in ((fixed, "fixed", 6, like_fixed), (entropy, "entropy", 12, like_entropy)):
            ours = limits[name]["storages"][storage][str(ratio)]
            assert row[2:6] == figures(ours, f"{ours['ratio']:.1f}", str(ours["flips"]))
            reaching = [peer for peer in peers[name]["peers"] if peer.get("ratio", 0) >= ratio]
            best = min(reaching, key=lambda peer: peer["kl"])
            assert best["peer"].startswith(peer_row[1].strip("*"))
            assert peer_row[2:6] == figures(best, f"{best['ratio']:.1f}", str(best["flips"]))
    assert not shown


def figures(row: dict[str, Any], ratio: str, flips: str) -> list[str]:
    return [ratio, f"{row['loss']:.4f}", f"{row['metric']:.4f}", flips]


def test_what_it_costs_is_what_was_recorded() -> None:
    core, runtime = recorded("core.json")["minilm-sst2"], recorded("runtime.json")
    seconds = {name: one["seconds"] for name, one in core["reload"].items()}
    times = [one["ratio"] for one in core["forward_milliseconds"].values()]
    load_fixed, run_fixed = (
        f"{seconds['compressed'] / seconds['original']:.1f}",
        f"{min(times):.1f} to {max(times):.1f}",
    )
    rows, model = {}, ""
    for row in table("held-out rows"):
        model = row[0].split(",")[0] or model
        rows[model, row[1]] = row[6:]
    assert rows["minilm-sst2", "fixed widths"] == [load_fixed, run_fixed]
    text = " ".join(TOP.split())
    assert f"it loads {load_fixed} times and runs {run_fixed} times as long" in text
    for model in ("minilm-sst2", "vit-fashion-mnist", "resnet-fashion-mnist"):
        original, auto = (runtime[model]["memory"][name] for name in ("original", "coded, auto"))
        ratios = [of_shape["coded, auto"]["ratio"] for of_shape in runtime[model]["time"].values()]
        run = f"{min(ratios):.2f} to {max(ratios):.2f}"
        assert rows[model, "entropy-coded"] == [f"{auto['load_s'] / original['load_s']:.1f}", run]
        if model == "minilm-sst2":
            assert f"loads in {auto['load_s']} s for {original['load_s']} s and then takes {run} of" in text
            assert f"({auto['run_mb']:.0f} MB for {original['run_mb']:.0f})" in text
            assert f"KL of {runtime[model]['divergence']['coded, auto']['kl']:.1e} more" in text


def test_quick_start(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [code] = blocks("quickstart")
    names: dict[str, Any] = {}
    exec(code, names)
    model, again = names["model"], names["again"]
    assert again.config.quantization_config.plan == model.config.quantization_config.plan
    assert again.config.quantization_config.certificate == model.config.quantization_config.certificate
    assert again.config.quantization_config.plan.original_bytes / again.config.quantization_config.size_bytes > 1
    tensors = model.state_dict()
    assert again.state_dict().keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in again.state_dict().items())
    assert capsys.readouterr().out.startswith("Not certified: ")  # of so few rows
    [code] = blocks("optimize")
    exec(code, names)
    [code] = blocks("report")
    exec(code, names)
    assert Path("report.html").read_text(encoding="utf-8").count("<img ") == 3


def test_modules(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for code in blocks("module"):  # each goes on where the one before ended
        exec(code, names)
    inputs = torch.randn(4, 64)
    assert torch.allclose(names["again"](inputs), names["model"](inputs))
    assert float(capsys.readouterr().out.split()[0]) >= 4


def arguments_as_a_shell_gives_them(commands: str, tmp_path: Path) -> list[list[str]]:
    """What each `hf-lossless` in them is called with."""
    program, said = tmp_path / "bin/hf-lossless", tmp_path / "said"
    program.parent.mkdir()
    program.write_text(f"#!/usr/bin/env bash\nprintf '%s\\0' \"$@\" >> {said}\necho >> {said}\n")
    program.chmod(0o755)
    environment = {**os.environ, "PATH": os.pathsep.join([str(program.parent), os.environ["PATH"]])}
    subprocess.run(["bash", "-euc", commands], env=environment, check=True)
    return [line.split("\0")[:-1] for line in said.read_text().splitlines()]


def test_shell_commands(workplace: Path, output_of: Callable[..., str]) -> None:
    [compress], [export], [entropy] = blocks("cli"), blocks("export"), blocks("entropy")
    calls = arguments_as_a_shell_gives_them(compress + export + entropy, workplace)
    assert len(calls) == sum(line.startswith("hf-lossless ") for line in (compress + export + entropy).splitlines())
    said = "".join(output_of(*arguments) for arguments in calls)
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
        assert word in said
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
