"""Every theory on the same model, data, widths, groups and budgets. Writes compare.json and compare.png.

    python recipes/compare.py [--assets DIR] [--models NAME ...] [--theories NAME ...]

For each theory: the predicted change of the loss of every layer at 2, 3, 4 and 8 bits (calibrated on rows of the
validation split) against the change that is measured when that layer alone is rounded, on test rows; then the loss and
metric on test rows of the plans it makes at ratios 6, 8 and 10; and the time of its predictions in forward-backward
passes over the calibration rows, one of them timed in the same run. Ranks stay out: not every theory makes its own.

What is measured is the change of the loss, and the divergence of the predicted classes from the original's (KL): the
loss of an over-confident model falls under noise of any kind, the divergence shows what the noise did. The rank
correlation says whether a theory orders layers rightly at one width, and overall; the slope is that of the
least squares through zero of measured on predicted change: 1 for a theory that has the size right, below 1 for one that
fears too much. Both leave out what a theory refuses.

CET's own allocation, as its Algorithm 1 prints it, is a row of its own beside the knapsack that uses CET's predictions.
"""

import argparse
import copy
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn.functional import nll_loss
from transformers import PreTrainedModel

import hf_lossless
from hf_lossless import LosslessCompressionConfig, knapsack
from hf_lossless.apply import apply_plan
from hf_lossless.calibration.data import calibration_batches, make_batches
from hf_lossless.calibration.loss import batch_loss
from hf_lossless.calibration.perturbation import weight_noise
from hf_lossless.calibration.statistics import calibrate
from hf_lossless.candidates.menu import menu
from hf_lossless.candidates.proposal import Candidate
from hf_lossless.errors import UnreachableTargetError
from hf_lossless.evaluation import evaluate
from hf_lossless.layers import find_layers
from hf_lossless.pipeline import tensor_bytes
from hf_lossless.plan import LayerPlan
from hf_lossless.tasks.registry import task_of
from hf_lossless.theories import cet, curvature, hawq, llc, lod
from hf_lossless.theories.cet_allocation import allocate
from hf_lossless.theories.problem import Prediction, Problem

_HERE = Path(__file__).resolve().parent
_ASSETS = _HERE.parents[1] / "shared" / "assets"
_THEORIES = {
    "llc": llc.predict,
    "lod": lod.predict,
    "cet": cet.predict,
    "hawq": hawq.predict,
    "curvature": curvature.predict,
}
_WIDTHS = (2, 3, 4, 8)
_RATIOS = (6, 8, 10)
_ROWS = 128
_MEASURED_ROWS = 128
_DATA = {  # model: calibration rows, test rows, how many of those judge the plans
    "minilm-sst2": ("minilm-sst2/validation.jsonl", "minilm-sst2/test.jsonl", None),
    "resnet-fashion-mnist": ("fashion-mnist/validation.parquet", "fashion-mnist/test.parquet", 4000),
    "vit-fashion-mnist": ("fashion-mnist/validation.parquet", "fashion-mnist/test.parquet", 4000),
}


Measured = dict[str, dict[str, list[float]]]
"""By quantity ("loss", "kl") and layer name, one number for each candidate."""


def measured_changes(problem: Problem, test_batches: list[Any]) -> Measured:
    """What happens on the test rows when one layer alone is stored as each of its candidates.

    "loss": the change of the mean loss; it may fall, for an over-confident model gains from any noise. "kl": the mean
    Kullback-Leibler divergence of the predicted classes from the original's, which noise only raises.
    """
    labels = torch.cat([batch["labels"] for batch in test_batches])

    def log_probabilities() -> Tensor:
        with torch.no_grad():
            logits = [
                problem.model(**{key: value for key, value in batch.items() if key != "labels"}).logits
                for batch in test_batches
            ]
        return torch.cat(logits).double().log_softmax(-1)

    before = log_probabilities()
    measured: Measured = {"loss": {}, "kl": {}}
    for layer in problem.layers:
        after = []
        for candidate in problem.candidates[layer.name]:
            with weight_noise(layer, candidate.error(layer.matrix)):
                after.append(log_probabilities())
        measured["loss"][layer.name] = [nll_loss(one, labels).item() - nll_loss(before, labels).item() for one in after]
        measured["kl"][layer.name] = [(before.exp() * (before - one)).sum(-1).mean().item() for one in after]
    return measured


