"""Who only loads a compressed model, or asks the command line what it can do, waits for nothing else.

By the modules that are loaded, and not by the clock: `recipes/benchmarks/imports.py` measures the times.
"""

import subprocess
import sys

import pytest

NOT_FOR_LOADING = {"matplotlib", "sklearn", "evaluate", "pandas", "datasets", "scipy", "jinja2"}
LOAD = "import transformers.modeling_utils; before = set(sys.modules); import hf_lossless"


def modules_of(code: str) -> set[str]:
    """Names of the top-level packages that a fresh interpreter has loaded after `before`."""
    script = (
        f"import sys; before = set(); {code}; print('\\n'.join({{m.split('.')[0] for m in set(sys.modules) - before}}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split("\n"))


def test_importing_the_package_loads_what_loading_needs() -> None:
    found = modules_of(LOAD)
    assert "hf_lossless" in found and not found & NOT_FOR_LOADING


def test_the_package_alone_loads_no_torch() -> None:
    assert not modules_of("import hf_lossless") & {"torch", "transformers", "numpy"}


@pytest.mark.parametrize("first", ["hf_lossless", "transformers.modeling_utils"])
def test_the_plug_in_is_registered_whichever_comes_first(first: str) -> None:
    second = {"hf_lossless": "transformers.modeling_utils", "transformers.modeling_utils": "hf_lossless"}[first]
    code = (
        f"import {first}, {second}; from transformers.quantizers import auto; "
        "print(auto.AUTO_QUANTIZER_MAPPING['lossless'].__name__, "
        "auto.AUTO_QUANTIZATION_CONFIG_MAPPING['lossless'].__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["LosslessHfQuantizer", "LosslessCheckpointConfig"]


@pytest.mark.parametrize("option", ["--help", "--version", "compress --help", "export --help"])
def test_help_and_version_load_no_torch(option: str) -> None:
    words = ["hf-lossless", *option.split()]
    code = f"sys.argv = {words}; from hf_lossless.cli.main import app; app(standalone_mode=False)"
    assert not modules_of(code) & {"torch", "transformers", "numpy", "accelerate", *NOT_FOR_LOADING}
