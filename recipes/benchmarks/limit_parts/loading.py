"""Time and memory of loading a saved checkpoint, in processes of their own that take turns."""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# The peak is that of /proc: the one of getrusage begins with the parent's.
_PROGRAM = """
import json, re, sys, time
from pathlib import Path
import torch, transformers, hf_lossless
torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
auto = getattr(transformers, sys.argv[2])
before, start = peak(), time.perf_counter()
model = auto.from_pretrained(sys.argv[1])
loaded, peak_loaded = time.perf_counter() - start, peak()
text = "input_ids" if "Sequence" in sys.argv[2] else "pixel_values"
side = model.config.image_size if hasattr(model.config, "image_size") else 28
inputs = torch.ones(1, 16, dtype=torch.long) if text == "input_ids" else torch.zeros(1, 3, side, side)
with torch.no_grad():
    model(**{text: inputs})
print(json.dumps({"load": loaded, "first_forward": time.perf_counter() - start,
                  "peak_growth_mib": peak_loaded - before, "peak_growth_forward_mib": peak() - before}))
"""


def loading(folders: dict[str, Path], auto_class: str, turns: int = 3) -> dict[str, Any]:
    """Medians over some turns, and the ratio of the last folder to the first.

    Args:
        folders: By name.
        auto_class: That loads them.
        turns: Of each.

    Returns:
        By name: "load", from_pretrained alone; "first_forward", with one row after it; "process", from start to end,
        imports included, all in seconds; growth of the peak memory during both, in MiB.
    """
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in folders}
    for _ in range(turns):
        for name, folder in folders.items():
            start = time.perf_counter()
            output = subprocess.run(
                [sys.executable, "-c", _PROGRAM, str(folder), auto_class], stdout=subprocess.PIPE, text=True, check=True
            ).stdout
            seconds = time.perf_counter() - start
            runs[name].append({**json.loads(output.splitlines()[-1]), "process": seconds})
    medians = {
        name: {key: statistics.median(run[key] for run in of_name) for key in of_name[0]}
        for name, of_name in runs.items()
    }
    first, *_, last = medians.values()
    return {**medians, "last_over_first": {key: last[key] / first[key] for key in first if first[key]}}
