"""Every recipe's `--smoke` with made-up rows; their columns are those of the real ones."""

import runpy
import sys
from pathlib import Path

import datasets
import pytest
import smoke
from tiny_checkpoints import text_rows
from transformers import AutoModelForSequenceClassification

RECIPES = Path(smoke.__file__).parent
NAMES = sorted(path.stem for path in RECIPES.glob("*.py") if "smoke=" in path.read_text() and path.stem != "recipe")


def test_there_is_a_recipe_for_every_family_and_task() -> None:
    assert set(NAMES) >= {
        *("bert_squad", "bert_mnli", "bert_swag", "minilm_sst2", "distilbert_sst2", "roberta_mnli", "gpt2_wikitext"),
        *("vit_imagenet", "deit_imagenet", "resnet_imagenet", "convnext_imagenet"),
    }


def run(name: str, *options: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, options)])
    runpy.run_path(str(RECIPES / f"{name}.py"), run_name="__main__")


@pytest.mark.parametrize("name", NAMES)
def test_smoke(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The recipe itself ends with an error where the loaded model is not the saved one."""
    monkeypatch.delenv("HF_LOSSLESS_ASSETS", raising=False)
    run(name, "--smoke", "--out", tmp_path / "small", monkeypatch=monkeypatch)
    said = capsys.readouterr().out
    assert "times smaller. Loaded again" in said
    assert ("Not certified: " in said) == (name != "minilm_sst2")  # of so few rows, and of random weights
    assert (tmp_path / "small/config.json").is_file()


@pytest.mark.parametrize("rows", [smoke.squad_rows, smoke.swag_rows, smoke.mnli_rows, smoke.sst2_rows])
def test_real_rows_have_the_columns_of_the_made_up_ones(rows, assets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = rows()
    monkeypatch.delenv("HF_LOSSLESS_ASSETS")
    made_up = rows()
    assert len(real) == len(made_up) == smoke.ROWS and real != made_up
    assert set(real[0]) - {"id"} == set(made_up[0])


def test_a_recipe_on_a_model_and_data_of_ones_own(
    text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, out = tmp_path / "rows.jsonl", tmp_path / "small"
    datasets.Dataset.from_list(text_rows(60)).to_json(rows)
    run("bert_mnli", "--model", text_folder, "--data", rows, "--out", out, monkeypatch=monkeypatch)
    assert AutoModelForSequenceClassification.from_pretrained(out).config.quantization_config.plan.layers


def test_a_recipe_needs_a_folder_to_write(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        run("bert_mnli", monkeypatch=monkeypatch)
    assert exit.value.code == 2 and "--out is needed" in capsys.readouterr().err
