"""MiniLM on SST-2: is a sentence kind? More than half of it are embeddings.

    python recipes/minilm_sst2.py --out minilm-sst2-small

The target is a size, so no row is held back and nothing is certified: judge the result with `hf-lossless certify` on
rows of your own.

The other options, --smoke among them, are in recipe.py.
"""

from datasets import Dataset, load_dataset
from recipe import main
from smoke import ENCODER, sst2_rows, text_model
from transformers import AutoModelForSequenceClassification, BertConfig, PreTrainedModel

from hf_lossless import LosslessCompressionConfig


def compress(model: str, rows: Dataset) -> PreTrainedModel:
    """Eight times smaller, embeddings included."""
    config = LosslessCompressionConfig(dataset=rows, ratio=8)
    return AutoModelForSequenceClassification.from_pretrained(model, quantization_config=config)


if __name__ == "__main__":
    main(
        compress,
        model="philschmid/MiniLM-L6-H384-uncased-sst2",
        rows=lambda: load_dataset("stanfordnlp/sst2", split="validation"),
        smoke=text_model(AutoModelForSequenceClassification, BertConfig(**ENCODER), sst2_rows),
    )
