"""Runs a function of a test module in two processes at once, as torchrun or `accelerate launch` would.

They meet by way of a file and talk over the loopback interface. Run by itself, this file is one of the two.
"""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ENVIRONMENT = {
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
    "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
}


def in_two_processes(function: Callable[..., Any], folder: Path, *arguments: str) -> list[Any]:
    """What `function(*arguments)` returns in each of two processes, as JSON has it.

    Args:
        function: Of a test module, at its top level.
        folder: Empty; for what the processes leave one another and this one.
        arguments: Strings, as they go by the command line.
    """
    shared = os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, function.__module__, function.__name__, str(folder), *arguments]
    programs = [
        subprocess.Popen(
            command,
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [program.communicate(timeout=240)[0] for program in programs]
    finally:
        for program in programs:
            program.kill()
            program.wait()
    assert [program.returncode for program in programs] == [0, 0], "\n".join(said)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def _main(module: str, function: str, folder: str, *arguments: str) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = getattr(importlib.import_module(module), function)(*arguments)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _main(*sys.argv[1:])