def agreement(
    problem: Problem, predictions: dict[str, list[Prediction]], measured: dict[str, list[float]]
) -> dict[str, Any]:
    """Rank correlation at each width and overall, and the slope of measured on predicted change."""
    points = [
        (candidate.grid.bits, prediction.loss_change, change)
        for name, group in problem.candidates.items()
        for candidate, prediction, change in zip(group, predictions[name], measured[name], strict=True)
        if candidate.grid is not None and prediction.usable
    ]
    total = sum(candidate.grid is not None for group in problem.candidates.values() for candidate in group)
    by_width = {str(width): _spearman([point[1:] for point in points if point[0] == width]) for width in _WIDTHS}
    predicted, found = np.array([point[1:] for point in points]).T
    square = float(predicted @ predicted)
    return {
        "spearman": {**by_width, "all": _spearman([point[1:] for point in points])},
        "slope": round(float(predicted @ found) / square, 4) if square else None,
        "refused": total - len(points),
    }


def _spearman(pairs: list[tuple[float, float]]) -> float | None:
    """None where it is undefined: too few points, or all predictions alike."""
    if len(pairs) < 3 or len({predicted for predicted, _ in pairs}) == 1:
        return None
    return round(float(spearmanr(pairs).statistic), 3)


def bench_model(name: str, assets: Path, theories: list[str]) -> dict[str, Any]:
    """All theories on one model."""
    calibration_file, test_file, num_test_rows = _DATA[name]
    text = name == "minilm-sst2"
    auto = transformers.AutoModelForSequenceClassification if text else transformers.AutoModelForImageClassification
    model: PreTrainedModel = auto.from_pretrained(assets / name).eval()
    task = task_of(model)
    processor = task.load_processor(str(assets / name))
    config = LosslessCompressionConfig(dataset=str(assets / calibration_file), num_samples=_ROWS, ratio=6)
    batches = calibration_batches(model, config)
    kind = "json" if text else "parquet"
    rows = datasets.load_dataset(kind, data_files=str(assets / test_file), split="train")
    judged = rows if num_test_rows is None else rows.select(range(num_test_rows))
    test_batches = list(make_batches(rows.select(range(_MEASURED_ROWS)), task, processor, model, 64))

    layers = find_layers(model)
    calibrate(model, batches, layers, batch_loss)  # the first is slower
    times = []
    for _ in range(3):
        start = time.perf_counter()
        calibrate(model, batches, layers, batch_loss)
        times.append(time.perf_counter() - start)
    pass_seconds = statistics.median(times)
    calibration = calibrate(model, batches, layers, batch_loss, gradients=True, curvature=True)
    candidates = menu(layers, calibration, config, {}, "plain")
    problem = Problem(model, batches, batch_loss, layers, calibration, candidates)
    measured = measured_changes(problem, test_batches)
    original = evaluate(model, judged, task, processor)
    report: dict[str, Any] = {
        "test_rows": original.num_examples,
        "measured_rows": _MEASURED_ROWS,
        "original": {"loss": original.loss, original.metric_name: original.metric},
        "layers": len(layers),
        "forward_backward_seconds": round(pass_seconds, 3),
        "measured": measured,
        "theories": {},
    }
    if "cet" in theories:  # its spectra serve the predictions and the paper's own allocation
        start = time.perf_counter()
        cet_predictions, spectra = cet.examine(problem)
        cet_seconds = time.perf_counter() - start
        report["cet_layers_converged"] = sum(spectrum.converged for spectrum in spectra.values())
    budgets = {ratio: int(tensor_bytes(model) / ratio) for ratio in _RATIOS}
    other_bytes = tensor_bytes(model) - sum(layer.weight.nbytes for layer in layers)

    def judge(choices: dict[str, int]) -> dict[str, Any]:
        twin = copy.deepcopy(model)
        chosen = {layer: candidates[layer][choice] for layer, choice in choices.items()}
        apply_plan(twin, {layer: as_plan(candidate) for layer, candidate in chosen.items()})
        found = evaluate(twin, judged, task, processor)
        stored = other_bytes + sum(candidate.cost_bytes for candidate in chosen.values())
        return {
            "ratio": round(tensor_bytes(model) / stored, 3),
            "loss_change": found.loss - original.loss,
            "loss": found.loss,
            found.metric_name: found.metric,
        }

    for theory in theories:
        if theory == "cet":
            predictions, seconds = cet_predictions, cet_seconds
        else:
            start = time.perf_counter()
            predictions = _THEORIES[theory](problem)
            seconds = time.perf_counter() - start
        row: dict[str, Any] = {
            "search_passes": round(seconds / pass_seconds, 1),
            "loss": agreement(problem, predictions, measured["loss"]),
            "kl": agreement(problem, predictions, measured["kl"]),
            "plans": {},
        }
        for ratio, max_bytes in budgets.items():
            choices = best_within(problem, predictions, max_bytes - other_bytes)
            row["plans"][str(ratio)] = {"unreachable": True} if choices is None else judge(choices)
        row["predicted"] = {
            layer: [one.loss_change if one.usable else None for one in group] for layer, group in predictions.items()
        }
        report["theories"][theory] = row
        print(name, theory, {key: value for key, value in row.items() if key != "predicted"}, flush=True)
        if theory == "cet":
            printed: dict[str, Any] = {"plans": {}}
            for ratio, max_bytes in budgets.items():
                choices = as_printed(problem, spectra, max_bytes - other_bytes)
                printed["plans"][str(ratio)] = {"unreachable": True} if choices is None else judge(choices)
            report["theories"]["cet, as printed"] = printed
            print(name, "cet, as printed", printed, flush=True)
    return report


