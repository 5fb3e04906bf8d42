"""DeiT, distilled, on ImageNet.

    python recipes/deit_imagenet.py --out small --data imagenet/val    # a folder for each class
    python recipes/deit_imagenet.py --out small                        # the Hub's gated copy: log in first

The other options, --smoke among them, are in recipe.py.
"""

from datasets import Dataset, load_dataset
from recipe import main
from smoke import PATCHES, image_model
from transformers import AutoModelForImageClassification, DeiTConfig, PreTrainedModel

from hf_lossless import LosslessCompressionConfig

SMALL = DeiTConfig(**PATCHES, architectures=["DeiTForImageClassificationWithTeacher"])


def compress(model: str, rows: Dataset) -> PreTrainedModel:
    """The smallest plan that other images certify; low-rank factors gain much on image models."""
    config = LosslessCompressionConfig(dataset=rows, num_samples=256, ranks="auto")
    return AutoModelForImageClassification.from_pretrained(model, quantization_config=config)


if __name__ == "__main__":
    main(
        compress,
        model="facebook/deit-base-distilled-patch16-224",
        rows=lambda: load_dataset("ILSVRC/imagenet-1k", split="validation"),
        smoke=image_model(SMALL),
    )
