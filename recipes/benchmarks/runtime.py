"""Time, divergence and memory of each run time, beside the original in the same process.

    python recipes/benchmarks/runtime.py --original DIR --compressed NAME=DIR ... --data FILE --out runtime.json

Every model runs in turn on the same input, so that noise meets all; a ratio is the median of the ratios of one round,
over the original's time, and below 1 is quicker. Divergence is that from the run time "exact" of the same folder, on
500 rows. Resident memory is of a process of its own for each model, over one that has loaded the libraries.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import hf_lossless
from hf_lossless.storage.runtime.runtimes import VARIABLE, checked_runtime

TEXT_SHAPES = ((1, 16), (1, 32), (1, 128), (8, 32), (8, 128))
IMAGE_BATCHES = (1, 8, 32)
ROWS = 500


def load(folder: str, runtime: str | None = None) -> nn.Module:
    """A model of a folder; a run time is for a compressed one."""
    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0]).from_pretrained(folder).eval()
    return model if runtime is None else hf_lossless.optimize(model, runtime)


def inputs_of(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Inputs by the name of their shape."""
    generator = torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        side = getattr(model.config, "image_size", 28)
        return {
            f"{batch}": {"pixel_values": torch.randn(batch, 3, side, side, generator=generator)}
            for batch in IMAGE_BATCHES
        }
    return {
        f"{batch}x{length}": {
            "input_ids": torch.randint(1000, 30_000, (batch, length), generator=generator),
            "attention_mask": torch.ones(batch, length, dtype=torch.long),
        }
        for batch, length in TEXT_SHAPES
    }


def paired(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, dict[str, float]]:
    """Milliseconds, and ratios to the first, of calls that are made in turn."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    for turn in range(100):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn >= 2:
                taken[name].append(time.perf_counter() - start)
        if turn >= 6 and time.perf_counter() > end:
            break
    first = next(iter(taken.values()))
    rounds = {name: [one / base for one, base in zip(times, first, strict=True)] for name, times in taken.items()}
    return {
        name: {
            "ms": round(1e3 * statistics.median(taken[name]), 2),
            "ratio": round(statistics.median(ratios), 3),
            "ratio_quartiles": [round(one, 3) for one in statistics.quantiles(ratios, n=4)[::2]],
        }
        for name, ratios in rounds.items()
    }


def held_out(folder: str, data: str) -> list[dict[str, Tensor]]:
    """Batches of the data's first rows, sorted by length."""
    import datasets

    kind = "parquet" if data.endswith(".parquet") else "json"
    rows = datasets.load_dataset(kind, data_files=data, split=f"train[:{ROWS}]")
    if "image" in rows.column_names:
        processor = transformers.AutoImageProcessor.from_pretrained(folder)
        images = [image.convert("RGB") for image in rows["image"]]
        return [dict(processor(images[start : start + 50], return_tensors="pt")) for start in range(0, len(images), 50)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = sorted(rows["text"], key=len)
    return [
        dict(tokenizer(texts[start : start + 50], padding=True, truncation=True, return_tensors="pt"))
        for start in range(0, len(texts), 50)
    ]


def divergence(model: nn.Module, expected: Tensor, batches: list[dict[str, Tensor]]) -> dict[str, float]:
    """Mean KL divergence from expected logits, and changed predictions."""
    found = logits(model, batches)
    p, q = expected.log_softmax(-1), found.log_softmax(-1)
    return {
        "kl": float(f"{(p.exp() * (p - q)).sum(-1).mean():.3g}"),
        "flips": int((p.argmax(-1) != q.argmax(-1)).sum()),
    }


def logits(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """Logits of all rows, float64."""
    return torch.cat([model(**batch).logits for batch in batches]).double()


def resident_mb() -> float:
    """Resident memory of this process, once freed memory has been given back."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def memory_of(folder: str) -> dict[str, float]:
    """Resident memory that a model adds, after loading and after a forward; for a process of its own."""
    nn.Linear(8, 8)(torch.randn(1, 8))
    hf_lossless.LosslessHfQuantizer  # noqa: B018  # loads what every load needs
    architecture = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    getattr(transformers, architecture)
    before = resident_mb()
    start = time.perf_counter()
    model = load(folder)
    seconds = time.perf_counter() - start
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # brings the pages of mapped files in, once
    loaded = resident_mb()
    with torch.inference_mode():
        model(**next(iter(inputs_of(model).values())))
    return {
        "loaded_mb": round(loaded - before, 1),
        "run_mb": round(resident_mb() - before, 1),
        "load_s": round(seconds, 2),
    }


def memory_in_child(folder: str, runtime: str | None) -> dict[str, float]:
    """`memory_of` in a new process."""
    environment = {**os.environ, **({} if runtime is None else {VARIABLE: runtime})}
    child = subprocess.run(
        [sys.executable, __file__, "--memory-of", folder], env=environment, check=True, stdout=subprocess.PIPE
    )
    found: dict[str, float] = json.loads(child.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", help="folder of the original")
    parser.add_argument("--compressed", action="append", default=[], metavar="NAME=DIR", help="may be repeated")
    parser.add_argument("--data", help="rows for the divergence: jsonl with text, or parquet with image")
    parser.add_argument("--runtimes", default="auto,fast,exact", help="exact among them")
    parser.add_argument("--seconds", type=float, default=15, help="for each shape")
    parser.add_argument("--name", default="model", help="of the original, in the report")
    parser.add_argument("--out", type=Path, help="JSON; what is there of other models is kept")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory_of is not None:
        print(json.dumps(memory_of(options.memory_of)))
        return
    if options.original is None or not options.compressed or options.data is None:
        parser.error("give --original, --compressed and --data")
    runtimes = [checked_runtime(one, "--runtimes") for one in options.runtimes.split(",")]
    folders = dict(one.split("=", 1) for one in options.compressed)
    report: dict[str, Any] = {"memory": {"original": memory_in_child(options.original, None)}, "divergence": {}}
    models = {"original": load(options.original)}
    batches = held_out(options.original, options.data)
    with torch.inference_mode():
        for name, folder in folders.items():
            models |= {f"{name}, {runtime}": load(folder, runtime) for runtime in runtimes}
            expected = logits(models[f"{name}, exact"], batches)
            report["divergence"][f"{name}, exact, from the original"] = divergence(
                models["original"], expected, batches
            )
            for runtime in (one for one in runtimes if one != "exact"):
                label = f"{name}, {runtime}"
                report["divergence"][label] = divergence(models[label], expected, batches)
            for runtime in runtimes:
                report["memory"][f"{name}, {runtime}"] = memory_in_child(folder, runtime)
        report["time"] = {
            shape: paired(
                {name: lambda model=model, inputs=inputs: model(**inputs) for name, model in models.items()},
                options.seconds,
            )
            for shape, inputs in inputs_of(models["original"]).items()
        }
    report["machine"] = {
        "processor": platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "load_average": round(os.getloadavg()[0], 1),
    }
    print(json.dumps(report, indent=2))
    if options.out is not None:
        whole = json.loads(options.out.read_text()) if options.out.exists() else {}
        options.out.write_text(json.dumps({**whole, options.name: report}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
