"""Causal language modelling: every token from those before it, as GPT-2 on WikiText.

Blocks overlap by one token, so that each token of a row but the first is predicted once. The first of a block sees
nothing before it: perplexities are those of disjoint windows, which lie above those of sliding ones. Padding stands
behind a block, where no token looks.
"""

from typing import Any

from transformers import AutoModelForCausalLM

from hf_lossless.tasks.language_modelling import Block, LanguageModelling, nothing_to_predict, text_in, tokens_of
from hf_lossless.tasks.rows import Row


class CausalLanguageModelling(LanguageModelling):
    """A text to each next token."""

    name = "text-generation"
    heads = ("ForCausalLM", "LMHeadModel")
    auto_class = AutoModelForCausalLM
    shift = 1

    def blocks(self, row: Row, tokenizer: Any, longest: int) -> list[Block]:
        """Windows of at most `longest` tokens."""
        tokens = tokens_of(row, tokenizer)
        if tokens is None:
            tokens = tokenizer(text_in(row), verbose=False)["input_ids"]
        if len(tokens) < 2:
            raise nothing_to_predict(row)
        windows = [tokens[start : start + longest] for start in range(0, len(tokens) - 1, longest - 1)]
        return [Block(window, window) for window in windows]
