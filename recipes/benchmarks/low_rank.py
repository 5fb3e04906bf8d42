"""Low rank by itself: five ways to choose and make factors, on three real models. Writes low_rank.json.

    python recipes/benchmarks/low_rank.py [--assets DIR]

Every layer is stored dense or as two factors in float32, so that the share of the layers' parameters that is kept is
the only thing that varies. Ranks and factors come from calibration rows (validation split), losses and metrics from
test rows. The methods:

    svd                 plain SVD, every layer at the same share
    fwsvd               Fisher-weighted SVD (Hsu et al. 2022), every layer at the same share: the columns of W [out, in]
                        are weighed by the square root of their summed empirical Fisher information
    llc                 plain SVD, ranks by LLC Algorithm 2 and the knapsack; where its neighbourhood (gamma) leaves no
                        plan of that size, without it, and the row says so
    lod                 LoD's aligned truncation; the tolerance tau that gives the size, the same for every layer
    gradient-aligned    SVD in the loss's metric, ranks by the curvature theory and the knapsack
    svd, ranks by curvature         plain SVD, the same choice of ranks: what the choice alone does
    gradient-aligned, same share    the factors of gradient-aligned at the same share for every layer

Times are in forward-backward passes over the calibration rows, one of them timed in the same run. Latencies are medians
of runs in turn. The tables go into recipes/README.md as well.
"""

import argparse
import copy
import functools
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from assets import add_assets_option, assets_folder
from readme import write_part
from torch import Tensor, nn
from transformers import PreTrainedModel

import hf_lossless
from hf_lossless import LosslessCompressionConfig
from hf_lossless.calibration.curvature import KroneckerFactors, second_order_change
from hf_lossless.calibration.statistics import Calibration, calibrate
from hf_lossless.candidates.damping import RANKS
from hf_lossless.candidates.descent import aligned_factors, largest_errors
from hf_lossless.candidates.factored import propose_factored
from hf_lossless.candidates.grids import Candidate
from hf_lossless.candidates.low_rank import Factorisation, Factors, Whitening, factorise
from hf_lossless.candidates.parallel import for_each_layer
from hf_lossless.candidates.ranks import largest_rank, ranks_to_try
from hf_lossless.candidates.stored import stored_layer
from hf_lossless.certification.evaluation import evaluate
from hf_lossless.data.batches import Batch, batch_loss
from hf_lossless.data.rows import calibration_batches
from hf_lossless.data.tasks.registry import task_of
from hf_lossless.planning import knapsack
from hf_lossless.storage.apply import apply
from hf_lossless.storage.layers import Layer, as_matrix, find_layers
from hf_lossless.storage.plan import LayerPlan, LowRank
from hf_lossless.theories import curvature, llc_decomposition
from hf_lossless.theories.problem import Prediction, Problem

_OUT = Path(__file__).resolve().with_suffix(".json")
_SHARES = (0.8, 0.6, 0.4)
_ROWS = 128
_DATA = {  # model: calibration rows, test rows, how many of those
    "minilm-sst2": ("minilm-sst2/validation.jsonl", "minilm-sst2/test.jsonl", None),
    "resnet-fashion-mnist": ("fashion-mnist/validation.parquet", "fashion-mnist/test.parquet", 4000),
    "vit-fashion-mnist": ("fashion-mnist/validation.parquet", "fashion-mnist/test.parquet", 4000),
}

Ranks = dict[str, Factors]
"""Factors by layer name; layers that are not there stay dense."""


