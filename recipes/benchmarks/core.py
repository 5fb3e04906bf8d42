"""Figures of the core: knapsack, packing, and the main job on minilm-sst2. Writes core.json.

    python recipes/benchmarks/core.py [--assets DIR] [--only PART ...]

Times are medians of several runs, and what is compared is measured in the same run, one after the other in turn.
Of the parts only `minilm-sst2` needs `--assets`. Tables go into recipes/README.md as well.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from assets import add_assets_option, assets_folder
from readme import write_part
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hf_lossless
from hf_lossless import LosslessCompressionConfig
from hf_lossless.calibration.statistics import calibrate
from hf_lossless.certification.evaluation import evaluate
from hf_lossless.data.batches import batch_loss
from hf_lossless.data.rows import calibration_batches
from hf_lossless.data.tasks.registry import task_named
from hf_lossless.planning import knapsack
from hf_lossless.storage.grid import stored_bytes
from hf_lossless.storage.layers import find_layers
from hf_lossless.storage.packing import pack, unpack
from hf_lossless.storage.plan import Grid

_HERE = Path(__file__).resolve().parent


def seconds(run: Callable[[], object], repeats: int = 5) -> float:
    """Median wall time of a call, after one that is not counted."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def deep_model(num_groups: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Layers like those of a deep transformer: weights of 1x and 4x 590k, widths 1 to 16, random sensitivities."""
    generator = np.random.default_rng(seed)
    size = generator.choice([1, 4], num_groups, p=[2 / 3, 1 / 3])
    bits = np.arange(1, 17)
    costs = size[:, None] * bits * (768 * 768 // 8)
    sensitivity = np.exp(generator.normal(0, 2, num_groups)) * size
    losses = sensitivity[:, None] * 4.0**-bits * np.exp(generator.normal(0, 0.1, (num_groups, 16)))
    return costs, losses


def stored_layers(num_groups: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The same layers as they are really stored: 1 to 8 bits, symmetric and not, with scales for groups of 64."""
    generator = np.random.default_rng(seed)
    grids = [Grid(bits=bits, group_size=64, symmetric=symmetric) for bits in range(1, 9) for symmetric in (True, False)]
    shapes = [(768, 768), (3072, 768), (768, 3072)]
    by_shape = np.array([[stored_bytes(*shape, grid, rows=1) for grid in grids] for shape in shapes])
    shape = generator.choice(3, num_groups, p=[2 / 3, 1 / 6, 1 / 6])
    bits = np.array([grid.bits + (not grid.symmetric) * 0.3 for grid in grids])
    sensitivity = np.exp(generator.normal(0, 2, num_groups))
    losses = sensitivity[:, None] * 4.0**-bits * np.exp(generator.normal(0, 0.1, (num_groups, len(grids))))
    return by_shape[shape], losses


def random_costs(num_groups: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sixteen candidates without any structure."""
    generator = np.random.default_rng(seed)
    return generator.integers(1, 101, (num_groups, 16)), generator.random((num_groups, 16))


def highs(costs: np.ndarray, losses: np.ndarray, max_cost: int, unit: float) -> float:
    """The optimum for one budget, by scipy's mixed-integer programme (HiGHS), to a relative gap of 1e-9.

    HiGHS also stops at an absolute gap of 1e-6, which scipy cannot change: losses are given in thousandths of `unit`.
    """
    groups, candidates = costs.shape
    one_each = coo_array(
        (np.ones(costs.size), (np.repeat(np.arange(groups), candidates), np.arange(costs.size))),
        shape=(groups, costs.size),
    )
    solution = milp(
        losses.ravel() / unit * 1e3,
        integrality=np.ones(costs.size),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(costs.ravel()[None, :], -np.inf, max_cost)],
        options={"mip_rel_gap": 1e-9},
    )
    return float(solution.fun) / 1e3 * unit


def bench_knapsack() -> dict[str, Any]:
    results = {}
    for name, (costs, losses) in {
        "deep model": deep_model(1000, 0),
        "deep model as stored": stored_layers(1000, 0),
        "random costs": random_costs(1000, 0),
    }.items():
        whole = seconds(partial(knapsack.frontier, costs, losses))
        frontier = knapsack.frontier(costs, losses)
        budgets = [int(np.quantile(frontier.cost_bytes, share)) for share in (0.25, 0.5, 0.75)]
        ours = [float(frontier.predicted_loss_change[frontier.within_bytes(budget)]) for budget in budgets]
        start = time.perf_counter()
        optima = [highs(costs, losses, budget, optimum) for budget, optimum in zip(budgets, ours, strict=True)]
        one_budget = (time.perf_counter() - start) / len(budgets)
        results[name] = {
            "groups": len(costs),
            "candidates": costs.shape[1],
            "plans_on_the_frontier": len(frontier),
            "resolution_bytes": frontier.resolution_bytes,
            "seconds_whole_frontier": whole,
            "seconds_highs_one_budget": one_budget,
            "highs_one_budget_over_whole_frontier": one_budget / whole,
            "largest_relative_difference_of_optima": max(
                abs(a - b) / abs(b) for a, b in zip(ours, optima, strict=True)
            ),
        }
    return results


def bench_packing(num_codes: int = 100_000_000) -> dict[str, Any]:
    """GB of codes (one byte each when unpacked) a second, beside torch's copy of as many bytes."""
    results: dict[str, Any] = {"codes": num_codes, "threads": torch.get_num_threads()}
    generator = torch.Generator().manual_seed(0)
    for bits in (2, 3, 4, 8):
        codes = torch.randint(0, 2**bits, (1, num_codes), dtype=torch.uint8, generator=generator)
        target = torch.empty_like(codes)
        packed = pack(codes, bits)
        assert torch.equal(unpack(packed, bits, num_codes), codes)
        copy = seconds(partial(target.copy_, codes))
        rates = {
            "pack_gb_per_s": num_codes / seconds(partial(pack, codes, bits)) / 1e9,
            "unpack_gb_per_s": num_codes / seconds(partial(unpack, packed, bits, num_codes)) / 1e9,
            "copy_gb_per_s": num_codes / copy / 1e9,
        }
        rates["unpack_over_copy"] = rates["unpack_gb_per_s"] / rates["copy_gb_per_s"]
        results[f"{bits} bits"] = rates
    return results


def bench_main_job(assets: Path, ratio: float = 6.0) -> dict[str, Any]:
    """minilm-sst2: calibrate and plan in units of one forward-backward pass, held-out loss, reload."""
    folder = assets / "minilm-sst2"
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    config = LosslessCompressionConfig(dataset=str(folder / "validation.jsonl"), ratio=ratio, theory="llc")
    batches = calibration_batches(model, config.rows)
    layers = find_layers(model)
    one_pass = seconds(lambda: calibrate(model, batches, layers, batch_loss), repeats=3)
    plain_pass = seconds(lambda: [batch_loss(model, batch).backward() for batch in batches], repeats=3)
    model.zero_grad()
    start = time.perf_counter()
    compressed = AutoModelForSequenceClassification.from_pretrained(
        folder, quantization_config=LosslessCompressionConfig(dataset=batches, ratio=ratio, theory="llc")
    )
    planning = time.perf_counter() - start
    result = compressed.hf_quantizer.result

    task = task_named("text-classification")
    processor = AutoTokenizer.from_pretrained(folder)
    held_out = {
        name: evaluate(judged, str(folder / "test.jsonl"), task, processor)
        for name, judged in {"original": model, "compressed": compressed}.items()
    }
    with tempfile.TemporaryDirectory() as out:
        compressed.save_pretrained(out)
        reloads = _reloads({"original": str(folder), "compressed": out})
    return {
        "calibration_rows": sum(len(batch["labels"]) for batch in batches),
        "layers": len(layers),
        "seconds_forward_backward": plain_pass,
        "seconds_calibrate": one_pass,
        "seconds_load_calibrate_and_plan": planning,
        "load_calibrate_and_plan_in_forward_backward_passes": planning / plain_pass,
        "size_bytes": result.size_bytes,
        "ratio": result.ratio,
        "predicted_loss_change": result.plan.predicted_loss_change,
        "held_out": {
            name: {"loss": judged.loss, "accuracy": judged.metric, "rows": judged.num_examples}
            for name, judged in held_out.items()
        },
        "forward_milliseconds": _forwards(model, compressed),
        "reload": reloads,
    }


def _forwards(original: torch.nn.Module, compressed: torch.nn.Module) -> dict[str, Any]:
    """Median time of a forward pass, the two models in turn; a compressed layer unpacks its weight at each call."""
    results = {}
    for rows, tokens in ((1, 16), (8, 32), (32, 32)):
        inputs = torch.randint(1000, 30000, (rows, tokens), generator=torch.Generator().manual_seed(0))
        times: dict[str, list[float]] = {"original": [], "compressed": []}
        for _ in range(30):
            for name, model in (("original", original), ("compressed", compressed)):
                start = time.perf_counter()
                with torch.no_grad():
                    model(input_ids=inputs)
                times[name].append(1000 * (time.perf_counter() - start))
        medians = {name: statistics.median(values[5:]) for name, values in times.items()}
        results[f"{rows} x {tokens} tokens"] = {**medians, "ratio": medians["compressed"] / medians["original"]}
    return results


_LOAD = """
import re, sys, time
import torch, hf_lossless
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

def kib(what):
    return int(re.search(what + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew, after the imports
before = kib("VmRSS")
start = time.perf_counter()
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
seconds = time.perf_counter() - start
loaded = kib("VmHWM") - before
with torch.no_grad():
    model(input_ids=torch.arange(1000, 1032)[None])
print(seconds, loaded * 1024, (kib("VmHWM") - before) * 1024)
"""


def _reloads(folders: dict[str, str], repeats: int = 5) -> dict[str, Any]:
    """Seconds and growth of peak memory of `from_pretrained`, and of the peak after one forward pass of 32 tokens.

    Each load has a process of its own; the folders take turns. Linux only.
    """
    measured: dict[str, list[tuple[float, ...]]] = {name: [] for name in folders}
    for _ in range(repeats):
        for name, folder in folders.items():
            output = subprocess.run(
                [sys.executable, "-c", _LOAD, folder], capture_output=True, text=True, check=True
            ).stdout.split()
            measured[name].append(tuple(map(float, output[-3:])))
    return {
        name: {
            "seconds": statistics.median(run[0] for run in runs),
            "peak_memory_growth_bytes": int(statistics.median(run[1] for run in runs)),
            "peak_memory_growth_with_a_forward_pass_bytes": int(statistics.median(run[2] for run in runs)),
        }
        for name, runs in measured.items()
    }


def planning(report: dict[str, Any]) -> str:
    """Time of the knapsack, and of a whole job."""
    lines = ["| 1,000 groups x 16 candidates | whole frontier | one budget by HiGHS, over that |", "|---|---|---|"]
    for name, row in report["knapsack"].items():
        times = f"{row['seconds_whole_frontier']:.2f} s | {row['highs_one_budget_over_whole_frontier']:.1f}"
        lines.append(f"| {name} | {times} |")
    job = report["minilm-sst2"]
    seconds, passes = (
        job[f"{part}load_calibrate_and_plan{unit}"]
        for part, unit in (("seconds_", ""), ("", "_in_forward_backward_passes"))
    )
    return "\n".join(lines) + f"\n\nThe job on minilm-sst2: {seconds:.0f} s, {passes:.0f} forward-backward passes.\n"


def running(report: dict[str, Any]) -> str:
    """The original of minilm-sst2 beside the compressed one, then rates of packing and unpacking."""
    job = report["minilm-sst2"]
    size, judged, loads = job["size_bytes"], job["held_out"].values(), job["reload"].values()
    rows = {
        "bytes": [f"{size * job['ratio']:,.0f}", f"{size:,} ({job['ratio']:.2f} times smaller)"],
        "held-out loss": [f"{one['loss']:.4f}" for one in judged],
        "held-out accuracy": [f"{one['accuracy']:.4f}" for one in judged],
        "load": [f"{one['seconds']:.3f} s" for one in loads],
        "growth of peak memory, load alone": [f"{one['peak_memory_growth_bytes'] / 1e6:.0f} MB" for one in loads],
        "growth of peak memory, load and one forward pass": [
            f"{one['peak_memory_growth_with_a_forward_pass_bytes'] / 1e6:.0f} MB" for one in loads
        ],
    }
    for name, times in job["forward_milliseconds"].items():
        compressed = f"{times['compressed']:.1f} ms ({times['ratio']:.2f} times as long)"
        rows[f"forward, {name}"] = [f"{times['original']:.1f} ms", compressed]
    lines = ["| | original | compressed |", "|---|---|---|"]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    lines += [
        "",
        "| codes, GB/s | pack | unpack into new memory | copy into memory at hand |",
        "|---|---|---|---|",
    ]
    for name, rates in report["packing"].items():
        if isinstance(rates, dict):
            cells = [f"{rates[f'{what}_gb_per_s']:.1f}" for what in ("pack", "unpack", "copy")]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parts: dict[str, Callable[[], Any]] = {
        "knapsack": bench_knapsack,
        "packing": bench_packing,
        "minilm-sst2": lambda: bench_main_job(assets),
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_assets_option(parser)
    parser.add_argument(
        "--only", nargs="+", choices=parts, default=list(parts), help="leave the other parts as they are"
    )
    arguments = parser.parse_args()
    if "minilm-sst2" in arguments.only:
        assets = assets_folder(parser, arguments)
    file = _HERE / "core.json"
    results: dict[str, Any] = json.loads(file.read_text())
    results |= {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "hf_lossless": hf_lossless.__version__,
        },
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
        **{name: parts[name]() for name in arguments.only},
    }
    text = json.dumps(results, indent=2) + "\n"
    file.write_text(text)
    write_part("planning", planning(results))
    write_part("running", running(results))
    print(text)


if __name__ == "__main__":
    main()
