"""Causal and masked language modelling: the loss of tokens, and one number a row from the blocks of its text.

A row is a text (or its tokens, column "input_ids"). A text longer than the model takes, or than `LONGEST` tokens, is
cut into blocks, which are run separately. Blocks of different lengths share a batch with padding, which is masked and
has no label.

    loss        mean over the row's predicted tokens
    prediction  its most likely tokens
    score       token accuracy: the share of tokens that are the most likely ones. It lies between 0 and 1, as the
                certificate's bound needs, and falls where a text that is generated greedily changes; perplexity has no
                bound
    logits      none: a vocabulary for each token would take gigabytes, so there is no KL divergence

A *flip* is a row of which any predicted token changed: of long rows, most.

**Perplexity** is exp(sum of the losses of all tokens / their number). A certificate's loss is the mean over rows, in
which a short row counts as much as a long one; the exponential of that is the perplexity where all rows have equally
many tokens. So cut a corpus into rows of one length first (`blocks_of_tokens`) where the two are to agree.

**Causal language modelling** predicts every token from the tokens before it, as GPT-2 on WikiText.

Blocks overlap by one token, so that each token of a row but the first is predicted once. The first token of a block has
no context: perplexities are those of disjoint windows, which are above those of sliding windows. Padding follows the
block, where causal attention does not see it.

**Masked language modelling** predicts hidden tokens from the tokens around them, as BERT was trained.

In each block 15 % of the tokens, at least one, are replaced by [MASK] and predicted. They are drawn with a seed that is
a hash of the block's own tokens: the same text has the same tokens hidden in every split, process and run, for the
original as for the compressed model. BERT's training left some of the chosen tokens unchanged or replaced them by
random ones; here all are hidden, as at inference. The perplexity is that of hidden tokens.
"""

import hashlib
import random
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from hf_lossless.data.tasks.base import RowAnswers, Task, run
from hf_lossless.data.tasks.columns import Row, find_column, name_of, text_of
from hf_lossless.data.tasks.metrics import Perplexity, TokenAccuracy
from hf_lossless.data.tasks.tokenization import load_tokenizer, max_length, require_fast
from hf_lossless.errors import ConfigurationError, DataError

LONGEST = 1024
"""Tokens of a block, at most."""

_TOKENS_AT_ONCE = 2048  # with a vocabulary of 50,000, logits of 400 MB
_TEXTS = ("text", "sentence", "content")
_TOKENS = "input_ids"
_NO_LABEL = -100


@dataclass(frozen=True)
class Block:
    """A part of a row that the model sees at once.

    Attributes:
        tokens: The model's input tokens.
        labels: The token to predict at each place; -100 for none.
    """

    tokens: list[int]
    labels: list[int]


