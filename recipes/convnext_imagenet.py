"""ConvNeXt on ImageNet.

    python recipes/convnext_imagenet.py --out small --data imagenet/val    # a folder for each class
    python recipes/convnext_imagenet.py --out small                        # the Hub's gated copy: log in first

The other options, --smoke among them, are in recipe.py.
"""

from datasets import Dataset, load_dataset
from recipe import main
from smoke import IMAGE, image_model
from transformers import AutoModelForImageClassification, ConvNextConfig, PreTrainedModel

from hf_lossless import LosslessCompressionConfig

SMALL = ConvNextConfig(hidden_sizes=[32, 64], depths=[1, 1], num_stages=2, image_size=IMAGE, num_labels=10)


def compress(model: str, rows: Dataset) -> PreTrainedModel:
    """The smallest plan that other images certify; depthwise convolutions are grids of their own."""
    config = LosslessCompressionConfig(dataset=rows, num_samples=256)
    return AutoModelForImageClassification.from_pretrained(model, quantization_config=config)


if __name__ == "__main__":
    main(
        compress,
        model="facebook/convnext-tiny-224",
        rows=lambda: load_dataset("ILSVRC/imagenet-1k", split="validation"),
        smoke=image_model(SMALL),
    )
