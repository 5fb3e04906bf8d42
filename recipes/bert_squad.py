"""Compresses BERT on SQuAD v1.1: question answering.

    python recipes/bert_squad.py --out bert-squad-small

Takes the smallest plan whose F1 falls by less than half a point, and whose loss rises by less than 1 %.
The other options, --smoke among them, are in recipe.py.
"""

from recipe import main
from smoke import ENCODER, squad_rows, text_model
from transformers import AutoModelForQuestionAnswering, BertConfig

if __name__ == "__main__":
    main(
        AutoModelForQuestionAnswering,
        model="csarron/bert-base-uncased-squad-v1",
        data=("rajpurkar/squad",),
        split="validation",
        settings={"batch_size": 16},
        smoke=text_model(BertConfig(**ENCODER), squad_rows),
    )
