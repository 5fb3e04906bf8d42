"""Compresses ResNet-50 on ImageNet.

    python recipes/resnet_imagenet.py --out small --data imagenet/val    # a folder for each class
    python recipes/resnet_imagenet.py --out small                        # the Hub's gated copy: log in first

Takes the smallest plan that other images certify; batch norms follow the rounded weights.
The other options, --smoke among them, are in recipe.py.
"""

from recipe import main
from smoke import image_model
from transformers import AutoModelForImageClassification, ResNetConfig

SMALL = ResNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[1, 1], layer_type="basic", num_labels=10)

if __name__ == "__main__":
    main(
        AutoModelForImageClassification,
        model="microsoft/resnet-50",
        data=("ILSVRC/imagenet-1k",),
        split="validation",
        settings={"num_samples": 256},
        smoke=image_model(SMALL),
    )
