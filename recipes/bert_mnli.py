"""Compresses BERT on MNLI: does one sentence follow from another?

    python recipes/bert_mnli.py --out bert-mnli-small
    python recipes/bert_mnli.py --out bert-mnli-small --data nyu-mll/multi_nli --split validation_mismatched

Takes the smallest plan that other rows certify.
The other options, --smoke among them, are in recipe.py.
"""

from recipe import main
from smoke import ENCODER, mnli_rows, text_model
from transformers import AutoModelForSequenceClassification, BertConfig

if __name__ == "__main__":
    main(
        AutoModelForSequenceClassification,
        model="gchhablani/bert-base-cased-finetuned-mnli",
        data=("nyu-mll/multi_nli",),
        split="validation_matched",
        smoke=text_model(BertConfig(**ENCODER, num_labels=3), mnli_rows),
    )
