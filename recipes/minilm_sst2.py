"""Compresses MiniLM on SST-2 (is a sentence kind?); more than half of it are embeddings.

    python recipes/minilm_sst2.py --out minilm-sst2-small

Makes it eight times smaller, embeddings included. The target is a size, so no row is held back and nothing is
certified: judge the result with `hf-lossless certify` on rows of your own.

The other options, --smoke among them, are in recipe.py.
"""

from recipe import main
from smoke import ENCODER, sst2_rows, text_model
from transformers import AutoModelForSequenceClassification, BertConfig

if __name__ == "__main__":
    main(
        AutoModelForSequenceClassification,
        model="philschmid/MiniLM-L6-H384-uncased-sst2",
        data=("stanfordnlp/sst2",),
        split="validation",
        settings={"ratio": 8},
        smoke=text_model(BertConfig(**ENCODER), sst2_rows),
    )
