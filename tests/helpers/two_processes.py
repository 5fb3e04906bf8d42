"""Runs a function of a test module in two processes at once, as torchrun or `accelerate launch` would.

They meet by way of a file and talk over the loopback interface. Both are forked from a server that has imported what
takes time; it has run nothing, so that nothing else is in them.
"""

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import start_processes

SECONDS = 240


def in_two_processes(function: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """What `function(*arguments)` returns in each of two processes, as JSON has it.

    Args:
        function: Of a test module, at its top level.
        folder: Empty; for what the processes leave one another and this one.
        arguments: Of the function.
    """
    multiprocessing.set_forkserver_preload(["hf_lossless.compression", "transformers.modeling_utils"])
    processes = start_processes(
        _run, (folder, function, arguments), nprocs=2, join=False, daemon=True, start_method="forkserver"
    )
    try:
        until = time.monotonic() + SECONDS
        while not processes.join(timeout=1):
            assert time.monotonic() < until, f"two processes are not done after {SECONDS} seconds"
    finally:
        for process in processes.processes:
            process.kill()
            process.join()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def _run(rank: int, folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
    }
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    (folder / f"{rank}.json").write_text(json.dumps(function(*arguments)))
    torch.distributed.destroy_process_group()
