"""Each task from a saved model to a compressed, judged and reloaded one, by the command line and in Python."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers as hf
from tiny_checkpoints import pair_tokenizer
from tiny_models import VOCABULARY

from hf_lossless import LosslessCompressionConfig
from hf_lossless.certification.certificate import Certificate
from hf_lossless.checkpoints.saved_folder import SavedFolder

Row = dict[str, Any]
SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "num_hidden_layers": 1, "pad_token_id": 1}
BERT = hf.BertConfig(**SIZES, hidden_size=64, num_attention_heads=2, intermediate_size=96, max_position_embeddings=40)
GPT2 = hf.GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=1, n_head=2, n_positions=32, eos_token_id=3)


def words(generator: random.Random, most: int) -> list[str]:
    return [f"w{generator.randrange(5, VOCABULARY)}" for _ in range(generator.randrange(2, most))]


def question(generator: random.Random) -> Row:
    context = words(generator, 60)
    place = generator.randrange(len(context))
    start = len(" ".join([*context[:place], ""])) if place else 0
    found = [] if generator.random() < 0.2 else [context[place]]
    return {
        "question": " ".join(words(generator, 4)),
        "context": " ".join(context),
        "answers": {"text": found, "answer_start": [start] * len(found)},
    }


def ending(generator: random.Random) -> Row:
    return {
        "sent1": " ".join(words(generator, 8)),
        "sent2": "w5",
        **{f"ending{index}": " ".join(words(generator, 5)) for index in range(4)},
        "label": generator.randrange(4),
    }


def text(generator: random.Random) -> Row:
    return {"text": " ".join(words(generator, 70))}


@dataclass(frozen=True)
class Case:
    """A model, its data, and what is told of it."""

    auto_class: Any
    model_class: Any
    config: hf.PreTrainedConfig
    make: Callable[[random.Random], Row]
    metrics: tuple[str, ...]
    divergence: bool = True

    def rows(self, count: int, seed: int = 0) -> list[Row]:
        generator = random.Random(seed)
        return [self.make(generator) for _ in range(count)]


CASES = {
    "question-answering": Case(
        hf.AutoModelForQuestionAnswering, hf.BertForQuestionAnswering, BERT, question, ("f1", "exact_match")
    ),
    "multiple-choice": Case(hf.AutoModelForMultipleChoice, hf.BertForMultipleChoice, BERT, ending, ("accuracy",)),
    "text-generation": Case(
        hf.AutoModelForCausalLM, hf.GPT2LMHeadModel, GPT2, text, ("token_accuracy", "perplexity"), False
    ),
    "fill-mask": Case(hf.AutoModelForMaskedLM, hf.BertForMaskedLM, BERT, text, ("token_accuracy", "perplexity"), False),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def folder(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tasks")
    torch.manual_seed(0)
    case.model_class(case.config).save_pretrained(path / "model")
    pair_tokenizer().save_pretrained(path / "model")
    datasets.Dataset.from_list(case.rows(24)).to_json(path / "rows.jsonl")
    datasets.Dataset.from_list(case.rows(510, seed=1)).to_json(path / "held-out.jsonl")
    return path


def test_by_the_command_line(case: Case, folder: Path, tmp_path: Path, output_of: Callable[..., str]) -> None:
    model, rows, held_out, out = (
        folder / "model",
        folder / "rows.jsonl",
        folder / "held-out.jsonl",
        tmp_path / "small",
    )
    output_of("compress", model, "--data", rows, "--ratio", 2, "--bits", "8", "--out", out)
    beside = json.loads(output_of("evaluate", out, "--data", held_out, "--against", model, "--json"))
    for one in (beside, beside["original"]):
        assert [name for name in one if name in (*case.metrics, "accuracy")] == list(case.metrics)
    assert beside["ratio"] >= 2 and beside["num_examples"] == 510
    assert abs(beside["loss_change"]) < 0.01 * beside["original"]["loss"]
    assert (beside["mean_kl"] is not None) == case.divergence
    said = output_of("evaluate", out, "--data", held_out, "--against", model)
    assert all(name in said for name in case.metrics)
    certified = output_of(
        *("certify", out, "--against", model, "--data", held_out, "--json"),
        *("--tolerance", 0.05, "--metric-margin", 0.1),
    )
    certificate = Certificate.from_dict(json.loads(certified))
    assert certificate.passed and certificate.evidence.metric_name == case.metrics[0]
    assert certificate.evidence.num_rows == 510
    assert certificate.evidence.compressed_metric.value == pytest.approx(beside[case.metrics[0]], abs=1e-6)


def test_in_python(case: Case, folder: Path, tmp_path: Path) -> None:
    config = LosslessCompressionConfig(case.rows(24), ratio=3, bits=(4, 8))
    model = case.auto_class.from_pretrained(folder / "model", quantization_config=config)
    assert type(model) is case.model_class
    model.save_pretrained(tmp_path / "small")
    again = case.auto_class.from_pretrained(tmp_path / "small")
    ids = torch.tensor([[2, 7, 8, 9, 3]])
    inputs = {"input_ids": ids.expand(1, 4, 5) if case.metrics == ("accuracy",) else ids}
    with torch.no_grad():
        one, two = (each(**inputs).to_tuple() for each in (model, again))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True) if isinstance(a, torch.Tensor))
    assert (
        SavedFolder.read(tmp_path / "small").entry.plan.original_bytes
        / SavedFolder.read(tmp_path / "small").entry.size_bytes
        >= 3
    )


def test_without_a_target_there_is_a_verdict(case: Case, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_lossless.certified_search.SEARCH_STEPS", 1)
    config = LosslessCompressionConfig(
        case.rows(40), certification_dataset=case.rows(510, seed=1), tolerance=0.05, metric_margin=0.1, bits=(8, 16)
    )
    model = case.auto_class.from_pretrained(folder / "model", quantization_config=config)
    certificate = model.config.quantization_config.certificate
    assert certificate.passed, certificate.verdict
    assert certificate.evidence.num_rows == 510
    assert certificate.evidence.flips >= certificate.evidence.right_to_wrong
