"""Compresses GPT-2 on WikiText-2: perplexity.

    python recipes/gpt2_wikitext.py --out gpt2-wikitext-small

Takes the smallest plan that other rows certify. The corpus is cut into rows of 256 tokens, so that the certificate's
loss, a mean over rows, is the logarithm of the perplexity.

The other options, --smoke among them, are in recipe.py.
"""

from datasets import Dataset
from recipe import main
from smoke import language_rows, text_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from hf_lossless.data.tasks.language_modelling import blocks_of_tokens

SMALL = GPT2Config(n_embd=64, n_layer=2, n_head=2, n_positions=256)


def blocks(model: str, corpus: Dataset) -> Dataset:
    """Cuts the corpus into rows of 256 of the model's tokens."""
    return blocks_of_tokens(corpus["text"], AutoTokenizer.from_pretrained(model), 256)


if __name__ == "__main__":
    main(
        AutoModelForCausalLM,
        model="openai-community/gpt2",
        data=("Salesforce/wikitext", "wikitext-2-raw-v1"),
        split="validation",
        settings={"num_samples": 64},
        prepare=blocks,
        smoke=text_model(SMALL, language_rows),
    )
