"""Every theory, and with --peers every other tool, on the same model and rows. Writes compare.json, .md, .png.

    python recipes/benchmarks/compare.py [--assets DIR] [--models NAME ...] [--theories NAME ...] [--peers] [--update]

1. **Predictions.** Every layer is rounded alone, to nearest, at 2, 3, 4 and 8 bits. A theory's prediction (calibrated
   on 128 rows of the validation split) stands against what is measured on 128 test rows: the change of the loss and the
   divergence of the predicted classes from the original's (KL). The loss of an over-confident model falls under noise
   of any kind, the divergence shows what the noise did. The rank correlation says whether a theory orders layers
   rightly; the slope is that of the least squares through zero of measured on predicted change. Both leave out what a
   theory refuses.
2. **Plans.** Each theory plans for ratios 4, 6, 8, 10 and 12, as `compress` does it with that theory, and is judged on
   the whole test split (images: 4,000 rows). "curvature, ranks" may choose low-rank factors too. "cet, as printed" is
   the allocation of CET's Algorithm 1 beside the knapsack that uses CET's predictions.
   "one width, feedback" rounds every layer by the default's error feedback at one width: what is left of the gain where
   nothing is allocated. These rows, "cet, as printed" and the peers' "round to nearest" have no plan to store.
3. **Planning time** in calibration passes over the calibration rows (forward, backward and the statistics of every
   layer: 1.5 to 1.7 times a bare forward-backward pass on these models), timed in the same run, calibration included.
4. **Peers** (see peers.py): the same bytes, rows and figures. At a ratio stands the peer of the least divergence whose
   own ratio is that or more.

--update keeps what the present compare.json has of models, theories and peers that are not run again. The summary goes
into recipes/README.md as well.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from assets import add_assets_option, assets_folder
from cet_allocation import allocate
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from peer_methods.problem import Batch, PeerProblem, logits_of
from peers import DATA, ROWS, compare_peers, figures, load, scores, time_of_pass, versions
from readme import write_part
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn.functional import nll_loss
from transformers import PreTrainedModel

import hf_lossless
from hf_lossless import LosslessCompressionConfig
from hf_lossless.calibration.perturbation import weight_noise
from hf_lossless.calibration.statistics import calibrate
from hf_lossless.candidates.choices import Choices
from hf_lossless.candidates.grids import Candidate
from hf_lossless.candidates.propose import propose
from hf_lossless.candidates.round_packed import round_with_feedback
from hf_lossless.candidates.stored import stored_layer
from hf_lossless.checkpoints.entry import LosslessCheckpointConfig
from hf_lossless.compression import analyse, realise
from hf_lossless.data.batches import batch_loss
from hf_lossless.errors import UnreachableTargetError
from hf_lossless.planning.planner import Planner
from hf_lossless.planning.target import Target
from hf_lossless.storage.apply import apply
from hf_lossless.storage.layers import find_layers
from hf_lossless.storage.plan import LayerPlan
from hf_lossless.theories import THEORIES, cet
from hf_lossless.theories.problem import Prediction, Problem

_HERE = Path(__file__).resolve().parent
_OUT = _HERE / "compare.json"
_WIDTHS = (2, 3, 4, 8)
_RATIOS = (4, 6, 8, 10, 12)
_MEASURED_ROWS = 128
_AS_PRINTED = "cet, as printed"
_WITH_RANKS = "curvature, ranks"
_PLANNERS = (*THEORIES, _WITH_RANKS)

Predictions = dict[str, list[Prediction]]

Judge = Callable[[PreTrainedModel], dict[str, Any]]
"""What `figures` says of a model on the held-out rows."""

Measured = dict[str, dict[str, list[float]]]
"""By quantity ("loss", "kl") and layer name, one number for each candidate."""


def measured_changes(problem: Problem, test_batches: list[Batch]) -> Measured:
    """What happens on the test rows when one layer alone is stored as each of its candidates."""
    labels = torch.cat([batch["labels"] for batch in test_batches])

    def log_probabilities() -> Tensor:
        return scores(logits_of(problem.model), test_batches).double().log_softmax(-1)

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


def agreement(problem: Problem, predictions: Predictions, measured: dict[str, list[float]]) -> dict[str, Any]:
    """Rank correlation at each width and overall, and the slope of measured on predicted change.

    Of all candidates those that are rounded to nearest at the widths measured.
    """
    points = [
        (candidate.grid.bits, prediction.loss_change, change)
        for name, group in problem.candidates.items()
        for (candidate, prediction), change in zip(_nearest(group, predictions[name]), measured[name], strict=False)
        if candidate.grid is not None and prediction.usable
    ]
    total = sum(len(_nearest(group, predictions[name])) for name, group in problem.candidates.items())
    by_width = {str(width): _spearman([point[1:] for point in points if point[0] == width]) for width in _WIDTHS}
    predicted, found = np.array([point[1:] for point in points]).T
    square = float(predicted @ predicted)
    return {
        "spearman": {**by_width, "all": _spearman([point[1:] for point in points])},
        "slope": round(float(predicted @ found) / square, 4) if square else None,
        "refused": total - len(points),
    }


def _nearest(candidates: list[Candidate], predictions: list[Prediction]) -> list[tuple[Candidate, Prediction]]:
    """The plain widths, from the narrowest up, with what is predicted of them."""
    return [
        (candidate, prediction)
        for candidate, prediction in zip(candidates, predictions, strict=True)
        if candidate.kind == "grid" and candidate.grid is not None and candidate.grid.rounding == "nearest"
    ]


def _spearman(pairs: list[tuple[float, float]]) -> float | None:
    """None where it is undefined: too few points, or all predictions alike."""
    if len(pairs) < 3 or len({predicted for predicted, _ in pairs}) == 1:
        return None
    return round(float(spearmanr(pairs).statistic), 3)


def bench_model(name: str, assets: Path, planners: list[str], peers: bool) -> dict[str, Any]:
    """All theories on one model, and all peers."""
    peer_problem, test_batches = load(name, assets)
    pass_seconds = time_of_pass(peer_problem)
    labels = torch.cat([batch["labels"] for batch in test_batches])
    original = scores(logits_of(peer_problem.model), test_batches)

    def judged(model: PreTrainedModel) -> dict[str, Any]:
        return figures(original, scores(logits_of(model), test_batches), labels, peer_problem.task)

    nearest = nearest_problem(peer_problem)
    few = [
        {key: values[: max(0, _MEASURED_ROWS - 64 * index)] for key, values in batch.items()}
        for index, batch in enumerate(test_batches[:2])
    ]
    report: dict[str, Any] = {
        "test_rows": len(labels),
        "original": figures(original, original, labels, peer_problem.task),
        "original_bytes": peer_problem.original_bytes,
        "forward_backward_seconds": round(pass_seconds, 3),
        "layers": len(nearest.layers),
        "measured_rows": _MEASURED_ROWS,
        "measured": measured_changes(nearest, few),
        "predictions": {},
        "plans": {},
    }
    for planner in planners:
        start = time.perf_counter()
        analysis, spectra = analysed(peer_problem, planner, nearest)
        seconds = time.perf_counter() - start
        if planner in THEORIES:
            report["predictions"][planner] = row = {
                "passes": round(seconds / pass_seconds, 1),
                **{
                    quantity: agreement(analysis.problem, analysis.predictions, report["measured"][quantity])
                    for quantity in ("loss", "kl")
                },
            }
            print(name, planner, row, flush=True)
        report["plans"][planner] = plans(peer_problem, planner, analysis, seconds, pass_seconds, judged)
        if planner == "curvature":
            report["one_width"] = one_width(peer_problem, analysis.problem, judged)
        if spectra is not None:
            report["plans"][_AS_PRINTED] = as_printed(peer_problem, nearest, spectra, judged)
    if peers:
        report["peers"] = compare_peers(peer_problem, test_batches, pass_seconds)["peers"]
    return report


def nearest_problem(peer_problem: PeerProblem) -> Problem:
    """All layers of a model, each at every width, rounded to nearest."""
    model, batches = peer_problem.model, peer_problem.batches
    layers = find_layers(model)
    calibration = calibrate(model, batches, layers, batch_loss)
    config = LosslessCompressionConfig(ratio=6)
    return Problem(
        model, batches, batch_loss, layers, calibration, propose(layers, calibration, config.choices, {}, "plain")
    )


def analysed(
    peer_problem: PeerProblem, planner: str, nearest: Problem
) -> tuple[Planner, dict[str, cet.LayerSpectrum] | None]:
    """What `compress` predicts of a model; for CET the spectra too, which the paper's own allocation takes."""
    if planner == "cet":
        predictions, spectra = cet.examine(nearest)
        other_bytes = peer_problem.original_bytes - sum(layer.weight.nbytes for layer in nearest.layers)
        return Planner(nearest, predictions, True, "cet", Choices(), other_bytes, peer_problem.original_bytes), spectra
    return analyse(peer_problem.model, peer_problem.batches, config_of(planner, _RATIOS[0])), None


