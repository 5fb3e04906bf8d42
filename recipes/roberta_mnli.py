"""Compresses RoBERTa on MNLI, whose labels it numbers in another order than GLUE; their names are told apart.

    python recipes/roberta_mnli.py --out roberta-mnli-small

Takes the smallest plan that other rows certify. The large model needs small batches.
The other options, --smoke among them, are in recipe.py.
"""

from recipe import main
from smoke import ENCODER, mnli_rows, text_model
from transformers import AutoModelForSequenceClassification, RobertaConfig

if __name__ == "__main__":
    main(
        AutoModelForSequenceClassification,
        model="FacebookAI/roberta-large-mnli",
        data=("nyu-mll/multi_nli",),
        split="validation_matched",
        settings={"batch_size": 8},
        smoke=text_model(RobertaConfig(**ENCODER, num_labels=3), mnli_rows),
    )
