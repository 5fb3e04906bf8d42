"""Blocks, masks, and losses that are the model's own."""

import math
from typing import Any

import pytest
import torch
from tiny_checkpoints import pair_tokenizer, tokenizer
from tiny_models import TINY_MODELS, VOCABULARY
from transformers import PreTrainedModel

from hf_lossless import ConfigurationError, DataError
from hf_lossless.certification.comparison import compare
from hf_lossless.certification.evaluation import answers, evaluate, load_rows
from hf_lossless.data.rows import with_own_targets
from hf_lossless.data.tasks.language_modelling import LONGEST, LanguageModelling, blocks_of_tokens
from hf_lossless.data.tasks.registry import TASKS, task_of, task_of_class

CAUSAL, MASKED = TASKS["text-generation"], TASKS["fill-mask"]
WORDS, PAIRS = tokenizer(), pair_tokenizer()


@pytest.fixture(scope="module")
def gpt2() -> PreTrainedModel:
    return TINY_MODELS["gpt2"].build()  # 32 positions


@pytest.fixture(scope="module")
def bert() -> PreTrainedModel:
    return TINY_MODELS["bert-mlm"].build()  # 16 positions


def text(first: int, count: int) -> str:
    return " ".join(f"w{5 + (first + index) % (VOCABULARY - 5)}" for index in range(count))


TEXTS = [{"text": text(index, 2 + index * 7 % 60)} for index in range(20)]


# Causal


def test_blocks_overlap_by_one_token() -> None:
    blocks = CAUSAL.blocks({"text": text(0, 70)}, WORDS, 32)
    assert [len(block.tokens) for block in blocks] == [32, 32, 8]
    assert blocks[0].tokens[-1] == blocks[1].tokens[0]
    assert sum(len(block.tokens) - 1 for block in blocks) == 69
    for count, expected in ((2, [2]), (32, [32]), (33, [32, 2]), (63, [32, 32])):
        assert [len(block.tokens) for block in CAUSAL.blocks({"text": text(0, count)}, WORDS, 32)] == expected


def test_each_token_but_the_first_is_predicted_once(gpt2: PreTrainedModel) -> None:
    found = CAUSAL.answer(TEXTS, WORDS, gpt2)
    for row, tokens, predictions in zip(TEXTS, found.references, found.predictions, strict=True):
        assert tokens == WORDS(row["text"])["input_ids"][1:]
        assert len(predictions) == len(tokens)


def test_the_loss_of_a_row_is_the_models(gpt2: PreTrainedModel) -> None:
    """One row alone has no padding; in one batch all have."""
    found = CAUSAL.answer(TEXTS, WORDS, gpt2)
    for row, loss, score in zip(TEXTS, found.losses, found.scores, strict=True):
        total, right, count = 0.0, 0, 0
        for block in CAUSAL.blocks(row, WORDS, 32):
            ids = torch.tensor([block.tokens])
            with torch.no_grad():
                output = gpt2(ids, labels=ids)
            total += output.loss.item() * (len(block.tokens) - 1)
            right += int((output.logits[0, :-1].argmax(-1) == ids[0, 1:]).sum())
            count += len(block.tokens) - 1
        assert loss.item() == pytest.approx(total / count, abs=1e-5)
        assert score.item() == pytest.approx(right / count)


