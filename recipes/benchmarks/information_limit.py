"""Entropy-coded storage near the information limit. Writes information_limit.json and .png.

    python recipes/benchmarks/information_limit.py [--assets DIR] [--models NAME ...] [--parts NAME ...] [--cache DIR]

Four models; calibrated on 128 rows of the validation split, judged on test rows that nothing else is done with (see
peers.py). "live-resnet" is trained by the script itself, once, and kept in the cache (see live_resnet.py): in
resnet-fashion-mnist most taps of the last convolutions see padding only, and cost nothing; here none is dead.

1. **frontier**: fixed widths and entropy-coded storage at equal budgets, each from one analysis for all ratios. Ratios
   are those of files: the original's safetensors over the saved safetensors and config.json. Beside each plan stands
   how many bits per weight it takes beyond the rate-distortion bound at equal loss: at what it is predicted to cost by
   other rows than those it was fitted to, at what its own rows say, and at what they say in the damped metric, with the
   bound of that metric.
2. **coder**: bytes over entropies, the share of what is stored beside codes, decoding speed of one thread; of the plan
   nearest to 13x.
3. **loading**: that plan, minilm-sst2 only: time and memory of from_pretrained beside the original's.
4. **effects**: single choices, each varied alone at equal bytes with one c for all layers (see limit_parts/effects.py),
   on fewer test rows: feedback from both roots, rate-aware rounding, damping, calibration rows, the labels of the
   Fisher matrix, damping of embeddings.

What is run replaces what the present JSON says of it; all else stays. The summary goes into recipes/README.md too.
"""

import argparse
import json
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import torch
import transformers
from assets import add_assets_option, assets_folder
from limit_parts import effects
from limit_parts.coder import coder_figures
from limit_parts.frontier import (
    STORAGES,
    Original,
    bits_above_bound,
    frontier,
    gain_at_equal_divergence,
    largest_within_one_error,
)
from limit_parts.loading import loading
from limit_parts.summary import summary
from limit_parts.trial import Bench
from live_resnet import live_resnet
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from peers import ROWS
from readme import write_part

import hf_lossless
from hf_lossless import LosslessCompressionConfig
from hf_lossless.data.batches import Batch
from hf_lossless.data.rows import calibration_batches
from hf_lossless.data.tasks.text_classification import TextClassification
from hf_lossless.planning.planner import Planned
from hf_lossless.storage.values import EncodedMatrix

_HERE = Path(__file__).resolve().parent
_OUT = _HERE / "information_limit.json"
_RATIOS = (6, 8, 10, 12, 13, 14, 16, 20, 24)
_SHOWN_RATIO = 13
"""Whose plan the coder and loading are looked at on."""

LIVE_RESNET = "live-resnet"
MODELS = (*peers.DATA, LIVE_RESNET)
PARTS = ("frontier", "coder", "loading", "effects")
EFFECTS: dict[str, tuple[tuple[float, ...], int]] = {  # ratios, test batches of 64
    "minilm-sst2": ((12.0,), 10),
    "vit-fashion-mnist": ((16.0, 24.0), 32),
}


def load(name: str, assets: Path, cache: Path) -> tuple[Bench, Path]:
    """A model with its calibration and held-out rows, and its folder."""
    if name != LIVE_RESNET:
        return Bench(*peers.load(name, assets)), assets / name
    folder = live_resnet(cache / LIVE_RESNET, assets)
    return Bench(*peers.load_folder(folder, assets, *peers.DATA["resnet-fashion-mnist"])), folder


def bench_frontier(
    bench: Bench, folder: Path, parts: set[str], storages: list[str], ratios: list[float], report: dict[str, Any]
) -> None:
    """Parts 1 to 3, into the report of a model."""
    original = Original(folder)
    num_weights = sum(layer.weight.numel() for layer in bench.layers)
    report |= {"test_rows": len(bench.labels), "layers": len(bench.layers), "weights": num_weights}
    report["original"] = {**bench.judged(bench.original), "file_bytes": original.file_bytes}

    def keep(ratio: float, planned: Planned, saved: Path) -> None:
        coded = [one.values for one in planned.stored.values() if isinstance(one.values, EncodedMatrix)]
        if ratio != _SHOWN_RATIO or not coded:
            return
        if "coder" in parts:
            report["coder"] = coder_figures(coded)
        if "loading" in parts:
            text = isinstance(bench.problem.task, TextClassification)
            auto = "AutoModelForSequenceClassification" if text else "AutoModelForImageClassification"
            report["loading"] = loading({"original": folder, "compressed": saved}, auto)

    for storage in storages:
        found = frontier(bench, original, storage, ratios, keep)
        for row in found["rows"].values():
            if "kl" in row:
                row["bits_above_bound"] = bits_above_bound(row, found["bounds"], num_weights)
        report.setdefault("storages", {})[storage] = found["rows"]
        report.setdefault("bounds", {})[storage] = found["bounds"]
    found = report["storages"]
    report["within_one_error"] = {storage: largest_within_one_error(rows) for storage, rows in found.items()}
    if set(found) == set(STORAGES):
        report["gain_at_equal_divergence"] = gain_at_equal_divergence(*(found[storage] for storage in STORAGES))


