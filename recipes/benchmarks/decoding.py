"""Loading entropy-coded layers: weights decoded a second by each decoder, and `from_pretrained` beside the original's.

    python recipes/benchmarks/decoding.py --original ORIGINAL --compressed FOLDER --out recipes/benchmarks/decoding.json

FOLDER has entropy-coded layers. Their codes are written anew in both versions of the stream, and decoded in turn by
constriction (version 1), numpy and numba (version 2), so that noise meets all of them; processor time, the least of
some rounds. Loading is timed in turn too, each in a process of its own, after imports; medians.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import constriction
import numpy as np
import torch
import transformers as hf
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from hf_lossless.storage.entropy import coder, compiled, kernels, matrix
from hf_lossless.storage.entropy.frequencies import TOTAL, Segment
from hf_lossless.storage.entropy.matrix import CodedMatrix
from hf_lossless.storage.modules.base import compressed_layers
from hf_lossless.storage.modules.coded import CodedModule

LOAD = """
import sys, time
import torch, transformers, transformers.modeling_utils, hf_lossless
from hf_lossless import checkpoints
from hf_lossless.storage.entropy import coder
if sys.argv[2] == "numpy":
    coder.COMPILED_FROM = float("inf")
start = time.perf_counter(), time.process_time()
transformers.AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
print(time.perf_counter() - start[0], time.process_time() - start[1])
"""
"""A process that prints the seconds it took to load a model, by the clock and of the processor."""


def first_version_stream(segments: list[Segment]) -> bytes:
    """Encodes segments as releases up to format version 5 did."""
    stack = constriction.stream.stack.AnsCoder()
    for symbols, model in reversed(segments):
        if model.takes_bits and len(symbols):
            weights = (model.weights / TOTAL).astype(np.float32)
            places = np.ascontiguousarray(symbols - model.first, np.int32)
            stack.encode_reverse(places, constriction.stream.model.Categorical(weights, perfect=False))
    return stack.get_compressed().astype("<u4").tobytes()


def encode_as(version: int, one: CodedMatrix) -> NDArray[np.uint8]:
    """Encodes a matrix with either version of the stream."""
    encode_segments = {1: first_version_stream, 2: coder.encode_segments}[version]
    with mock.patch.multiple(matrix, _VERSION=version, encode_segments=encode_segments):
        return matrix.encode(one)


def decoding_figures(matrices: list[CodedMatrix], rounds: int) -> dict[str, Any]:
    """Bytes of both versions, and millions of weights a second by each decoder."""
    num_weights = sum(one.codes.size for one in matrices)
    stored = {version: [encode_as(version, one) for one in matrices] for version in (1, 2)}

    def decode_all(version: int, kernel: coder.Kernel | None) -> None:
        for one, content in zip(matrices, stored[version], strict=True):
            matrix.decode(content, one.codes.shape, kernel)

    def decode_in_two_threads() -> None:
        with ThreadPoolExecutor(2) as threads:
            list(
                threads.map(
                    lambda pair: matrix.decode(pair[1], pair[0].codes.shape, compiled.decode_lanes),
                    zip(matrices, stored[2], strict=True),
                )
            )

    decoders: dict[str, tuple[Callable[[], None], Callable[[], float]]] = {
        "constriction": (partial(decode_all, 1, None), time.process_time),
        "numpy": (partial(decode_all, 2, kernels.decode_lanes), time.process_time),
        "numba": (partial(decode_all, 2, compiled.decode_lanes), time.process_time),
        "numba_two_threads_by_the_clock": (decode_in_two_threads, time.perf_counter),
        "numba_by_the_clock": (partial(decode_all, 2, compiled.decode_lanes), time.perf_counter),
        "constriction_by_the_clock": (partial(decode_all, 1, None), time.perf_counter),
    }
    seconds: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(rounds):
        for name, (decode, clock) in decoders.items():
            start = clock()
            decode()
            seconds[name].append(clock() - start)
    sizes = {version: sum(map(len, contents)) for version, contents in stored.items()}
    return {
        "weights": num_weights,
        "bytes_version_1": sizes[1],
        "bytes_version_2": sizes[2],
        "growth": round(sizes[2] / sizes[1] - 1, 6),
        "largest_growth_of_a_layer": round(max(len(b) / len(a) - 1 for a, b in zip(*stored.values(), strict=True)), 6),
        "million_weights_per_second": {
            name: round(num_weights / min(taken) / 1e6, 1) for name, taken in seconds.items()
        },
        "rounds": rounds,
    }


def write_as(version: int, folder: Path, target: Path, matrices: dict[str, CodedMatrix]) -> None:
    """Copies a compressed folder, with its coded layers in one version of the stream."""
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    layers = config["quantization_config"]["plan"]["layers"]
    for name, one in matrices.items():
        before, after = tensors[f"{name}.coded"], torch.from_numpy(encode_as(version, one))
        layers[name]["cost_bytes"] += len(after) - len(before)
        tensors[f"{name}.coded"] = after
    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def loading_figures(folders: dict[str, tuple[Path, str]], rounds: int) -> dict[str, Any]:
    """Seconds of `from_pretrained` by name, and over the original's of the same round."""
    times: dict[str, list[list[float]]] = {name: [] for name in folders}
    for _ in range(rounds):
        for name, (folder, kernel) in folders.items():
            command = [sys.executable, "-c", LOAD, str(folder), kernel]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            times[name].append([float(one) for one in out.split()])
    figures = {}
    for name, taken in times.items():
        ratios = [one[1] / base[1] for one, base in zip(taken, times["original"], strict=True)]
        figures[name] = {
            "seconds": round(statistics.median(one[0] for one in taken), 3),
            "processor_seconds": round(statistics.median(one[1] for one in taken), 3),
            "processor_seconds_over_original": round(statistics.median(ratios), 2),
        }
    return figures | {"rounds": rounds}


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", type=Path, required=True)
    parser.add_argument("--compressed", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="where the folders of both versions are written")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model = hf.AutoModelForSequenceClassification.from_pretrained(options.compressed)
    coded = {name: one for name, one in compressed_layers(model).items() if isinstance(one, CodedModule)}
    matrices = {name: matrix.decode(one.coded.numpy(), one.matrix_shape) for name, one in coded.items()}
    report: dict[str, Any] = {"decoding": decoding_figures(list(matrices.values()), options.rounds)}
    print(json.dumps(report, indent=2), flush=True)
    folders = {"original": (options.original, "")}
    for version in (1, 2):
        write_as(version, options.compressed, options.work / f"version-{version}", matrices)
    folders |= {
        "version_1_constriction": (options.work / "version-1", ""),
        "version_2_numpy": (options.work / "version-2", "numpy"),
        "version_2_numba": (options.work / "version-2", "numba"),
    }
    report["loading"] = loading_figures(folders, options.rounds)
    print(json.dumps(report["loading"], indent=2), flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