@dataclass
class Bench:
    """One model, its calibration data, and what all methods share."""

    model: PreTrainedModel
    batches: list[Batch]
    layers: list[Layer]
    calibration: Calibration
    pass_seconds: float
    notes: dict[str, str] = field(default_factory=dict)

    def matrices(self) -> dict[str, Tensor]:
        """Those layers that some rank makes smaller."""
        return {layer.name: layer.matrix for layer in self.layers if largest_rank(*layer.matrix.shape)}

    def factorisations(self, metrics: dict[str, KroneckerFactors], damping: float = RANKS) -> dict[str, Factorisation]:
        """Their SVDs, in the metrics where there are any."""

        def of_layer(layer: Layer) -> Factorisation:
            whitening = Whitening.of(metrics[layer.name], damping) if layer.name in metrics else None
            return factorise(layer.matrix, whitening, largest=largest_rank(*layer.matrix.shape))

        matrices = self.matrices()
        return for_each_layer(of_layer, [layer for layer in self.layers if layer.name in matrices])


def same_share(found: dict[str, Factorisation], matrices: dict[str, Tensor], share: float) -> Ranks:
    """Every layer at the rank that keeps `share` of its parameters."""
    ranks = {}
    for name, matrix in matrices.items():
        out_features, in_features = matrix.shape
        rank = math.floor(share * out_features * in_features / (out_features + in_features))
        if rank:
            ranks[name] = found[name].truncated(rank)
    return ranks


def by_knapsack(
    bench: Bench, found: dict[str, Factorisation], predict: Callable[[Problem], Any]
) -> Callable[[float], Ranks]:
    """Ranks of a ladder, chosen by a theory's predictions within the share of all layers' parameters."""
    candidates = {}
    for layer in bench.layers:
        candidates[layer.name] = [Candidate(None, layer.weight.nbytes)]
        if layer.name in found:
            ranks = ranks_to_try(layer.matrix.shape, min(layer.matrix.shape))
            candidates[layer.name] += propose_factored(layer, ranks, found[layer.name].truncated, (), None, True)
    problem = Problem(bench.model, bench.batches, batch_loss, bench.layers, bench.calibration, candidates)
    predictions = predict(problem)
    usable = {
        name: [(one, said.loss_change) for one, said in zip(group, predictions[name], strict=True) if said.usable]
        for name, group in candidates.items()
    }
    frontier = knapsack.frontier(
        costs=[[one.cost_bytes for one, _ in group] for group in usable.values()],
        losses=[[change for _, change in group] for group in usable.values()],
    )

    def at(share: float) -> Ranks:
        point = frontier.within_bytes(int(share * sum(layer.weight.nbytes for layer in bench.layers)))
        if point is None:
            raise LookupError(f"the least share is {frontier.cost_bytes[0] / frontier.cost_bytes[-1]:.3f}")
        chosen = zip(usable.items(), frontier.choices(point), strict=True)
        picked = {name: group[choice][0].factors for (name, group), choice in chosen}
        return {name: factors for name, factors in picked.items() if factors is not None}

    return at


def plain(bench: Bench) -> Callable[[float], Ranks]:
    found, matrices = bench.factorisations({}), bench.matrices()
    return lambda share: same_share(found, matrices, share)


def fisher_weighted(bench: Bench) -> Callable[[float], Ranks]:
    """FWSVD; the paper writes y = x W, so that its rows are the columns here."""
    matrices = bench.matrices()
    information = {name: torch.zeros(matrix.shape[1]) for name, matrix in matrices.items()}
    for batch in bench.batches:
        for row in range(len(batch["labels"])):
            bench.model.zero_grad()
            batch_loss(bench.model, {key: value[row : row + 1] for key, value in batch.items()}).backward()
            for layer in bench.layers:
                if layer.name in information and layer.weight.grad is not None:
                    information[layer.name] += as_matrix(layer.weight.grad, layer.kind).square().sum(0)
    bench.model.zero_grad()
    metrics = {
        name: KroneckerFactors(torch.ones(len(matrices[name])), one, 1.0).damped(1e-3)
        for name, one in information.items()
    }
    found = bench.factorisations(metrics, damping=1e-6)  # the paper has none
    return lambda share: same_share(found, matrices, share)


