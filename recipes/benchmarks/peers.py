"""Every peer on the same model, calibration rows and held-out rows as `compare.py`. Writes peers.json.

    python recipes/benchmarks/peers.py [--assets DIR] [--models NAME ...] [--peers NAME ...] [--out FILE]

A row is one setting of a tool. Its bytes are those of the whole checkpoint as that tool stores it (codes as it packs
them, scales, zero points, and all that stays in floating point, embeddings and norms included). Beside the loss stand
the metric, the predictions that changed ("flips") and the divergence of the predicted classes from the original's
("kl"): at these sizes the loss alone cannot rank methods, for it falls about as often as it rises.

A tool that is not installed (`pip install 'hf-lossless[peers]'`) or cannot take the model is a row that says why.
"""

import argparse
import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from assets import add_assets_option, assets_folder
from peer_methods import bitsandbytes, modelopt, nearest, nncf, onnxruntime, quanto, torch_dynamic, torchao
from peer_methods.problem import Batch, Method, PeerProblem, Unavailable, logits_of
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hf_lossless import LosslessCompressionConfig
from hf_lossless.calibration.statistics import calibrate
from hf_lossless.data.batches import batch_loss
from hf_lossless.data.rows import calibration_batches, make_batches
from hf_lossless.data.tasks.classification import Classification
from hf_lossless.data.tasks.registry import task_of
from hf_lossless.storage.layers import find_layers

_HERE = Path(__file__).resolve().parent
ROWS = 128
_BATCH_SIZE = 64
DATA = {  # model: calibration rows, test rows, how many of those judge
    "minilm-sst2": ("minilm-sst2/validation.jsonl", "minilm-sst2/test.jsonl", None),
    "resnet-fashion-mnist": ("fashion-mnist/validation.parquet", "fashion-mnist/test.parquet", 4000),
    "vit-fashion-mnist": ("fashion-mnist/validation.parquet", "fashion-mnist/test.parquet", 4000),
}
_PACKAGES = ("torchao", "optimum-quanto", "bitsandbytes", "nvidia-modelopt", "nncf", "onnxruntime", "onnx")

PEERS: dict[str, Method] = {
    **nearest.METHODS,
    **torch_dynamic.METHODS,
    **torchao.METHODS,
    **quanto.METHODS,
    **bitsandbytes.METHODS,
    **nncf.METHODS,
    **modelopt.METHODS,
    **onnxruntime.METHODS,
}


def run_peer(
    name: str,
    problem: PeerProblem,
    test_batches: list[Batch],
    original_logits: Tensor,
    labels: Tensor,
    pass_seconds: float | None = None,
) -> dict[str, Any]:
    """One row of the comparison, ready for JSON.

    Args:
        name: A key of `PEERS`.
        problem: The model and its calibration rows.
        test_batches: Rows that no peer has seen.
        original_logits: The original's scores of those rows [rows, classes].
        labels: Their labels [rows].
        pass_seconds: Time of one forward-backward pass over the calibration rows; None: "passes" is left out.

    Returns:
        {"peer", "ratio", "size_bytes", "seconds" (to quantise, with calibration and export), "passes", what `figures`
        gives, "note"}, or {"peer", "unavailable": why}.
    """
    start = time.perf_counter()
    try:
        peer = PEERS[name](problem)
        seconds = time.perf_counter() - start
        logits = scores(peer.logits, test_batches)
    except Exception as error:  # whatever a peer throws is its answer
        return {"peer": name, "unavailable": _reason(error)}
    if not torch.isfinite(logits).all():
        return {"peer": name, "unavailable": "its scores are not finite"}
    return {
        "peer": name,
        "ratio": round(problem.original_bytes / peer.size_bytes, 3),
        "size_bytes": peer.size_bytes,
        **figures(original_logits, logits, labels, problem.task),
        "seconds": round(seconds, 2),
        **({} if pass_seconds is None else {"passes": round(seconds / pass_seconds, 1)}),
        "note": peer.note,
    }


def compare_peers(
    problem: PeerProblem, test_batches: list[Batch], pass_seconds: float, names: Iterable[str] = PEERS
) -> dict[str, Any]:
    """All rows of one model, ready for JSON; each is printed when it is there.

    Args:
        problem: The model and its calibration rows.
        test_batches: Rows that no peer has seen, with "labels".
        pass_seconds: Time of one forward-backward pass over the calibration rows.
        names: Which rows.
    """
    labels = torch.cat([batch["labels"] for batch in test_batches])
    original_logits = scores(logits_of(problem.model), test_batches)
    rows = []
    for name in names:
        rows.append(run_peer(name, problem, test_batches, original_logits, labels, pass_seconds))
        print(rows[-1], flush=True)
    return {
        "test_rows": len(labels),
        "original_bytes": problem.original_bytes,
        "original": figures(original_logits, original_logits, labels, problem.task),
        "forward_backward_seconds": round(pass_seconds, 3),
        "peers": rows,
    }