def config_of(planner: str, ratio: float) -> LosslessCompressionConfig:
    """What is asked of `compress`."""
    with_ranks = planner == _WITH_RANKS
    return LosslessCompressionConfig(
        theory="curvature" if with_ranks else planner, ratio=ratio, ranks="auto" if with_ranks else None
    )


def plans(
    peer_problem: PeerProblem,
    planner: str,
    analysis: Planner,
    analysis_seconds: float,
    pass_seconds: float,
    judged: Judge,
) -> dict[str, Any]:
    """Part 2: what `compress` makes of the model at each ratio, from one analysis."""
    rows: dict[str, Any] = {}
    for ratio in _RATIOS:
        start = time.perf_counter()
        try:
            planned = analysis.plan(Target(ratio=ratio))
        except UnreachableTargetError as error:
            rows[str(ratio)] = {"unreachable": str(error)}
            continue
        model = peer_problem.copy()
        measured = realise(model, analysis.problem, planned).mean
        seconds = analysis_seconds + time.perf_counter() - start
        size_bytes = LosslessCheckpointConfig.of(planned.plan).size_bytes
        rows[str(ratio)] = {
            "ratio": round(peer_problem.original_bytes / size_bytes, 3),
            "size_bytes": size_bytes,
            **judged(model),
            "predicted": planned.plan.predicted_loss_change,
            "measured": measured,
            "passes": round(seconds / pass_seconds, 1),
        }
        print(planner, ratio, rows[str(ratio)], flush=True)
    return rows


