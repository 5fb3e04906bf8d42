"""Compresses DistilBERT on SST-2: is a sentence kind?

    python recipes/distilbert_sst2.py --out distilbert-sst2-small

Takes the smallest plan that other rows certify, with margins that suit so few: the validation split has 872 rows. A
certificate takes 500 and gets three fifths of them, which is enough for a fall of the accuracy by less than a point to
be seen, and not for half a point.

The other options, --smoke among them, are in recipe.py.
"""

from recipe import main
from smoke import sst2_rows, text_model
from transformers import AutoModelForSequenceClassification, DistilBertConfig

SMALL = DistilBertConfig(dim=64, n_layers=2, n_heads=2, hidden_dim=128, max_position_embeddings=130)

if __name__ == "__main__":
    main(
        AutoModelForSequenceClassification,
        model="distilbert/distilbert-base-uncased-finetuned-sst-2-english",
        data=("stanfordnlp/sst2",),
        split="validation",
        settings={"tolerance": 0.05, "metric_margin": 0.01},
        smoke=text_model(SMALL, sst2_rows),
    )