def scores(logits: Callable[[Batch], Tensor], batches: list[Batch]) -> Tensor:
    """Scores of all rows, float32 [rows, classes]."""
    return torch.cat([logits(batch).float() for batch in batches])


def figures(original_logits: Tensor, logits: Tensor, labels: Tensor, task: Classification) -> dict[str, Any]:
    """How far a model is from the original on rows with labels.

    Args:
        original_logits: [rows, classes].
        logits: [rows, classes].
        labels: [rows].
        task: Knows losses, predictions and metric.

    Returns:
        "loss"; "loss_change" and "loss_change_se", its standard error over the rows, each paired with itself;
        "metric"; "flips", the predictions that changed; "kl", the mean of sum_c p_c log(p_c / q_c), with p the
        original's probabilities.
    """
    losses = task.example_losses(logits, labels).double()
    changes = losses - task.example_losses(original_logits, labels).double()
    before, after = original_logits.double().log_softmax(-1), logits.double().log_softmax(-1)
    predictions = task.predict(logits)
    return {
        "loss": losses.mean().item(),
        "loss_change": changes.mean().item(),
        "loss_change_se": (changes.std() / len(changes) ** 0.5).item(),
        "metric": task.example_scores(predictions, labels).double().mean().item(),
        "flips": int((predictions != task.predict(original_logits)).sum()),
        "kl": (before.exp() * (before - after)).sum(-1).mean().item(),
    }


def _reason(error: Exception) -> str:
    """What an error says, on one line."""
    said = " ".join(str(error).split())[:300]
    return said if isinstance(error, Unavailable) else f"{type(error).__name__}: {said}"


def load(name: str, assets: Path) -> tuple[PeerProblem, list[Batch]]:
    """A model with its calibration rows, and the held-out rows that judge."""
    return load_folder(assets / name, assets, *DATA[name])


def load_folder(
    folder: Path, assets: Path, calibration_file: str, test_file: str, num_test_rows: int | None
) -> tuple[PeerProblem, list[Batch]]:
    """The same of a model in any folder, with files of `assets`."""
    text = test_file.endswith(".jsonl")
    auto = transformers.AutoModelForSequenceClassification if text else transformers.AutoModelForImageClassification
    model = auto.from_pretrained(folder).eval()
    task = task_of(model)
    processor = task.load_processor(str(folder))
    config = LosslessCompressionConfig(dataset=str(assets / calibration_file), num_samples=ROWS, ratio=6)
    problem = PeerProblem(model, [dict(batch) for batch in calibration_batches(model, config.rows)], task)
    rows = datasets.load_dataset("json" if text else "parquet", data_files=str(assets / test_file), split="train")
    judged = rows if num_test_rows is None else rows.select(range(num_test_rows))
    return problem, [dict(batch) for batch in make_batches(judged, task, processor, model, _BATCH_SIZE)]


def bench_model(name: str, assets: Path, peers: list[str]) -> dict[str, Any]:
    """All peers on one model."""
    problem, test_batches = load(name, assets)
    return compare_peers(problem, test_batches, time_of_pass(problem), peers)


def time_of_pass(problem: PeerProblem) -> float:
    """Seconds of one forward-backward pass over the calibration rows: the median of three, after one to warm up."""
    layers = find_layers(problem.model)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        calibrate(problem.model, problem.batches, layers, batch_loss)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def table(model_name: str, report: dict[str, Any]) -> Table:
    """The rows of one model."""
    result = Table(title=f"{model_name}, {report['test_rows']} test rows, metric {report['original']['metric']:.4f}")
    for heading in ("peer", "ratio", "loss change", "metric", "flips", "KL", "seconds", "passes"):
        result.add_column(heading)
    for row in report["peers"]:
        if "unavailable" in row:
            result.add_row(row["peer"], row["unavailable"])
            continue
        result.add_row(
            row["peer"],
            f"{row['ratio']:.2f}",
            f"{row['loss_change']:+.4f} ± {row['loss_change_se']:.4f}",
            f"{row['metric']:.4f}",
            str(row["flips"]),
            f"{row['kl']:.5f}",
            str(row["seconds"]),
            str(row["passes"]),
        )
    return result


def versions() -> dict[str, str]:
    """Of the peers' packages that are installed."""
    installed = {distribution.name.lower(): distribution.version for distribution in importlib.metadata.distributions()}
    return {name: installed[name] for name in _PACKAGES if name in installed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_assets_option(parser)
    parser.add_argument("--models", nargs="*", choices=list(DATA), default=list(DATA))
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--out", type=Path, default=_HERE / "peers.json")
    arguments = parser.parse_args()
    assets = assets_folder(parser, arguments)
    torch.set_num_threads(1)  # times of one thread are steadier on a machine that others use
    report = {
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            **versions(),
        },
        "calibration_rows": ROWS,
        "models": {name: bench_model(name, assets, arguments.peers) for name in arguments.models},
    }
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    for name, model in report["models"].items():
        Console(width=180).print(table(name, model))


if __name__ == "__main__":
    main()