def as_plan(candidate: Candidate) -> LayerPlan:
    """The record of a candidate, for `apply_plan`."""
    return LayerPlan(
        kind=candidate.kind, grid=candidate.grid, cost_bytes=candidate.cost_bytes, predicted_loss_change=0.0
    )


def best_within(problem: Problem, predictions: dict[str, list[Prediction]], max_bytes: int) -> dict[str, int] | None:
    """The knapsack's choice of candidates within these bytes of all layers; None where there is none."""
    usable = {
        name: [index for index, prediction in enumerate(group) if prediction.usable]
        for name, group in predictions.items()
    }
    frontier = knapsack.frontier(
        costs=[[problem.candidates[name][index].cost_bytes for index in indices] for name, indices in usable.items()],
        losses=[[predictions[name][index].loss_change for index in indices] for name, indices in usable.items()],
    )
    point = frontier.within_bytes(max_bytes)
    if point is None:
        return None
    chosen = zip(usable.items(), frontier.choices(point), strict=True)
    return {name: indices[choice] for (name, indices), choice in chosen}


def as_printed(problem: Problem, spectra: dict[str, cet.LayerSpectrum], max_bytes: int) -> dict[str, int] | None:
    """The widths of CET's Algorithm 1 at the largest mean width that fits into these bytes."""
    best = None
    for sixteenths in range(2 * 16, 8 * 16 + 1):
        try:
            allocations = allocate(spectra, problem.candidates, sixteenths / 16)
        except UnreachableTargetError:
            continue
        widths = {
            name: [one.grid.bits if one.grid else 16 for one in group] for name, group in problem.candidates.items()
        }
        choices = {
            name: widths[name].index(allocations[name].bits) if name in allocations else len(widths[name]) - 1
            for name in problem.candidates
        }
        if sum(problem.candidates[name][choice].cost_bytes for name, choice in choices.items()) <= max_bytes:
            best = choices
    return best


