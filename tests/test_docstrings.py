"""Docstrings of public functions and methods begin with a verb ("Computes", "Returns", ...)."""

import inspect
import pkgutil
import re
from collections.abc import Iterator
from importlib import import_module

import pytest

import hf_lossless

COMMANDS = ("judging", "making", "publish")  # typer prints their docstrings as help, in the imperative
EXEMPT = (
    "hf_lossless.__main__",
    *(f"hf_lossless.cli.{name}" for name in COMMANDS),
)
NO_VERBS = (
    *("Always", "Answers", "As", "Batches", "Biases", "Bytes", "Candidates", "Classes", "Codes", "Columns", "Examples"),
    *("Factors", "Gradients", "Has", "Is", "Its", "Labels", "Layers", "Less", "Losses", "Means", "Names", "Options"),
    *("Others", "Pairs", "Plans", "Predictions", "Ranks", "Roots", "Rows", "Scores", "Shares", "Statistics", "Steps"),
    *("Tensors", "Texts", "This", "Those", "Tokens", "Values", "Was", "Weights", "Widths", "Words"),
)
MODULES = [
    module.name
    for module in pkgutil.walk_packages(hf_lossless.__path__, "hf_lossless.")
    if not module.name.startswith(EXEMPT)
]


def first_words(module_name: str) -> Iterator[tuple[str, str]]:
    """First words of the docstrings of public functions and methods (not of properties), by name."""
    for name, value in vars(import_module(module_name)).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module_name:
            continue
        members = vars(value) if inspect.isclass(value) else {"": value}
        for member, function in members.items():
            function = getattr(function, "__func__", function)  # of a class method
            if not member.startswith("_") and inspect.isfunction(function) and function.__name__ != "<lambda>":
                yield f"{name}.{member}", (function.__doc__ or "nothing").split()[0]


@pytest.mark.parametrize("module", MODULES)
def test_docstrings_begin_with_a_verb(module: str) -> None:
    if module == "hf_lossless.checkpoints.adapters":
        pytest.importorskip("peft")  # whose import imports the module
    wrong = [
        f"{name}: {word}"
        for name, word in first_words(module)
        if not re.fullmatch("[A-Z][a-z]+s", word) or word in NO_VERBS
    ]
    assert not wrong


def test_functions_are_found() -> None:
    found = dict(first_words("hf_lossless.candidates.low_rank"))
    assert found["factorise."] == "Computes" and found["Whitening.of"] == "Computes"
