"""Compresses DeiT, distilled, on ImageNet.

    python recipes/deit_imagenet.py --out small --data imagenet/val    # a folder for each class
    python recipes/deit_imagenet.py --out small                        # the Hub's gated copy: log in first

Takes the smallest plan that other images certify; low-rank factors gain much on image models.
The other options, --smoke among them, are in recipe.py.
"""

from recipe import main
from smoke import PATCHES, image_model
from transformers import AutoModelForImageClassification, DeiTConfig

SMALL = DeiTConfig(**PATCHES, architectures=["DeiTForImageClassificationWithTeacher"])

if __name__ == "__main__":
    main(
        AutoModelForImageClassification,
        model="facebook/deit-base-distilled-patch16-224",
        data=("ILSVRC/imagenet-1k",),
        split="validation",
        settings={"num_samples": 256, "ranks": "auto"},
        smoke=image_model(SMALL),
    )
