"""Saved folders in a new process: hf_lossless loads what was saved, and transformers alone refuses it by name."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers as hf
from new_process import run_python
from round_trips import assert_same_outputs, outputs_of
from tiny_exports import all_kinds, all_widths, save_compressed
from tiny_models import TINY_MODELS, TinyModel

from hf_lossless import LosslessCompressionConfig
from hf_lossless.checkpoints.entry import DEMAND

BERT, GPT2, RESNET = (TINY_MODELS[name] for name in ("bert", "gpt2", "resnet"))


@dataclass(frozen=True)
class Saved:
    """A compressed model and the folder that it was saved to."""

    tiny: TinyModel
    folder: Path
    model: hf.PreTrainedModel


def by_compression(**settings) -> Callable[[TinyModel, Path], hf.PreTrainedModel]:
    def save(tiny: TinyModel, folder: Path) -> hf.PreTrainedModel:
        tiny.build().save_pretrained(folder / "original")
        config = LosslessCompressionConfig(dataset=[tiny.batch(4, seed) for seed in (0, 1)], **settings)
        model = tiny.auto_class.from_pretrained(folder / "original", quantization_config=config)
        model.save_pretrained(folder)
        return model

    return save


def by_hand(plan) -> Callable[[TinyModel, Path], hf.PreTrainedModel]:
    return lambda tiny, folder: save_compressed(tiny, folder, plan)


CODED = {"storage": "entropy", "bits": (4,), "loss_budget": 1e9}
CASES = {
    "every-kind": (BERT, by_hand(all_kinds)),
    "grids-resnet": (RESNET, by_hand(all_widths())),
    "grids-gpt2": (GPT2, by_hand(all_widths())),
    "coded-gpt2": (GPT2, by_compression(**CODED)),
    "coded-inputs": (BERT, by_compression(**CODED, activation_bits=(8,))),
    "inputs": (BERT, by_compression(bits=(2,), activation_bits=(4, 8), group_size=16, ratio=1.2)),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    root = tmp_path_factory.mktemp("saved")
    return {name: Saved(tiny, root / name, save(tiny, root / name)) for name, (tiny, save) in CASES.items()}


LOAD = """
import sys, torch, transformers, hf_lossless
for job in torch.load(sys.argv[1]):
    model = getattr(transformers, job["class"]).from_pretrained(job["folder"])
    with torch.no_grad():
        torch.save(model(**job["inputs"]).logits, f"{job['folder']}/logits")
"""


def test_a_new_process_has_the_same_models(saved: dict[str, Saved], tmp_path: Path):
    jobs = [
        {"class": one.tiny.auto_class.__name__, "folder": str(one.folder), "inputs": one.tiny.inputs()}
        for one in saved.values()
    ]
    torch.save(jobs, tmp_path / "jobs")
    done = run_python(LOAD, tmp_path / "jobs")
    assert done.returncode == 0, done.stderr
    for one in saved.values():
        assert_same_outputs(torch.load(one.folder / "logits"), outputs_of(one.model, one.tiny.inputs()))


REFUSE = """
import sys, transformers
for name, folder, settings in (line.split("\\t") for line in open(sys.argv[1]).read().splitlines()):
    try:
        getattr(transformers, name).from_pretrained(folder, **({"ignore_mismatched_sizes": True} if settings else {}))
    except ValueError as error:
        print("refused:", error)
    else:
        print("loaded:", name, folder, settings)
assert "hf_lossless" not in sys.modules
"""


def test_transformers_alone_refuses_the_folders_by_name(saved: dict[str, Saved], tmp_path: Path):
    """Whatever else is asked: with `ignore_mismatched_sizes` it would fill in random weights."""
    classes = [(type(one.model).__name__, one.folder) for one in saved.values()]
    classes += [(name, saved["every-kind"].folder) for name in ("AutoModel", "BertForTokenClassification")]
    jobs = [f"{name}\t{folder}\t{settings}" for name, folder in classes for settings in ("", "ignoring sizes")]
    (tmp_path / "jobs").write_text("\n".join(jobs))
    done = run_python(REFUSE, tmp_path / "jobs")
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == len(jobs)
    assert all(line.startswith("refused: ") and DEMAND in line for line in said), said
