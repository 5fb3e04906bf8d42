"""RoBERTa on MNLI, whose labels it numbers in another order than GLUE; their names are told apart.

    python recipes/roberta_mnli.py --out roberta-mnli-small

The other options, --smoke among them, are in recipe.py.
"""

from datasets import Dataset, load_dataset
from recipe import main
from smoke import ENCODER, mnli_rows, text_model
from transformers import AutoModelForSequenceClassification, PreTrainedModel, RobertaConfig

from hf_lossless import LosslessCompressionConfig


def compress(model: str, rows: Dataset) -> PreTrainedModel:
    """The smallest plan that other rows certify; the large model needs small batches."""
    config = LosslessCompressionConfig(dataset=rows, batch_size=8)
    return AutoModelForSequenceClassification.from_pretrained(model, quantization_config=config)


if __name__ == "__main__":
    main(
        compress,
        model="FacebookAI/roberta-large-mnli",
        rows=lambda: load_dataset("nyu-mll/multi_nli", split="validation_matched"),
        smoke=text_model(AutoModelForSequenceClassification, RobertaConfig(**ENCODER, num_labels=3), mnli_rows),
    )
