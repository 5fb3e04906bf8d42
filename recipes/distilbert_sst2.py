"""DistilBERT on SST-2: is a sentence kind?

    python recipes/distilbert_sst2.py --out distilbert-sst2-small

The validation split has 872 rows. A certificate takes 500 and gets three fifths of them, which is enough for a fall of
the accuracy by less than a point to be seen, and not for half a point.

The other options, --smoke among them, are in recipe.py.
"""

from datasets import Dataset, load_dataset
from recipe import main
from smoke import sst2_rows, text_model
from transformers import AutoModelForSequenceClassification, DistilBertConfig, PreTrainedModel

from hf_lossless import LosslessCompressionConfig

SMALL = DistilBertConfig(dim=64, n_layers=2, n_heads=2, hidden_dim=128, max_position_embeddings=130)


def compress(model: str, rows: Dataset) -> PreTrainedModel:
    """The smallest plan that other rows certify, with margins that suit so few."""
    config = LosslessCompressionConfig(dataset=rows, tolerance=0.05, metric_margin=0.01)
    return AutoModelForSequenceClassification.from_pretrained(model, quantization_config=config)


if __name__ == "__main__":
    main(
        compress,
        model="distilbert/distilbert-base-uncased-finetuned-sst-2-english",
        rows=lambda: load_dataset("stanfordnlp/sst2", split="validation"),
        smoke=text_model(AutoModelForSequenceClassification, SMALL, sst2_rows),
    )