def llc(bench: Bench) -> Callable[[float], Ranks]:
    found = bench.factorisations({})

    def predict(gamma: float) -> Callable[[Problem], Any]:
        def of_layers(problem: Problem) -> Any:
            answers = {}
            for layer in problem.layers:
                kept, *factored = problem.candidates[layer.name]
                assert kept.factors is None
                judged = llc_decomposition.predict_layer(problem, layer, factored, gamma)
                answers[layer.name] = [Prediction(0.0), *judged]
            return answers

        return of_layers

    inside = by_knapsack(bench, found, predict(llc_decomposition.GAMMA))
    anywhere = functools.cache(lambda: by_knapsack(bench, found, predict(math.inf)))

    def at(share: float) -> Ranks:
        try:
            return inside(share)
        except LookupError as error:
            bench.notes[f"llc {share}"] = f"without gamma: inside the neighbourhood {error}"
            return anywhere()(share)

    return at


def lod(bench: Bench) -> Callable[[float], Ranks]:
    found, matrices = bench.factorisations({}), bench.matrices()
    errors = {
        name: largest_errors(found[name], matrix, largest_rank(*matrix.shape)) for name, matrix in matrices.items()
    }
    total = sum(layer.matrix.numel() for layer in bench.layers)

    def ranks_within(tolerance: float) -> dict[str, int]:
        first = {name: (values <= tolerance).nonzero().flatten() for name, values in errors.items()}
        return {name: int(indices[0]) + 1 for name, indices in first.items() if len(indices)}

    def share_of(ranks: dict[str, int]) -> float:
        saved = sum(matrices[name].numel() - rank * sum(matrices[name].shape) for name, rank in ranks.items())
        return 1 - saved / total

    def at(share: float) -> Ranks:
        low, high = 0.0, max(values.max().item() for values in errors.values())
        for _ in range(40):  # bisection: a larger tolerance keeps fewer parameters
            middle = (low + high) / 2
            low, high = (low, middle) if share_of(ranks_within(middle)) <= share else (middle, high)
        bench.notes[f"lod {share}"] = f"tau = {high:.3g}"
        gradients = {name: bench.calibration.layers[name].gradient for name in matrices}
        return {
            name: aligned_factors(found[name], rank, matrices[name], gradients[name])
            for name, rank in ranks_within(high).items()
        }

    return at


def metrics_of(bench: Bench) -> dict[str, KroneckerFactors]:
    """The metric of the loss for each layer."""
    return {name: bench.calibration.layers[name].curvature for name in bench.matrices()}


def gradient_aligned(bench: Bench) -> Callable[[float], Ranks]:
    return by_knapsack(bench, bench.factorisations(metrics_of(bench)), curvature.predict)


def gradient_aligned_same_share(bench: Bench) -> Callable[[float], Ranks]:
    found, matrices = bench.factorisations(metrics_of(bench)), bench.matrices()
    return lambda share: same_share(found, matrices, share)


def plain_by_curvature(bench: Bench) -> Callable[[float], Ranks]:
    """Factors that no data has gone into are judged by all of it."""

    def predict(problem: Problem) -> dict[str, list[Prediction]]:
        return {
            layer.name: [
                Prediction(second_order_change(one.error(layer.matrix), metrics[layer.name]) if one.factors else 0.0)
                for one in problem.candidates[layer.name]
            ]
            for layer in problem.layers
        }

    metrics = {name: statistics.curvature for name, statistics in bench.calibration.layers.items()}
    return by_knapsack(bench, bench.factorisations({}), predict)


METHODS: dict[str, Callable[[Bench], Callable[[float], Ranks]]] = {
    "svd": plain,
    "fwsvd": fisher_weighted,
    "llc": llc,
    "lod": lod,
    "gradient-aligned": gradient_aligned,
    "svd, ranks by curvature": plain_by_curvature,
    "gradient-aligned, same share": gradient_aligned_same_share,
}


