"""Lists the tasks in `TASKS`, and finds a model's task by its class or by a name.

A task is imported when it is first looked up, so that a command line can name them all at no cost.
"""

from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from hf_lossless.errors import ConfigurationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_lossless.data.tasks.base import Task

_CLASSES = {
    "text-classification": "text_classification.TextClassification",
    "image-classification": "image_classification.ImageClassification",
    "question-answering": "question_answering.QuestionAnswering",
    "multiple-choice": "multiple_choice.MultipleChoice",
    "text-generation": "language_modelling.CausalLanguageModelling",
    "fill-mask": "language_modelling.MaskedLanguageModelling",
}
"""File and class of each task, in the order in which a model's class is compared with them."""


class _Tasks(Mapping[str, "Task"]):
    """A mapping of names to tasks; each task is made at its first lookup."""

    def __getitem__(self, name: str) -> "Task":
        return _task(name)

    def __iter__(self) -> Iterator[str]:
        return iter(_CLASSES)

    def __len__(self) -> int:
        return len(_CLASSES)


TASKS: Mapping[str, "Task"] = _Tasks()


@cache
def _task(name: str) -> "Task":
    module, _, class_name = _CLASSES[name].partition(".")
    task: Task = getattr(import_module(f"{__package__}.{module}"), class_name)()
    return task


def task_named(name: str) -> "Task":
    """Finds a task by its name.

    Raises:
        ConfigurationError: There is none.
    """
    if name not in TASKS:
        raise ConfigurationError(f"task={name!r} is unknown. Choose one of {', '.join(TASKS)}.")
    return TASKS[name]


def task_of_class(class_name: str) -> "Task":
    """Finds the task of a model class, by its name.

    Raises:
        ConfigurationError: The class does none of the known tasks.
    """
    for task in TASKS.values():
        # Some class names go on after the head: DeiTForImageClassificationWithTeacher.
        if any(head in class_name for head in task.heads) and not _of_another_modality(class_name, task):
            return task
    raise ConfigurationError(
        f"{class_name} does none of the tasks whose data can be prepared here ({', '.join(TASKS)}). "
        "Take a model with the head of one of them; in Python, ready batches (tensors under the names of the model's "
        "arguments) do for any model as dataset, and task= names a task."
    )


def _of_another_modality(class_name: str, task: "Task") -> bool:
    """Whether transformers lists a class, but not for this task: a Wav2Vec2ForSequenceClassification hears."""
    from transformers.models.auto import modeling_auto

    def classes(mapping: Mapping[str, str | tuple[str, ...]]) -> set[str]:
        return {name for names in mapping.values() for name in ((names,) if isinstance(names, str) else names)}

    # Named for their heads; the other lists (base models, backbones, pre-training) are of all modalities.
    names = [name for name in dir(modeling_auto) if name.startswith("MODEL_FOR_") and name.endswith("_MAPPING_NAMES")]
    listed = {one for name in names for one in classes(getattr(modeling_auto, name))}
    return class_name in listed and class_name not in classes(task.auto_class._model_mapping._model_mapping)


def task_of(model: "PreTrainedModel", name: str | None = None) -> "Task":
    """Finds the task called `name`, or the task of the model's class where it is None."""
    return task_named(name) if name is not None else task_of_class(type(model).__name__)
