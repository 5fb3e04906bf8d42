"""GPT-2 on WikiText-2: perplexity.

    python recipes/gpt2_wikitext.py --out gpt2-wikitext-small

The corpus is cut into rows of 256 tokens, so that the certificate's loss, a mean over rows, is the logarithm of the
perplexity.

The other options, --smoke among them, are in recipe.py.
"""

from datasets import Dataset, load_dataset
from recipe import main
from smoke import language_rows, text_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, PreTrainedModel

from hf_lossless import LosslessCompressionConfig
from hf_lossless.data.tasks.language_modelling import blocks_of_tokens

SMALL = GPT2Config(n_embd=64, n_layer=2, n_head=2, n_positions=256)


def compress(model: str, rows: Dataset) -> PreTrainedModel:
    """The smallest plan that other rows certify."""
    blocks = blocks_of_tokens(rows["text"], AutoTokenizer.from_pretrained(model), 256)
    config = LosslessCompressionConfig(dataset=blocks, num_samples=64)
    return AutoModelForCausalLM.from_pretrained(model, quantization_config=config)


if __name__ == "__main__":
    main(
        compress,
        model="openai-community/gpt2",
        rows=lambda: load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="validation"),
        smoke=text_model(AutoModelForCausalLM, SMALL, language_rows),
    )
