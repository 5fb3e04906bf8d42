"""BERT on SWAG: which of four endings?

    python recipes/bert_swag.py --out bert-swag-small

The other options, --smoke among them, are in recipe.py.
"""

from datasets import Dataset, load_dataset
from recipe import main
from smoke import ENCODER, swag_rows, text_model
from transformers import AutoModelForMultipleChoice, BertConfig, PreTrainedModel

from hf_lossless import LosslessCompressionConfig


def compress(model: str, rows: Dataset) -> PreTrainedModel:
    """The smallest plan that other rows certify; each row is four texts, so batches have few rows."""
    config = LosslessCompressionConfig(dataset=rows, batch_size=8)
    return AutoModelForMultipleChoice.from_pretrained(model, quantization_config=config)


if __name__ == "__main__":
    main(
        compress,
        model="ehdwns1516/bert-base-uncased_SWAG",
        rows=lambda: load_dataset("allenai/swag", "regular", split="validation"),
        smoke=text_model(AutoModelForMultipleChoice, BertConfig(**ENCODER), swag_rows),
    )
