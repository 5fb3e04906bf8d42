"""Who only loads a compressed model, or asks the command line what it can do, waits for nothing else.

By the modules that are loaded, and not by the clock: `recipes/benchmarks/imports.py` measures the times.
"""

import pytest
from new_process import run_python

NOT_FOR_LOADING = {"matplotlib", "sklearn", "evaluate", "pandas", "datasets", "scipy", "jinja2"}
PLUG_IN = ["LosslessHfQuantizer", "LosslessCheckpointConfig"]
PRINT_PLUG_IN = """
from transformers.quantizers import auto
for mapping in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
    print(mapping["lossless"].__name__)
"""


def printed_by(code: str) -> list[str]:
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def modules_of(code: str, after: str = "") -> set[str]:
    """The lines that code prints, and the packages that a fresh interpreter loads for it beside those before."""
    return set(
        printed_by(rf"""
import sys
{after}
before = set(sys.modules)
{code}
print(*(name.split(".")[0] for name in set(sys.modules) - before), sep="\n")
""")
    )


def test_importing_the_package_loads_what_loading_needs_and_registers_the_plug_in() -> None:
    found = modules_of(f"import hf_lossless\n{PRINT_PLUG_IN}", after="import transformers.modeling_utils")
    assert found >= {"hf_lossless", *PLUG_IN} and not found & NOT_FOR_LOADING


def test_the_plug_in_is_registered_when_transformers_comes_later() -> None:
    assert printed_by(f"import hf_lossless, transformers.modeling_utils\n{PRINT_PLUG_IN}") == PLUG_IN


def test_the_package_alone_loads_no_torch() -> None:
    found = modules_of("import hf_lossless")
    assert "hf_lossless" in found and not found & {"torch", "transformers", "numpy"}


@pytest.mark.parametrize("option", ["--help", "--version", "compress --help", "export --help"])
def test_help_and_version_load_no_torch(option: str) -> None:
    words = ["hf-lossless", *option.split()]
    found = modules_of(f"sys.argv = {words}; from hf_lossless.cli.main import app; app(standalone_mode=False)")
    assert "typer" in found and not found & {"torch", "transformers", "numpy", "accelerate", *NOT_FOR_LOADING}