def one_width(peer_problem: PeerProblem, problem: Problem, judged: Judge) -> list[dict[str, Any]]:
    """Every layer rounded by feedback, all at the same width."""
    other_bytes = peer_problem.original_bytes - sum(layer.weight.nbytes for layer in problem.layers)
    rows = []
    for bits in _WIDTHS:
        layer_plans = {}
        for layer in problem.layers:
            group = problem.candidates[layer.name]
            one = next(
                (one for one in group if one.grid and one.grid.rounding == "feedback" and one.grid.bits == bits),
                group[0],
            )
            layer_plans[layer.name] = LayerPlan(
                kind=one.kind, grid=one.grid, cost_bytes=one.cost_bytes, predicted_loss_change=0.0
            )
        model = peer_problem.copy()
        rounded = round_with_feedback(problem.layers, layer_plans, problem.calibration)
        apply(
            model,
            {
                layer.name: stored_layer(layer, layer_plans[layer.name], rounded=rounded.get(layer.name))
                for layer in problem.layers
            },
        )
        size_bytes = other_bytes + sum(layer_plan.cost_bytes for layer_plan in layer_plans.values())
        row = {
            "peer": f"one width, feedback, {bits} bits",
            "ratio": round(peer_problem.original_bytes / size_bytes, 3),
            "size_bytes": size_bytes,
            **judged(model),
        }
        rows.append(row)
        print(row, flush=True)
    return rows