def factorised(model: PreTrainedModel, ranks: Ranks) -> PreTrainedModel:
    """A copy of the model with these layers factorised."""
    twin = copy.deepcopy(model)
    stored = {}
    for layer in find_layers(twin):
        if layer.name in ranks:
            out_features, in_features = layer.matrix.shape
            low_rank = LowRank(rank=ranks[layer.name].rank, shape=(out_features, in_features))
            cost = low_rank.rank * (out_features + in_features) * 4
            plan = LayerPlan(kind="low_rank", low_rank=low_rank, cost_bytes=cost, predicted_loss_change=0.0)
            stored[layer.name] = stored_layer(layer, plan, factors=ranks[layer.name])
    apply(twin, stored)
    return twin


def kept_share(layers: list[Layer], ranks: Ranks) -> float:
    """Parameters that are left of the layers'."""
    total = sum(layer.matrix.numel() for layer in layers)
    kept = sum(
        ranks[layer.name].left.numel() + ranks[layer.name].right.numel()
        if layer.name in ranks
        else layer.matrix.numel()
        for layer in layers
    )
    return kept / total


def bench_model(name: str, assets: Path, methods: list[str]) -> dict[str, Any]:
    calibration_file, test_file, num_test_rows = _DATA[name]
    task_class = {"minilm-sst2": transformers.AutoModelForSequenceClassification}.get(
        name, transformers.AutoModelForImageClassification
    )
    model = task_class.from_pretrained(assets / name).eval()
    task = task_of(model)
    processor = task.load_processor(str(assets / name))
    config = LosslessCompressionConfig(dataset=str(assets / calibration_file), ratio=2, num_samples=_ROWS)
    batches = calibration_batches(model, config.rows)
    kind = "json" if test_file.endswith("jsonl") else "parquet"
    rows = datasets.load_dataset(kind, data_files=str(assets / test_file), split="train")
    if num_test_rows is not None:
        rows = rows.select(range(num_test_rows))
    layers = find_layers(model)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(4):  # in turn; the first of each is slower and not counted
        for with_curvature, times in seconds.items():
            start = time.perf_counter()
            calibration = calibrate(
                model, batches, layers, batch_loss, gradients=with_curvature, curvature=with_curvature
            )
            times.append(time.perf_counter() - start)
    plain_seconds, curvature_seconds = (statistics.median(times[1:]) for times in seconds.values())
    bench = Bench(model, batches, layers, calibration, plain_seconds)
    original = evaluate(model, rows, task, processor)
    report: dict[str, Any] = {
        "test_rows": original.num_examples,
        "original": {"loss": original.loss, original.metric_name: original.metric},
        "layers": len(layers),
        "layer_parameters": sum(layer.matrix.numel() for layer in layers),
        "forward_backward_seconds": round(plain_seconds, 3),
        "forward_backward_passes_with_curvature": round(curvature_seconds / plain_seconds, 2),
        "methods": {},
    }
    for method in methods:
        start = time.perf_counter()
        at = METHODS[method](bench)
        planning = time.perf_counter() - start
        points = []
        for share in _SHARES:
            start = time.perf_counter()
            ranks = at(share)
            planning += time.perf_counter() - start
            result = evaluate(factorised(model, ranks), rows, task, processor)
            point = {
                "asked": share,
                "kept": round(kept_share(layers, ranks), 4),
                "loss": result.loss,
                "loss_change": result.loss - original.loss,
                result.metric_name: result.metric,
            }
            note = bench.notes.get(f"{method} {share}")
            points.append(point if note is None else {**point, "note": note})
            print(name, method, {key: value for key, value in point.items()}, note or "", flush=True)
        report["methods"][method] = {"planning_passes": round(planning / bench.pass_seconds, 2), "points": points}
    return report


