"""Finds, loads and judges the models that the command line names, with errors that give a remedy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from hf_lossless.certification.evaluation import Answers, answers
from hf_lossless.checkpoints.entry import LosslessCheckpointConfig
from hf_lossless.data.tasks.base import Task
from hf_lossless.data.tasks.registry import task_named, task_of_class
from hf_lossless.errors import CheckpointError, ConfigurationError, LosslessError, reason
from hf_lossless.storage.layers import tensor_bytes
from hf_lossless.storage.runtime.optimize import optimize, runtime_of
from hf_lossless.storage.runtime.runtimes import Runtime, checked_runtime


def task_of_model(model: str, name: str | None) -> Task:
    """Finds the task called `name`, or that of the model, whose class must have a head for it."""
    architecture = next(iter(config_of(model).architectures or ()), None)
    if name is None and architecture is None:
        raise ConfigurationError(f"the config.json of {model} names no architecture. Name the task with --task.")
    task = task_named(name) if name is not None else task_of_class(str(architecture))
    if architecture is not None and not any(head in architecture for head in task.heads):
        raise ConfigurationError(
            f"{model} is a {architecture}, which does not do the task {task.name}: a new head would be random. "
            f"Take a checkpoint of a class {' or '.join(f'...{head}' for head in task.heads)}."
        )
    return task


def refuse_quantised(model: str) -> None:
    """Raises an error for a quantised model before its weights are read."""
    method = getattr(config_of(model), "quantization_config", None)
    if method is not None:
        name = method.get("quant_method") if isinstance(method, dict) else method.quant_method
        raise ConfigurationError(f"{model} is quantised already ({name}). Compress the original checkpoint instead.")


def config_of(model: str) -> PreTrainedConfig:
    """Reads a model's config.json."""
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(model)
        return config
    except LosslessError:
        raise
    except (OSError, ValueError) as error:
        what = "the folder" if Path(model).is_dir() else "no folder here, and on the Hub"
        raise CheckpointError(
            f"the config.json of {model} ({what}) cannot be read: {reason(error)}. "
            "Give a folder written by save_pretrained, or a Hub id."
        ) from error


def load_model(task: Task, model: str, **kwargs: Any) -> PreTrainedModel:
    """Loads a model with the head of its task; `kwargs` are those of from_pretrained."""
    try:
        return task.load_model(model, **kwargs)
    except SafetensorError as error:
        raise CheckpointError(
            f"the weights of {model} cannot be read: {reason(error)}. Take the folder again from where it came from."
        ) from error


@dataclass(frozen=True)
class Judged:
    """A model's answers, the theory behind its plan ("none": not compressed), its bytes now and originally."""

    answers: Answers
    theory: str
    size_bytes: int
    original_bytes: int
    runtime: Runtime = "exact"


def judge(model: str, rows: datasets.Dataset, task: Task, runtime: str | None = None) -> Judged:
    """Loads a model and runs it over labelled rows; one forward pass. A run time is for compressed models."""
    loaded = load_model(task, model)
    if runtime is not None and runtime_of(loaded) is not None:
        optimize(loaded, checked_runtime(runtime, "--runtime"))
    found = answers(loaded, rows, task, task.load_processor(model), f"evaluating {model}")
    config = getattr(loaded.config, "quantization_config", None)
    if isinstance(config, LosslessCheckpointConfig):
        return Judged(
            found, config.plan.theory, config.size_bytes, config.plan.original_bytes, runtime_of(loaded) or "exact"
        )
    size_bytes = tensor_bytes(loaded)
    return Judged(found, "none", size_bytes, size_bytes)
