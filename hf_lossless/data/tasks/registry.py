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
        if any(head in class_name for head in task.heads):
            return task
    raise ConfigurationError(
        f"{class_name} does none of the tasks whose data can be prepared here ({', '.join(TASKS)}). "
        "Take a model with the head of one of them; in Python, ready batches (tensors under the names of the model's "
        "arguments) do for any model as dataset, and task= names a task."
    )


def task_of(model: "PreTrainedModel", name: str | None = None) -> "Task":
    """Finds the task called `name`, or the task of the model's class where it is None."""
    return task_named(name) if name is not None else task_of_class(type(model).__name__)
