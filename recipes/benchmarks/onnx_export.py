"""ONNX files of compressed MiniLMs: latency, bytes, and how far their outputs move. Writes onnx_export.json.

    python recipes/benchmarks/onnx_export.py --keep FOLDER [--assets DIR]

Two compressed models (entropy-coded at ratio 11, fixed widths at ratio 6), each exported for the run times "fast" and
"small", beside torch in float32 and onnxruntime's own dynamic int8 of the original. Everything runs on one thread of
one process, one after the other in turn; times are medians of rounds, ratios medians of each round's. Quality is of
500 test rows, against the compressed model in torch ("exact"). FOLDER keeps what was made, for another run.

The script is not called onnx.py: its folder comes first on Python's path, and would hide the package.
"""

import argparse
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from assets import add_assets_option, assets_folder
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_lossless import LosslessCompressionConfig, export
from hf_lossless.storage.runtime.optimize import optimize

_HERE = Path(__file__).resolve().parent
_MODELS: dict[str, dict[str, Any]] = {"coded": {"ratio": 11, "storage": "entropy"}, "fixed": {"ratio": 6}}
_RUNTIMES = ("fast", "small")
_SHAPES = {"1x32": (1, 32, 40), "8x128": (8, 128, 12)}
_WARM, _ROWS, _BATCH = 3, 500, 32

Run = Callable[[dict[str, Tensor]], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, required=True, help="folder for checkpoints and ONNX files")
    add_assets_option(parser)
    arguments = parser.parse_args()
    source = assets_folder(parser, arguments) / "minilm-sst2"
    torch.set_num_threads(1)
    arguments.keep.mkdir(exist_ok=True)
    batches = test_batches(source)
    original = AutoModelForSequenceClassification.from_pretrained(source).eval()
    runs: dict[str, Run] = {"torch float32": lambda inputs: original(**inputs).logits}
    figures: dict[str, dict[str, Any]] = {"torch float32": {"bytes": (source / "model.safetensors").stat().st_size}}
    dynamic = dynamic_int8(original, arguments.keep)
    runs["onnxruntime dynamic int8"] = in_onnxruntime(dynamic)
    figures["onnxruntime dynamic int8"] = {
        "bytes": dynamic.stat().st_size,
        **moved(logits(runs["torch float32"], batches), logits(runs["onnxruntime dynamic int8"], batches)),
    }
    for name, settings in _MODELS.items():
        folder = compressed(source, arguments.keep / name, settings)
        model = optimize(AutoModelForSequenceClassification.from_pretrained(folder).eval(), "exact")
        exact = logits(lambda inputs, model=model: model(**inputs).logits, batches)
        for runtime in _RUNTIMES:
            out, what = arguments.keep / f"{name}-{runtime}", f"{name}, {runtime}"
            start = time.perf_counter()
            if not out.exists():
                export(folder, out, "onnx", runtime=runtime)
                figures.setdefault(what, {})["export_seconds"] = round(time.perf_counter() - start)
            path = out / "onnx/model.onnx"
            start = time.perf_counter()
            runs[what] = in_onnxruntime(path)
            figures.setdefault(what, {}).update(
                load_seconds=round(time.perf_counter() - start, 2),
                bytes=path.stat().st_size,
                **moved(exact, logits(runs[what], batches)),
            )
            print(what, figures[what], flush=True)
    for shape, (rows, length, rounds) in _SHAPES.items():
        for what, (ratio, milliseconds) in latencies(runs, tokens(rows, length), rounds).items():
            figures[what][shape] = {"ratio": ratio, "milliseconds": milliseconds}
            print(shape, what, ratio, milliseconds, flush=True)
    import onnxruntime

    report = {
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "processor": platform.processor() or platform.machine(),
        "load_average": [round(one, 1) for one in os.getloadavg()],
        "figures": figures,
    }
    (_HERE / "onnx_export.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def compressed(source: Path, folder: Path, settings: dict[str, Any]) -> Path:
    """A compressed checkpoint, made where it is not there."""
    if not folder.exists():
        config = LosslessCompressionConfig(dataset=str(source / "validation.jsonl"), num_samples=64, **settings)
        AutoModelForSequenceClassification.from_pretrained(source, quantization_config=config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def dynamic_int8(model: nn.Module, keep: Path) -> Path:
    """The original, quantised by onnxruntime itself."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    plain, quantised = keep / "original.onnx", keep / "original-int8.onnx"
    if not quantised.exists():
        inputs = tokens(2, 16)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the older exporter: quantize_dynamic cannot read graphs of the newer one
            torch.onnx.export(
                Logits(model, list(inputs)),
                tuple(inputs.values()),
                str(plain),
                input_names=list(inputs),
                output_names=["logits"],
                dynamic_axes={name: {0: "rows", 1: "length"} for name in inputs},
                dynamo=False,
            )
        quantize_dynamic(plain, quantised, per_channel=True, weight_type=QuantType.QInt8)
    return quantised


class Logits(nn.Module):
    """A model with its inputs in a fixed order."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: Tensor) -> Tensor:
        """Its scores."""
        scores: Tensor = self.model(**dict(zip(self.names, tensors, strict=True))).logits
        return scores


def in_onnxruntime(path: Path) -> Run:
    """A file, as it is run by default, on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    return lambda inputs: torch.from_numpy(session.run(["logits"], {name: inputs[name].numpy() for name in names})[0])


def tokens(rows: int, length: int) -> dict[str, Tensor]:
    """A batch of tokens at random, none of it padding."""
    ids = torch.randint(1000, 30_000, (rows, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}


def test_batches(source: Path) -> list[dict[str, Tensor]]:
    """The first test rows, sorted by length."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    lines = (source / "test.jsonl").read_text(encoding="utf-8").splitlines()[:_ROWS]
    texts = sorted((json.loads(line)["text"] for line in lines), key=len)
    return [
        dict(
            tokenizer(
                texts[start : start + _BATCH],
                padding=True,
                truncation=True,
                max_length=128,
                return_tensors="pt",
                return_token_type_ids=True,
            )
        )
        for start in range(0, len(texts), _BATCH)
    ]


@torch.inference_mode()
def logits(run: Run, batches: list[dict[str, Tensor]]) -> Tensor:
    """Scores of all rows."""
    return torch.cat([run(batch) for batch in batches]).double()


def moved(ours: Tensor, theirs: Tensor) -> dict[str, float | int]:
    """Mean KL divergence in nats, and rows with another class."""
    p, q = ours.log_softmax(-1), theirs.log_softmax(-1)
    return {
        "kl": float(f"{float((p.exp() * (p - q)).sum(-1).mean()):.2e}"),
        "flips": int((ours.argmax(-1) != theirs.argmax(-1)).sum()),
    }


@torch.inference_mode()
def latencies(runs: dict[str, Run], inputs: dict[str, Tensor], rounds: int) -> dict[str, tuple[float, float]]:
    """Median ratio to the first run's time in the same round, and median milliseconds."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(_WARM + rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run(inputs)
            times[name].append(1e3 * (time.perf_counter() - start))
    times = {name: found[_WARM:] for name, found in times.items()}
    first = next(iter(times.values()))
    return {
        name: (
            round(statistics.median(one / base for one, base in zip(found, first, strict=True)), 3),
            round(statistics.median(found), 1),
        )
        for name, found in times.items()
    }


if __name__ == "__main__":
    main()
