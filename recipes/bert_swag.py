"""Compresses BERT on SWAG: which of four endings?

    python recipes/bert_swag.py --out bert-swag-small

Takes the smallest plan that other rows certify. Each row is four texts, so batches have few rows.
The other options, --smoke among them, are in recipe.py.
"""

from recipe import main
from smoke import ENCODER, swag_rows, text_model
from transformers import AutoModelForMultipleChoice, BertConfig

if __name__ == "__main__":
    main(
        AutoModelForMultipleChoice,
        model="ehdwns1516/bert-base-uncased_SWAG",
        data=("allenai/swag", "regular"),
        split="validation",
        settings={"batch_size": 8},
        smoke=text_model(BertConfig(**ENCODER), swag_rows),
    )
