"""ResNet-50 on ImageNet.

    python recipes/resnet_imagenet.py --out small --data imagenet/val    # a folder for each class
    python recipes/resnet_imagenet.py --out small                        # the Hub's gated copy: log in first

The other options, --smoke among them, are in recipe.py.
"""

from datasets import Dataset, load_dataset
from recipe import main
from smoke import image_model
from transformers import AutoModelForImageClassification, PreTrainedModel, ResNetConfig

from hf_lossless import LosslessCompressionConfig

SMALL = ResNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[1, 1], layer_type="basic", num_labels=10)


def compress(model: str, rows: Dataset) -> PreTrainedModel:
    """The smallest plan that other images certify; batch norms follow the rounded weights."""
    config = LosslessCompressionConfig(dataset=rows, num_samples=256)
    return AutoModelForImageClassification.from_pretrained(model, quantization_config=config)


if __name__ == "__main__":
    main(
        compress,
        model="microsoft/resnet-50",
        rows=lambda: load_dataset("ILSVRC/imagenet-1k", split="validation"),
        smoke=image_model(SMALL),
    )
