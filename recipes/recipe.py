"""Runs a recipe: its options, the compression itself, saving, and what is said at the end.

python recipes/bert_squad.py --out small      compress the checkpoint from the Hub, with its data
python recipes/bert_squad.py --smoke          the same on a tiny random model, offline, in seconds
--model DIR, --data DATA [--split NAME]       another checkpoint of the family, other data (hf_lossless/data/README.md)
"""

import argparse
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
from rich.console import Console

from hf_lossless import LosslessCompressionConfig
from hf_lossless.certification.evaluation import evaluate
from hf_lossless.checkpoints.files import new_folder
from hf_lossless.data.rows import load_rows
from hf_lossless.data.tasks.registry import task_of
from hf_lossless.reports.tables import certificate_texts, comparison_table, plan_table

Compress = Callable[[str, datasets.Dataset], Any]
"""From a checkpoint's name and rows to the compressed model."""

SmokeModel = Callable[[Any, Path], datasets.Dataset]
"""Writes a tiny model of an auto class into a folder, and gives rows for it."""

Prepare = Callable[[str, datasets.Dataset], datasets.Dataset]
"""From a checkpoint's name and rows as they came to rows as they are calibrated and judged on."""


def main(
    auto_class: Any,
    model: str,
    data: tuple[str, ...],
    split: str,
    smoke: SmokeModel,
    settings: Mapping[str, Any] | None = None,
    prepare: Prepare = lambda name, rows: rows,
) -> None:
    """Runs a recipe as its options say.

    Args:
        auto_class: Loads the model, as AutoModelForSequenceClassification does.
        model: Hub id of the checkpoint.
        data: Arguments of `datasets.load_dataset`: Hub id of the data set, and which of its configurations.
        split: Which split of it.
        smoke: Makes the tiny model of `--smoke`.
        settings: Of `LosslessCompressionConfig`, beside the data set.
        prepare: What rows need before the data set is given to it.
    """
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default=model, help="checkpoint: a folder or a Hub id")
    parser.add_argument("--data", help=f"a file, a folder or a Hub id in place of {data[0]}")
    parser.add_argument("--split", help="which split of --data")
    parser.add_argument("--out", type=Path, help="folder to write; needed but for --smoke")
    parser.add_argument("--smoke", action="store_true", help="a tiny random model instead, offline")
    options = parser.parse_args()

    def compress(name: str, rows: datasets.Dataset) -> Any:
        config = LosslessCompressionConfig(dataset=prepare(name, rows), **settings or {})
        return auto_class.from_pretrained(name, quantization_config=config)

    if options.smoke:
        with tempfile.TemporaryDirectory(prefix="hf-lossless-smoke-") as name:
            folder = Path(name)
            few_rows = smoke(auto_class, folder / "model")
            _run(compress, str(folder / "model"), few_rows, options.out or folder / "small")
        return
    if options.out is None:
        parser.error("--out is needed: the folder to write")
    rows = load_rows(options.data, options.split) if options.data else datasets.load_dataset(*data, split=split)
    _run(compress, options.model, rows, options.out)


def _run(compress: Compress, name: str, rows: datasets.Dataset, out: Path) -> None:
    console = Console()
    with new_folder(out) as folder:
        model = compress(name, rows)
        task = task_of(model)
        processor = task.load_processor(name)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        result = model.hf_quantizer.result
        console.print(plan_table(result.plan))
        for text in certificate_texts(result):
            console.print(text, soft_wrap=True, highlight=False)
        again = task.load_model(str(folder))
        some = rows.select(range(min(len(rows), 64)))
        judged = {which: evaluate(one, some, task, processor) for which, one in (("saved", model), ("loaded", again))}
    console.print(f"{out}: {result.ratio:.2f} times smaller. Loaded again, on {len(some)} of the rows:", soft_wrap=True)
    sizes = {which: (evaluation, result.size_bytes) for which, evaluation in judged.items()}
    console.print(comparison_table(sizes, result.plan.original_bytes))
    if judged["saved"] != judged["loaded"]:
        raise SystemExit("the loaded model is not the saved one: please report this")