def draw(report: dict[str, Any], path: Path) -> None:
    """Measured divergence against predicted change for every theory (columns) and model (rows)."""
    models = report["models"]
    names = [theory for theory in _THEORIES if any(theory in model["theories"] for model in models.values())]
    figure = Figure(figsize=(3 * len(names), 3 * len(models)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(models), len(names), squeeze=False, sharex=True, sharey=True)
    for axes_of_model, (model_name, model) in zip(grid, models.items(), strict=True):
        for axes, theory in zip(axes_of_model, names, strict=True):
            row = model["theories"].get(theory)
            if row is None:
                continue
            for position, width in enumerate(_WIDTHS):
                pairs = [
                    (predicted[position], changes[position])
                    for predicted, changes in zip(
                        row["predicted"].values(), model["measured"]["kl"].values(), strict=True
                    )
                    if len(changes) > position and predicted[position] is not None
                ]
                axes.plot(*zip(*pairs, strict=True), ".", markersize=4, label=f"{width} bits") if pairs else None
            axes.plot([0, 10], [0, 10], color="grey", linewidth=0.5)
            axes.set_xscale("symlog", linthresh=1e-5)
            axes.set_yscale("symlog", linthresh=1e-5)
            axes.set_title(f"{theory}, {model_name}", fontsize=8)
            axes.tick_params(labelsize=6)
            axes.set_xticks([-0.1, -1e-3, 0, 1e-3, 0.1])
            axes.minorticks_off()
    grid[0][0].legend(fontsize=6)
    figure.supxlabel("predicted change of the loss, one layer rounded")
    figure.supylabel("Kullback-Leibler divergence from the original, measured on test rows")
    figure.savefig(path, dpi=110)


def table(report: dict[str, Any]) -> Table:
    """What a reader wants first."""
    result = Table(
        title="rank correlation and slope with measured loss / divergence; held-out loss change at each ratio"
    )
    for heading in ("model", "theory", "passes", *(f"{width} bits" for width in _WIDTHS), "slope"):
        result.add_column(heading)
    for ratio in _RATIOS:
        result.add_column(f"{ratio}x")
    for name, model in report["models"].items():
        for theory, row in model["theories"].items():
            said = [row.get(quantity, {}) for quantity in ("loss", "kl")]
            losses = [row["plans"][str(ratio)].get("loss_change") for ratio in _RATIOS]
            result.add_row(
                name,
                theory,
                str(row.get("search_passes", "")),
                *(" / ".join(str(one.get("spearman", {}).get(str(width), "")) for one in said) for width in _WIDTHS),
                " / ".join(str(one.get("slope", "")) for one in said),
                *("out of reach" if loss is None else f"{loss:+.4f}" for loss in losses),
            )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=_ASSETS)
    parser.add_argument("--models", nargs="*", default=list(_DATA))
    parser.add_argument("--theories", nargs="*", default=list(_THEORIES))
    parser.add_argument("--out", type=Path, default=_HERE / "compare.json")
    arguments = parser.parse_args()
    if not arguments.assets.is_dir():
        raise SystemExit(
            f"{arguments.assets} is not there: the comparison needs its models and data. Name it: --assets"
        )
    torch.set_num_threads(1)  # times of one thread are steadier on a machine that others use
    report = {
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "hf_lossless": hf_lossless.__version__,
        },
        "calibration_rows": _ROWS,
        "models": {name: bench_model(name, arguments.assets, arguments.theories) for name in arguments.models},
    }
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    draw(report, arguments.out.with_suffix(".png"))
    Console(width=180).print(table(report))


if __name__ == "__main__":
    main()