def as_printed(
    peer_problem: PeerProblem, problem: Problem, spectra: dict[str, cet.LayerSpectrum], judged: Judge
) -> dict[str, Any]:
    """The widths of CET's Algorithm 1, at the largest mean width that fits into each size."""
    other_bytes = peer_problem.original_bytes - sum(layer.weight.nbytes for layer in problem.layers)
    allocated = list(mean_widths(problem, spectra))
    rows: dict[str, Any] = {}
    for ratio in _RATIOS:
        fitting = [
            chosen
            for chosen in allocated
            if other_bytes + sum(one.cost_bytes for one in chosen.values()) <= peer_problem.original_bytes / ratio
        ]
        if not fitting:
            rows[str(ratio)] = {"unreachable": "no mean width from 2 to 8 bits is small enough"}
            continue
        stored = other_bytes + sum(one.cost_bytes for one in fitting[-1].values())
        model = peer_problem.copy()
        layers = {layer.name: layer for layer in problem.layers}
        plans = {
            name: LayerPlan(kind=one.kind, grid=one.grid, cost_bytes=one.cost_bytes, predicted_loss_change=0.0)
            for name, one in fitting[-1].items()
        }
        apply(model, {name: stored_layer(layers[name], plan) for name, plan in plans.items()})
        rows[str(ratio)] = {"ratio": round(peer_problem.original_bytes / stored, 3), **judged(model)}
        print(_AS_PRINTED, ratio, rows[str(ratio)], flush=True)
    return rows


def mean_widths(problem: Problem, spectra: dict[str, cet.LayerSpectrum]) -> Iterator[dict[str, Candidate]]:
    """The candidates of CET's allocation at mean widths from 2 to 8 bits, an eighth apart."""
    for eighths in range(2 * 8, 8 * 8 + 1):
        try:
            allocations = allocate(spectra, problem.candidates, eighths / 8)
        except UnreachableTargetError:
            continue
        yield {
            name: next(
                (one for one in group if one.grid and name in allocations and one.grid.bits == allocations[name].bits),
                group[-1],
            )
            for name, group in problem.candidates.items()
        }


def best_peer(rows: list[dict[str, Any]], ratio: float) -> dict[str, Any] | None:
    """The peer of the least divergence among those that reach a ratio."""
    reaching = [row for row in rows if row.get("ratio", 0) >= ratio]
    return min(reaching, key=lambda row: row["kl"], default=None)


def summary(report: dict[str, Any]) -> str:
    """What recipes/README.md shows: predictions, plans, and the best peer at each ratio."""
    lines = [
        "| theory | rank correlation with the divergence, 2 / 3 / 4 / 8 bits | passes to predict |",
        "|---|---|---|",
    ]
    for name, model in report["models"].items():
        lines.append(f"| **{name}** | | |")
        for theory, row in model["predictions"].items():
            spearman = row["kl"]["spearman"]
            correlations = " / ".join(
                "-" if spearman[str(width)] is None else f"{spearman[str(width)]:.2f}" for width in _WIDTHS
            )
            lines.append(f"| {theory} | {correlations} | {row['passes']} |")
    lines += ["", f"| planner | {' | '.join(f'{ratio}x' for ratio in _RATIOS)} | passes in all, at 8x |"]
    lines.append("|---" * (len(_RATIOS) + 2) + "|")
    for name, model in report["models"].items():
        original = f"**{name}**, {model['test_rows']:,} rows: loss {model['original']['loss']:.4f}, "
        lines.append(f"| {original}accuracy {model['original']['metric']:.4f} |{' |' * (len(_RATIOS) + 1)}")
        for planner, rows in model["plans"].items():
            cells = [_cell(rows[str(ratio)]) for ratio in _RATIOS]
            lines.append(f"| {planner} | {' | '.join(cells)} | {rows['8'].get('passes', '')} |")
        if "peers" in model:
            best = [best_peer(model["peers"], ratio) for ratio in _RATIOS]
            cells = ["none" if row is None else f"{_cell(row)} {row['peer']}, {row['ratio']:.2f}x" for row in best]
            lines.append(f"| best peer | {' | '.join(cells)} | |")
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any]) -> str:
    """Loss change, metric, divergence and flips."""
    if "unreachable" in row:
        return "out of reach"
    return (
        f"{row['loss_change']:+.4f} ± {row['loss_change_se']:.4f}, {row['metric']:.4f}, KL {row['kl']:.1e}, "
        f"{row['flips']} flips"
    )