class LanguageModelling(Task):
    """The task of predicting a text's own tokens.

    Attributes:
        shift: Places by which a prediction precedes its token: 1 for the next token, 0 for a masked one.
    """

    metric_name = "token_accuracy"
    target_columns = ()
    shift: ClassVar[int]

    @abstractmethod
    def blocks(self, row: Row, tokenizer: Any, longest: int) -> list[Block]:
        """Cuts a row into blocks, each with at least one label.

        Raises:
            DataError: The row has no token to predict.
        """

    def load_processor(self, model: str) -> Any:
        """Loads the model's tokenizer.

        Raises:
            ConfigurationError: The model has no tokenizer.
        """
        return load_tokenizer(model)

    def input_columns(self, names: Sequence[str]) -> tuple[str, ...]:
        """Finds the column of tokens, or else the column of texts."""
        return (find_column(names, (_TOKENS, *_TEXTS), "text"),)

    def length(self, row: Row) -> int:
        """Counts a row's tokens, or the characters of its text."""
        [column] = self.input_columns(list(row))
        return len(row[column] or "")

    def batches(self, rows: Sequence[Row], processor: Any, model: PreTrainedModel) -> Iterable[dict[str, Tensor]]:
        """Yields a few blocks at a time."""
        blocks = [block for row in rows for block in self._blocks(row, processor, model)]
        for part in _in_parts(blocks):
            yield _padded(part)

    def own_targets(self, batch: Mapping[str, Tensor], outputs: Any) -> dict[str, Tensor]:
        """Raises an error: a language model's labels are the tokens themselves."""
        raise DataError(
            f'the batches have no "labels" (found {", ".join(batch)}), and what a language model says cannot stand in '
            'for them. Add "labels" to every batch: the tokens, and -100 where there is none to predict.'
        )

    def answer(self, rows: Sequence[Row], processor: Any, model: PreTrainedModel) -> RowAnswers:
        """Computes the loss and the most likely tokens of each row."""
        pieces = [(index, block) for index, row in enumerate(rows) for block in self._blocks(row, processor, model)]
        losses: list[list[Tensor]] = [[] for _ in rows]
        predictions: list[list[int]] = [[] for _ in rows]
        references: list[list[int]] = [[] for _ in rows]
        done = 0
        for part in _in_parts([block for _, block in pieces]):
            batch = _padded(part)
            labels = batch.pop("labels")[:, self.shift :]
            logits = run(model, batch).logits[:, : labels.shape[1]]
            labelled = labels != _NO_LABEL
            for (index, _), of_block, tokens, where in zip(pieces[done:], logits, labels, labelled, strict=False):
                chosen, wanted = of_block[where.to(of_block.device)].float(), tokens[where]
                losses[index].append(F.cross_entropy(chosen, wanted.to(chosen.device), reduction="none").cpu())
                predictions[index] += chosen.argmax(-1).tolist()
                references[index] += wanted.tolist()
            done += len(part)
        right = [torch.tensor(one) == torch.tensor(other) for one, other in zip(predictions, references, strict=True)]
        return RowAnswers(
            losses=torch.stack([torch.cat(of_row).mean() for of_row in losses]),
            scores=torch.stack([of_row.double().mean() for of_row in right]),
            predictions=predictions,
            references=references,
        )

    def metrics(self, answers: RowAnswers) -> dict[str, float]:
        """Computes the token accuracy, and the perplexity over all tokens."""
        counts = [len(tokens) for tokens in answers.references]
        return TokenAccuracy().of(answers.predictions, answers.references) | Perplexity().of(
            answers.losses.tolist(), counts
        )

    def _blocks(self, row: Row, tokenizer: Any, model: PreTrainedModel) -> list[Block]:
        return self.blocks(row, tokenizer, min(max_length(tokenizer, model) or LONGEST, LONGEST))


def tokens_of(row: Row, tokenizer: Any) -> list[int] | None:
    """Returns the token ids that a row holds; None where it holds a text.

    Raises:
        DataError: The column of tokens holds something else.
    """
    if _TOKENS not in row:
        return None
    tokens = row[_TOKENS]
    if not isinstance(tokens, list) or not all(isinstance(one, int) and 0 <= one < len(tokenizer) for one in tokens):
        raise DataError(
            f"the column {_TOKENS!r} holds {str(tokens)[:60]} where a list of the tokenizer's {len(tokenizer)} token "
            f"numbers is expected, in {name_of(row)}. Make it with the model's own tokenizer."
        )
    return tokens


def text_in(row: Row) -> str:
    """Returns the text of a row."""
    return text_of(row, find_column(list(row), _TEXTS, "text"))


def nothing_to_predict(row: Row) -> DataError:
    """Makes the error for a row that is too short to predict a token."""
    return DataError(
        f"{name_of(row)} has no token to predict: its text is empty or too short. Drop such rows, or join them to "
        "longer ones."
    )


def blocks_of_tokens(texts: Iterable[str], tokenizer: Any, length: int) -> list[dict[str, list[int]]]:
    """Cuts joined texts into rows of `length` tokens each; the remainder is dropped.

    Args:
        texts: Texts of a corpus, in order; some may be empty.
        tokenizer: The model's tokenizer.
        length: Tokens of a row.
    """
    joined = [
        token for text in texts for token in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    ]
    return [{_TOKENS: joined[start : start + length]} for start in range(0, len(joined) - length + 1, length)]


