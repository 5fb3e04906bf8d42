"""CPU seconds of what everybody runs: `import hf_lossless` after torch and transformers, `--help`, `--version`.

    python recipes/benchmarks/imports.py --out recipes/benchmarks/imports.json

Each is a process of its own, run in turn with what it is compared with, so that noise meets both; medians are written.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path

LOADED = "import torch, transformers, transformers.modeling_utils"
PAIRS = {
    "import hf_lossless": (["-c", LOADED], ["-c", f"{LOADED}; import hf_lossless"]),
    "hf-lossless --help": (["-c", "import typer"], ["-m", "hf_lossless", "--help"]),
    "hf-lossless --version": (["-c", "import typer"], ["-m", "hf_lossless", "--version"]),
}
"""What is measured: without it, and with it."""


def cpu_seconds(arguments: list[str]) -> float:
    """User and system time of a Python process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    report = {}
    for name, (without, with_it) in PAIRS.items():
        times = [(cpu_seconds(without), cpu_seconds(with_it)) for _ in range(options.runs + 1)][1:]
        report[name] = {
            "without_seconds": round(statistics.median(one for one, _ in times), 3),
            "added_seconds": round(statistics.median(after - before for before, after in times), 3),
            "runs": options.runs,
        }
        print(name, report[name], flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