def peers_tables(report: dict[str, Any]) -> str:
    """All rows of all peers."""
    lines = []
    for name, model in report["models"].items():
        lines += [f"{name}:", "", "| peer | ratio | loss change | metric | flips | KL |", "|---" * 6 + "|"]
        for row in (*model.get("one_width", []), *model.get("peers", [])):
            if "unavailable" in row:
                lines.append(f"| {row['peer']} | | {row['unavailable'].replace('|', '/')} | | | |")
            else:
                change = f"{row['loss_change']:+.4f} ± {row['loss_change_se']:.4f}"
                figures = f"{row['metric']:.4f} | {row['flips']} | {row['kl']:.5f}"
                lines.append(f"| {row['peer']} | {row['ratio']:.2f} | {change} | {figures} |")
        lines.append("")
    return "\n".join(lines)


def draw(report: dict[str, Any], path: Path) -> None:
    """Divergence from the original against the ratio, for theories (lines) and peers (crosses), model by model."""
    models = report["models"]
    figure = Figure(figsize=(6 * len(models), 5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, model) in zip(figure.subplots(1, len(models), squeeze=False)[0], models.items(), strict=True):
        for planner, rows in model["plans"].items():
            points = [(row["ratio"], row["kl"]) for row in rows.values() if "kl" in row]
            if points:
                bold = 2.5 if planner.startswith("curvature") else 1.0
                axes.plot(*zip(*points, strict=True), ".-", label=planner, linewidth=bold)
        for row in model.get("one_width", []):
            axes.plot(row["ratio"], max(row["kl"], 1e-6), "o", color="grey", markersize=4)
        for row in model.get("peers", []):
            if "kl" in row:
                axes.plot(row["ratio"], max(row["kl"], 1e-6), "x", color="black", markersize=4)
        axes.plot([], [], "x", color="black", label="peers")
        axes.plot([], [], "o", color="grey", label="one width, feedback")
        axes.set_yscale("log")
        axes.set_title(f"{name}, {model['test_rows']:,} test rows")
        axes.set_xlabel("ratio: bytes of the original over bytes of the compressed checkpoint")
        axes.grid(alpha=0.3)
    first = figure.axes[0]
    first.set_ylabel("Kullback-Leibler divergence from the original, nats")
    first.legend(fontsize=7)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_assets_option(parser)
    parser.add_argument("--models", nargs="*", choices=list(DATA), default=list(DATA))
    parser.add_argument("--theories", nargs="*", choices=_PLANNERS, default=list(_PLANNERS))
    parser.add_argument("--peers", action="store_true", help="other tools too: pip install 'hf-lossless[peers]'")
    parser.add_argument("--update", action="store_true", help="keep what is not run again")
    parser.add_argument("--out", type=Path, default=_OUT)
    arguments = parser.parse_args()
    assets = assets_folder(parser, arguments)
    torch.set_num_threads(1)  # times of one thread are steadier on a machine that others use
    report: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.update else {"models": {}}
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_lossless": hf_lossless.__version__,
        **versions(),
    }
    report["calibration_rows"] = ROWS
    for name in arguments.models:
        new = {"machine": machine, **bench_model(name, assets, arguments.theories, arguments.peers)}
        old = report["models"].get(name)
        if old is not None:
            merged = {part: old[part] | new[part] for part in ("predictions", "plans")}
            new = {**old, **new, **merged}
        report["models"][name] = new
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(f"{summary(report)}\n{peers_tables(report)}")
    draw(report, arguments.out.with_suffix(".png"))
    if arguments.out == _OUT:
        write_part("compare", summary(report))


if __name__ == "__main__":
    main()