def bench_latency() -> list[dict[str, Any]]:
    """Forward latency of layers at several ranks beside the dense layer, all in float32."""
    cases: list[tuple[str, Callable[[], nn.Module], Tensor]] = [
        ("linear 384x384, 128 tokens", lambda: nn.Linear(384, 384), torch.randn(128, 384)),
        ("linear 384x1536, 128 tokens", lambda: nn.Linear(1536, 384), torch.randn(128, 1536)),
        ("linear 768x3072, 128 tokens", lambda: nn.Linear(3072, 768), torch.randn(128, 3072)),
        ("linear 768x3072, 1 token", lambda: nn.Linear(3072, 768), torch.randn(1, 3072)),
        ("conv 128x128x3x3, 8 images 14x14", lambda: nn.Conv2d(128, 128, 3, padding=1), torch.randn(8, 128, 14, 14)),
    ]
    rows = []
    for name, make, inputs in cases:
        torch.manual_seed(0)
        dense = make()
        layer = find_layers(nn.Sequential(dense))[0]
        largest = largest_rank(*layer.matrix.shape)
        ranks = [largest, largest * 3 // 4, largest // 2, largest // 4, largest // 8]
        found = factorise(layer.matrix, largest=largest)
        variants: dict[int, nn.Module] = {0: dense}
        for rank in ranks:
            holder = nn.Sequential(copy.deepcopy(dense))
            out_features, in_features = layer.matrix.shape
            low_rank = LowRank(rank=rank, shape=(out_features, in_features))
            plan = LayerPlan(kind="low_rank", low_rank=low_rank, cost_bytes=0, predicted_loss_change=0.0)
            variants[rank] = apply(holder, {"0": stored_layer(layer, plan, factors=found.truncated(rank))})[0]
        times: dict[int, list[float]] = {rank: [] for rank in variants}
        with torch.no_grad():
            for _ in range(60):  # in turn, so that noise meets all alike
                for rank, module in variants.items():
                    start = time.perf_counter()
                    for _ in range(5):
                        module(inputs)
                    times[rank].append((time.perf_counter() - start) / 5)
        median = {rank: statistics.median(values[10:]) for rank, values in times.items()}
        for rank in ranks:
            share = rank * sum(layer.matrix.shape) / layer.matrix.numel()
            rows.append(
                {
                    "layer": name,
                    "rank": rank,
                    "multiplications": round(share, 3),
                    "dense_ms": round(median[0] * 1e3, 4),
                    "low_rank_ms": round(median[rank] * 1e3, 4),
                    "time": round(median[rank] / median[0], 3),
                }
            )
            print(rows[-1], flush=True)
    return rows


def summary(report: dict[str, Any]) -> str:
    """Changes of the loss by method and model, then latencies by layer and rank."""
    models = report["models"]
    lines = ["| | " + " | ".join(models) + " |", "|---" * (len(models) + 1) + "|"]
    for method in next(iter(models.values()))["methods"]:
        cells = [
            " / ".join(_signed(point["loss_change"]) for point in model["methods"][method]["points"])
            for model in models.values()
        ]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    by_layer: dict[str, list[dict[str, Any]]] = {}
    for row in report["latency"]:
        by_layer.setdefault(row["layer"], []).append(row)
    shares = [f"{math.floor(100 * row['multiplications'])}%" for row in next(iter(by_layer.values()))]
    lines += ["", f"| layer | {' | '.join(shares)} |", "|---" * (len(shares) + 1) + "|"]
    for layer, rows in by_layer.items():
        times = [f"{row['time']:.2f}" for row in rows]
        lines.append(f"| {layer} | {' | '.join(times)} |")
    return "\n".join(lines) + "\n"


def _signed(change: float) -> str:
    """A fourth digit where the change is below a hundredth."""
    return f"{change:+.4f}" if abs(change) < 0.01 else f"{change:+.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_assets_option(parser)
    parser.add_argument("--models", nargs="*", default=list(_DATA))
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--out", type=Path, default=_OUT)
    arguments = parser.parse_args()
    assets = assets_folder(parser, arguments)
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
        "models": {name: bench_model(name, assets, arguments.methods) for name in arguments.models},
        "latency": bench_latency(),
    }
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    if arguments.out == _OUT:
        write_part("low rank", summary(report))


if __name__ == "__main__":
    main()