def test_the_loss_of_a_batch_is_the_mean_over_its_tokens(gpt2: PreTrainedModel) -> None:
    found = CAUSAL.answer(TEXTS, WORDS, gpt2)
    counts = [len(tokens) for tokens in found.references]
    expected = sum(loss.item() * count for loss, count in zip(found.losses, counts, strict=True)) / sum(counts)
    [batch] = CAUSAL.batches(TEXTS, WORDS, gpt2)
    assert batch["labels"].eq(-100).any()
    with torch.no_grad():
        assert gpt2(**batch).loss.item() == pytest.approx(expected, abs=1e-5)
    assert CAUSAL.metrics(found)["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)


def test_perplexity_is_the_exponential_of_the_loss_where_rows_are_of_one_length(gpt2: PreTrainedModel) -> None:
    rows = blocks_of_tokens([row["text"] for row in TEXTS] + ["", "w5"], WORDS, 16)
    assert {len(row["input_ids"]) for row in rows} == {16}
    total = sum(len(row["text"].split()) for row in TEXTS) + 1
    assert len(rows) == total // 16
    joined = " ".join(row["text"] for row in TEXTS)
    assert [token for row in rows for token in row["input_ids"]] == WORDS(joined)["input_ids"][: len(rows) * 16]
    found = evaluate(gpt2, rows, CAUSAL, WORDS)
    assert found.metric_name == "token_accuracy" and 0 <= found.metric <= 1
    assert found.other_metrics["perplexity"] == pytest.approx(math.exp(found.loss), rel=1e-5)
    uneven = evaluate(gpt2, TEXTS, CAUSAL, WORDS)
    assert uneven.other_metrics["perplexity"] != pytest.approx(math.exp(uneven.loss), rel=1e-5)


def test_few_tokens_are_run_at_once(gpt2: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = CAUSAL.answer(TEXTS, WORDS, gpt2)
    monkeypatch.setattr("hf_lossless.data.tasks.language_modelling._TOKENS_AT_ONCE", 70)
    batches = list(CAUSAL.batches(TEXTS, WORDS, gpt2))
    assert len(batches) > 5 and all(batch["input_ids"].numel() <= 70 for batch in batches)
    parts = CAUSAL.answer(TEXTS, WORDS, gpt2)
    torch.testing.assert_close(parts.losses, whole.losses)
    assert parts.predictions == whole.predictions


def test_blocks_have_a_limit_where_the_model_has_none(gpt2: PreTrainedModel) -> None:
    class Seen(Exception):
        pass

    class Limitless(type(CAUSAL)):
        def blocks(self, row: Any, tokenizer: Any, longest: int) -> Any:
            raise Seen(longest)

    model = TINY_MODELS["t5"].build()  # counts positions relatively
    with pytest.raises(Seen, match=str(LONGEST)):
        Limitless().answer(TEXTS, WORDS, model)


def test_comparison_has_flips_and_no_divergence(gpt2: PreTrainedModel) -> None:
    other = TINY_MODELS["gpt2"].build(seed=1)
    rows = load_rows(TEXTS)
    one, two = (answers(model, rows, CAUSAL, WORDS).outputs for model in (gpt2, other))
    assert (compare(one, one).flips, compare(one, one).mean_kl) == (0, None)
    assert compare(one, two).flips > 0


# Masked


def test_a_share_of_the_tokens_is_hidden() -> None:
    row = {"text": text(0, 38)}
    blocks = MASKED.blocks(row, PAIRS, 16)
    assert [len(block.tokens) for block in blocks] == [16, 16, 12]
    for block in blocks:
        hidden = [place for place, label in enumerate(block.labels) if label != -100]
        assert len(hidden) == round(0.15 * (len(block.tokens) - 2))
        assert [place for place, token in enumerate(block.tokens) if token == PAIRS.mask_token_id] == hidden
        assert block.tokens[0] == PAIRS.cls_token_id and block.tokens[-1] == PAIRS.sep_token_id
    restored = [
        token if label == -100 else label
        for block in blocks
        for token, label in list(zip(block.tokens, block.labels, strict=True))[1:-1]
    ]
    assert restored == ids_of(row)


def ids_of(row: dict[str, str]) -> list[int]:
    return PAIRS(row["text"], add_special_tokens=False)["input_ids"]


def test_which_tokens_are_hidden_depends_on_the_text_alone() -> None:
    rows = [{"text": text(index, 13)} for index in range(12)]
    first = [MASKED.blocks(row, PAIRS, 16) for row in rows]
    assert [MASKED.blocks(row, PAIRS, 16) for row in reversed(rows)] == first[::-1]
    assert len({tuple(label != -100 for label in block.labels) for [block] in first}) > 3
    assert MASKED.blocks({"text": "w9"}, PAIRS, 16)[0].tokens == [2, PAIRS.mask_token_id, 3]  # one at least


def test_the_masked_loss_is_the_models(bert: PreTrainedModel) -> None:
    found = MASKED.answer(TEXTS, PAIRS, bert)
    for row, loss, tokens in zip(TEXTS, found.losses, found.references, strict=True):
        total = 0.0
        for block in MASKED.blocks(row, PAIRS, 16):
            with torch.no_grad():
                output = bert(torch.tensor([block.tokens]), labels=torch.tensor([block.labels]))
            total += output.loss.item() * sum(label != -100 for label in block.labels)
        assert loss.item() == pytest.approx(total / len(tokens), abs=1e-5)


def test_tokens_that_are_there_are_taken_as_they_are(bert: PreTrainedModel) -> None:
    ids = [2, *range(10, 40), 3]
    blocks = MASKED.blocks({"input_ids": ids}, PAIRS, 16)
    assert [len(block.tokens) for block in blocks] == [16, 16]
    assert all(block.labels[place] == -100 for block, place in zip(blocks, (0, -1), strict=True))
    assert [block.tokens for block in CAUSAL.blocks({"input_ids": ids}, PAIRS, 64)] == [ids]


# Which task, and bad input


def test_the_task_of_a_class(gpt2: PreTrainedModel, bert: PreTrainedModel) -> None:
    assert task_of(gpt2) is task_of_class("LlamaForCausalLM") is task_of_class("BertLMHeadModel") is CAUSAL
    assert task_of(bert) is task_of_class("RobertaForMaskedLM") is MASKED


@pytest.mark.parametrize("task", [CAUSAL, MASKED], ids=["causal", "masked"])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": ""}, r"row 7 has no token to predict: its text is empty or too short\. Drop such rows, or join"),
        ({"text": None}, r"column 'text' holds None \(NoneType\) where text is expected, in row 7"),
        ({"input_ids": []}, r"row 7 has no token to predict"),
        ({"input_ids": [5, 96]}, r"'input_ids' holds \[5, 96\] where a list of the tokenizer's 96 token numbers"),
        ({"input_ids": "w5"}, r"'input_ids' holds w5 where a list"),
        ({"question": "w5"}, r"no text column: looked for text, sentence, content, found question"),
    ],
)
def test_bad_rows(task: LanguageModelling, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        task.blocks({**row, "__row__": 7}, PAIRS if task is MASKED else WORDS, 16)


def test_one_token_cannot_be_predicted_from_nothing() -> None:
    with pytest.raises(DataError, match="has no token to predict"):
        CAUSAL.blocks({"text": "w5"}, WORDS, 16)


def test_columns(gpt2: PreTrainedModel) -> None:
    with pytest.raises(DataError, match=r"no text column: looked for input_ids, text, sentence, content, found label"):
        evaluate(gpt2, [{"label": 0}], CAUSAL, WORDS)


def test_a_tokenizer_without_a_mask() -> None:
    with pytest.raises(ConfigurationError, match=r"has no mask token, so nothing can be hidden"):
        MASKED.blocks(TEXTS[0], WORDS, 16)


@pytest.mark.parametrize("name", ["gpt2", "bert-mlm"])
def test_nothing_stands_in_for_the_labels_of_a_language_model(name: str) -> None:
    tiny = TINY_MODELS[name]
    with pytest.raises(DataError, match=r'no "labels" \(found input_ids, attention_mask\), .* Add "labels" to every'):
        with_own_targets(tiny.build(), [tiny.inputs()])
