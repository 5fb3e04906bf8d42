"""BERT on SQuAD v1.1: question answering.

    python recipes/bert_squad.py --out bert-squad-small

The other options, --smoke among them, are in recipe.py.
"""

from datasets import Dataset, load_dataset
from recipe import main
from smoke import ENCODER, squad_rows, text_model
from transformers import AutoModelForQuestionAnswering, BertConfig, PreTrainedModel

from hf_lossless import LosslessCompressionConfig


def compress(model: str, rows: Dataset) -> PreTrainedModel:
    """The smallest plan whose F1 falls by less than half a point, and whose loss rises by less than 1 %."""
    config = LosslessCompressionConfig(dataset=rows, batch_size=16)
    return AutoModelForQuestionAnswering.from_pretrained(model, quantization_config=config)


if __name__ == "__main__":
    main(
        compress,
        model="csarron/bert-base-uncased-squad-v1",
        rows=lambda: load_dataset("rajpurkar/squad", split="validation"),
        smoke=text_model(AutoModelForQuestionAnswering, BertConfig(**ENCODER), squad_rows),
    )
