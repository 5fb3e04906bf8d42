"""Runs Python in a process of its own, with nothing in it but what it imports."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


def run_python(
    code: str, *arguments: object, environment: Mapping[str, str] = {}, folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """What became of `python -c code argument ...` in `folder`, on one thread."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
