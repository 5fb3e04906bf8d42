"""Compresses ConvNeXt on ImageNet.

    python recipes/convnext_imagenet.py --out small --data imagenet/val    # a folder for each class
    python recipes/convnext_imagenet.py --out small                        # the Hub's gated copy: log in first

Takes the smallest plan that other images certify; depthwise convolutions are grids of their own.
The other options, --smoke among them, are in recipe.py.
"""

from recipe import main
from smoke import IMAGE, image_model
from transformers import AutoModelForImageClassification, ConvNextConfig

SMALL = ConvNextConfig(hidden_sizes=[32, 64], depths=[1, 1], num_stages=2, image_size=IMAGE, num_labels=10)

if __name__ == "__main__":
    main(
        AutoModelForImageClassification,
        model="facebook/convnext-tiny-224",
        data=("ILSVRC/imagenet-1k",),
        split="validation",
        settings={"num_samples": 256},
        smoke=image_model(SMALL),
    )