def bench_effects(name: str, bench: Bench, assets: Path, write: Callable[[dict[str, Any]], None]) -> None:
    """Part 4; what is found is written as it comes."""
    ratios, num_batches = EFFECTS[name]
    bench = Bench(bench.problem, bench.test_batches[:num_batches])
    calibration = bench.calibrated()

    def batches_of(num_rows: int) -> list[Batch]:
        config = LosslessCompressionConfig(dataset=str(assets / peers.DATA[name][0]), num_samples=num_rows, ratio=6)
        return [dict(batch) for batch in calibration_batches(bench.problem.model, config.rows)]

    text = name == "minilm-sst2"
    counts = (32, 512, 872) if text else (32, 512, 2048)
    parts = {
        "usual": effects.usual(bench, calibration, ratios),
        "feedback": effects.one_sided(bench, calibration, ratios),
        "rate-aware": effects.rate_aware(bench, calibration, ratios),
        "damping": effects.damping(bench, calibration, ratios),
        "calibration rows": effects.calibration_rows(bench, batches_of, counts, ratios),
        "true Fisher": effects.true_fisher(bench, (1, 4), ratios),
    }
    if text:
        parts["embedding floor"] = effects.embedding_floor(bench, calibration, ratios)
    found: dict[str, Any] = {"test_rows": len(bench.labels)}
    for part, variants in parts.items():
        found[part] = {}
        for variant, rows in variants:
            found[part][variant] = rows
            print(name, part, variant, {ratio: row["kl"] for ratio, row in rows.items()}, flush=True)
            write(found)


def draw(report: dict[str, Any], path: Path) -> None:
    """Above: held-out divergence against the ratio of the files. Below: predicted loss against bytes, and the bound."""
    models = {name: model for name, model in report["models"].items() if "storages" in model}
    figure = Figure(figsize=(4.5 * len(models), 8), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, len(models), squeeze=False)
    for column, (name, model) in zip(grid.T, models.items(), strict=True):
        above, below = column
        megabyte = 1e6
        for storage, rows in model["storages"].items():
            reached = sorted((row for row in rows.values() if "kl" in row), key=lambda row: row["file_ratio"])
            if not reached:
                continue
            above.plot([row["file_ratio"] for row in reached], [row["kl"] for row in reached], ".-", label=storage)
            sizes = [row["tensor_bytes"] / megabyte for row in reached]
            (line,) = below.plot(sizes, [row["predicted"] for row in reached], ".-", label=f"{storage}, other rows")
            below.plot(sizes, [row["in_sample"] for row in reached], ".:", color=line.get_color(), label="own rows")
        losses = [row["in_sample"] for rows in model["storages"].values() for row in rows.values() if "kl" in row]
        bound = [
            (num_bytes / megabyte, loss)
            for num_bytes, loss in model["bounds"]["entropy"]["undamped"]
            if loss > min(losses) / 10 and loss < 10 * max(losses)
        ]
        below.plot(*zip(*bound, strict=True), "k--", label="rate-distortion bound")
        above.set_title(f"{name}, {model['test_rows']:,} test rows")
        above.set_xlabel("ratio of the files")
        below.set_xlabel("tensors, MB")
        for axes in column:
            axes.set_yscale("log")
            axes.grid(alpha=0.3)
    grid[0, 0].set_ylabel("held-out KL divergence from the original, nats")
    grid[1, 0].set_ylabel("predicted rise of the loss, nats")
    for axes in grid[:, 0]:
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_assets_option(parser)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--storages", nargs="*", choices=STORAGES, default=list(STORAGES))
    parser.add_argument("--ratios", nargs="*", type=float, default=_RATIOS)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "hf_lossless_models")
    parser.add_argument("--out", type=Path, default=_OUT)
    arguments = parser.parse_args()
    assets = assets_folder(parser, arguments)
    torch.set_num_threads(1)  # times of one thread are steadier on a machine that others use
    report: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"models": {}}
    report["machine"] = {
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_lossless": hf_lossless.__version__,
    }
    report["calibration_rows"] = ROWS
    parts = set(arguments.parts)
    for name in arguments.models:
        model = report["models"].setdefault(name, {})
        bench, folder = load(name, assets, arguments.cache)

        def write(found: dict[str, Any], model: dict[str, Any] = model) -> None:
            model["effects"] = found
            arguments.out.write_text(json.dumps(report, indent=1) + "\n")

        if parts - {"effects"}:
            chosen = parts if name == "minilm-sst2" else parts - {"loading"}
            bench_frontier(bench, folder, chosen, arguments.storages, arguments.ratios, model)
            arguments.out.write_text(json.dumps(report, indent=1) + "\n")
        if "effects" in parts and name in EFFECTS:
            bench_effects(name, bench, assets, write)
    draw(report, arguments.out.with_suffix(".png"))
    if arguments.out == _OUT:
        write_part("limit", summary(report))


if __name__ == "__main__":
    main()
