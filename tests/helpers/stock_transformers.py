"""What transformers makes of compressed folders where nobody imported hf_lossless."""

import json
from collections.abc import Mapping
from pathlib import Path

from new_process import run_python

_CODE = """
import json, sys, transformers
said = {}
for folder, name in json.loads(sys.argv[1]).items():
    try:
        getattr(transformers, name).from_pretrained(folder)
    except RuntimeError as error:
        said[folder] = str(error)
assert "hf_lossless" not in sys.modules
print(json.dumps(said))
"""


def refusals(class_of: Mapping[Path, str]) -> list[str]:
    """The RuntimeError with which each folder is refused by the class of this name, all in one process."""
    done = run_python(_CODE, json.dumps({str(folder): name for folder, name in class_of.items()}))
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    return [said[str(folder)] for folder in class_of]
