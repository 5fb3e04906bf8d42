"""BERT on MNLI: does one sentence follow from another?

    python recipes/bert_mnli.py --out bert-mnli-small
    python recipes/bert_mnli.py --out bert-mnli-small --data nyu-mll/multi_nli --split validation_mismatched

The other options, --smoke among them, are in recipe.py.
"""

from datasets import Dataset, load_dataset
from recipe import main
from smoke import ENCODER, mnli_rows, text_model
from transformers import AutoModelForSequenceClassification, BertConfig, PreTrainedModel

from hf_lossless import LosslessCompressionConfig


def compress(model: str, rows: Dataset) -> PreTrainedModel:
    """The smallest plan that other rows certify."""
    config = LosslessCompressionConfig(dataset=rows)
    return AutoModelForSequenceClassification.from_pretrained(model, quantization_config=config)


if __name__ == "__main__":
    main(
        compress,
        model="gchhablani/bert-base-cased-finetuned-mnli",
        rows=lambda: load_dataset("nyu-mll/multi_nli", split="validation_matched"),
        smoke=text_model(AutoModelForSequenceClassification, BertConfig(**ENCODER, num_labels=3), mnli_rows),
    )