def _in_parts(blocks: Sequence[Block]) -> Iterator[Sequence[Block]]:
    """Groups blocks in order, at most `_TOKENS_AT_ONCE` tokens with their padding at a time, and at least one block."""
    start = 0
    while start < len(blocks):
        end, longest = start, 0
        while end < len(blocks):
            longest = max(longest, len(blocks[end].tokens))
            if end > start and longest * (end - start + 1) > _TOKENS_AT_ONCE:
                break
            end += 1
        yield blocks[start:end]
        start = end


def _padded(blocks: Sequence[Block]) -> dict[str, Tensor]:
    """Pads blocks to the model's arguments; the padding token is arbitrary, since it is masked and has no label."""

    def padded(values: list[list[int]], fill: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(one) for one in values], True, fill)

    tokens = [block.tokens for block in blocks]
    return {
        "input_ids": padded(tokens, 0),
        "attention_mask": padded([[1] * len(one) for one in tokens], 0),
        "labels": padded([block.labels for block in blocks], _NO_LABEL),
    }


class CausalLanguageModelling(LanguageModelling):
    """The task of predicting each next token of a text."""

    name = "text-generation"
    heads = ("ForCausalLM", "LMHeadModel")
    auto_class = AutoModelForCausalLM
    shift = 1

    def blocks(self, row: Row, tokenizer: Any, longest: int) -> list[Block]:
        """Cuts a row into windows of at most `longest` tokens."""
        tokens = tokens_of(row, tokenizer)
        if tokens is None:
            tokens = tokenizer(text_in(row), verbose=False)["input_ids"]
        if len(tokens) < 2:
            raise nothing_to_predict(row)
        windows = [tokens[start : start + longest] for start in range(0, len(tokens) - 1, longest - 1)]
        return [Block(window, window) for window in windows]


SHARE = 0.15


class MaskedLanguageModelling(LanguageModelling):
    """The task of predicting masked tokens of a text."""

    name = "fill-mask"
    heads = ("ForMaskedLM",)
    auto_class = AutoModelForMaskedLM
    shift = 0

    def blocks(self, row: Row, tokenizer: Any, longest: int) -> list[Block]:
        """Cuts a row into parts of at most `longest` tokens, and hides tokens of each.

        Special tokens stand around each part where the row holds a text.
        """
        if tokenizer.mask_token_id is None:
            raise ConfigurationError(
                f"the tokenizer ({type(tokenizer).__name__}) has no mask token, so nothing can be hidden. Take the "
                "tokenizer that the model was trained with."
            )
        tokens = tokens_of(row, tokenizer)
        if tokens is not None:
            parts = [tokens[start : start + longest] for start in range(0, len(tokens), longest)]
        else:
            require_fast(tokenizer, "cutting a text into blocks")
            parts = tokenizer(text_in(row), truncation=True, max_length=longest, return_overflowing_tokens=True)[
                "input_ids"
            ]
        special = set(tokenizer.all_special_ids)
        hidden = (_hidden(part, special, tokenizer.mask_token_id) for part in parts)
        blocks = [block for block in hidden if block is not None]
        if not blocks:
            raise nothing_to_predict(row)
        return blocks


def _hidden(tokens: list[int], special: set[int], mask: int) -> Block | None:
    """Masks some of a block's tokens; None where all are special."""
    places = [place for place, token in enumerate(tokens) if token not in special]
    if not places:
        return None
    seed = hashlib.blake2b(" ".join(map(str, tokens)).encode(), digest_size=8).digest()
    count = max(1, round(SHARE * len(places)))
    chosen = set(random.Random(int.from_bytes(seed, "little")).sample(places, count))
    return Block(
        [mask if place in chosen else token for place, token in enumerate(tokens)],
        [token if place in chosen else -100 for place, token in enumerate(tokens)],
    )
