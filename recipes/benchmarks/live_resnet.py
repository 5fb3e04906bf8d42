"""A ResNet none of whose taps is dead: trained here, in a few minutes on one core, and kept in a folder.

    python recipes/benchmarks/live_resnet.py FOLDER [--assets DIR]

In the last stage of resnet-fashion-mnist an image is one pixel, so that 8 of 9 taps of its convolutions see padding
only, and cost nothing. Here the images are enlarged to 64 x 64 pixels: transformers' ResNet takes a quarter of the side
before its first stage, and the stages see 16, 8 and 4 pixels a side. Trained on the 20,000 training rows of
Fashion-MNIST, mirrored and shifted at random, by SGD with one cycle of the learning rate (Smith & Topin 2018,
arXiv 1708.07120).
"""

import argparse
import time
from pathlib import Path

import datasets
import torch
from assets import add_assets_option, assets_folder
from torch import Tensor
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessorPil

from hf_lossless.data.rows import make_batches
from hf_lossless.data.tasks.registry import task_of

SIDE = 64
_EPOCHS = 5
_BATCH_SIZE = 64
_LEARNING_RATE = 0.1
_LARGEST_SHIFT = 4
_MEAN, _DEVIATION = 0.286, 0.353  # of the training pixels


def live_resnet(folder: Path, assets: Path) -> Path:
    """The folder with the model; trained if it is not there."""
    if not (folder / "config.json").is_file():
        _train(folder, assets)
    return folder


def _train(folder: Path, assets: Path) -> None:
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=32, hidden_sizes=[32, 64, 128], depths=[2, 2, 2], layer_type="basic", num_labels=10
    )
    model = ResNetForImageClassification(config).to(memory_format=torch.channels_last).train()
    processor = ViTImageProcessorPil(
        do_convert_rgb=True,
        do_resize=True,
        size={"height": SIDE, "width": SIDE},
        image_mean=[_MEAN] * 3,
        image_std=[_DEVIATION] * 3,
    )
    rows = datasets.load_dataset("parquet", data_files=str(assets / "fashion-mnist/train.parquet"), split="train")
    batches = list(make_batches(rows, task_of(model), processor, model, 1000))
    images = torch.cat([batch["pixel_values"][:, :1].half() for batch in batches])  # grey: the channels are alike
    labels = torch.cat([batch["labels"] for batch in batches])
    optimiser = torch.optim.SGD(model.parameters(), lr=_LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = _EPOCHS * -(-len(images) // _BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _LEARNING_RATE, total_steps=steps, pct_start=0.25)
    start = time.perf_counter()
    for epoch in range(_EPOCHS):
        for picked in torch.split(torch.randperm(len(images)), _BATCH_SIZE):
            pixels = _augmented(images[picked].float()).expand(-1, 3, -1, -1)
            loss = model(pixel_values=pixels.contiguous(memory_format=torch.channels_last), labels=labels[picked]).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s", flush=True)
    model.eval().to(memory_format=torch.contiguous_format).save_pretrained(folder)
    processor.save_pretrained(folder)


def _augmented(images: Tensor) -> Tensor:
    """The images, each mirrored or not and all shifted alike."""
    mirrored = torch.rand(len(images)) < 0.5
    images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    down, right = torch.randint(-_LARGEST_SHIFT, _LARGEST_SHIFT + 1, (2,)).tolist()
    padded = F.pad(images, [_LARGEST_SHIFT] * 4, value=-_MEAN / _DEVIATION)
    return padded[:, :, _LARGEST_SHIFT + down :, _LARGEST_SHIFT + right :][:, :, :SIDE, :SIDE]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    add_assets_option(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    live_resnet(arguments.folder, assets_folder(parser, arguments))


if __name__ == "__main__":
    main()
