"""Batches without labels: what a regression or a model of several labels predicts cannot stand in for them."""

import pytest
import torch
import transformers as hf
from tiny_models import TINY_MODELS

from hf_lossless import ConfigurationError, DataError
from hf_lossless.data.rows import with_own_targets
from hf_lossless.data.tasks.registry import task_of_class

LABELS = {
    "regression": {"num_labels": 1},
    "regression by name": {"num_labels": 3, "problem_type": "regression"},
    "several labels": {"num_labels": 3, "problem_type": "multi_label_classification"},
}


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("name", ["bert", "vit"])
def test_refused(name: str, labels: dict):
    tiny = TINY_MODELS[name]
    config = type(tiny.config).from_dict(
        {**tiny.config.to_dict(), "id2label": None, "label2id": None, "problem_type": None, **labels}
    )
    model = tiny.model_class(config).eval()
    with pytest.raises(DataError, match=r'has no gradient\. Add "labels" to every batch'):
        with_own_targets(model, [tiny.inputs()])
    labelled = {**tiny.inputs(), "labels": torch.zeros(3, labels["num_labels"])}
    assert with_own_targets(model, [labelled]) == [labelled]


def test_one_label_of_several_is_predicted():
    tiny = TINY_MODELS["bert"]
    model = tiny.build()
    assert torch.equal(with_own_targets(model, [tiny.inputs()])[0]["labels"], model(**tiny.inputs()).logits.argmax(-1))


@pytest.mark.parametrize("name", ["Wav2Vec2ForSequenceClassification", "HubertForSequenceClassification"])
def test_models_that_hear_are_not_taken_for_text(name: str):
    assert hasattr(hf, name)
    with pytest.raises(ConfigurationError, match=f"{name} does none of the tasks"):
        task_of_class(name)


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("BertForSequenceClassification", "text-classification"),
        ("DeiTForImageClassificationWithTeacher", "image-classification"),
        ("GPT2LMHeadModel", "text-generation"),
        ("MyRemoteForSequenceClassification", "text-classification"),
        ("LlamaForCausalLM", "text-generation"),
        ("BertForMaskedLM", "fill-mask"),
        ("BertForMultipleChoice", "multiple-choice"),
        ("DistilBertForQuestionAnswering", "question-answering"),
        ("NomicBertForSequenceClassification", "text-classification"),
    ],
)
def test_tasks_of_classes(name: str, task: str):
    assert task_of_class(name).name == task
