"""Which task a model does, or a user names."""

from transformers import PreTrainedModel

from hf_lossless.data.tasks.base import Task
from hf_lossless.data.tasks.image_classification import ImageClassification
from hf_lossless.data.tasks.language_modelling import CausalLanguageModelling, MaskedLanguageModelling
from hf_lossless.data.tasks.multiple_choice import MultipleChoice
from hf_lossless.data.tasks.question_answering import QuestionAnswering
from hf_lossless.data.tasks.text_classification import TextClassification
from hf_lossless.errors import ConfigurationError

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        TextClassification(),
        ImageClassification(),
        QuestionAnswering(),
        MultipleChoice(),
        CausalLanguageModelling(),
        MaskedLanguageModelling(),
    )
}


def task_named(name: str) -> Task:
    """The task of a name.

    Raises:
        ConfigurationError: There is none.
    """
    if name not in TASKS:
        raise ConfigurationError(f"task={name!r} is unknown. Choose one of {', '.join(TASKS)}.")
    return TASKS[name]


def task_of_class(class_name: str) -> Task:
    """The task of a model class, by its name.

    Raises:
        ConfigurationError: It does none of the known tasks.
    """
    for task in TASKS.values():
        # A few have more after it: DeiTForImageClassificationWithTeacher.
        if any(head in class_name for head in task.heads):
            return task
    raise ConfigurationError(
        f"{class_name} does none of the tasks whose data can be prepared here ({', '.join(TASKS)}). "
        "Take a model with the head of one of them; in Python, ready batches (tensors under the names of the model's "
        "arguments) do for any model as dataset, and task= names a task."
    )


def task_of(model: PreTrainedModel, name: str | None = None) -> Task:
    """The task named, or else that of the model's class."""
    return task_named(name) if name is not None else task_of_class(type(model).__name__)
