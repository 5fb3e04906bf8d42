"""The demo: trains, compresses and certifies a small model on real data without network.

A small ViT is trained on scikit-learn's handwritten digits, compressed inside `from_pretrained` as far as a certificate
goes, saved, reloaded, and compared with the original. Digits are few: most of the 1,797 are for certification, since at
least 600 are needed to show that the accuracy falls by less than half a point.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate, pairwise
from pathlib import Path

import datasets
import torch
from PIL import Image
from rich.console import Console
from sklearn.datasets import load_digits
from tqdm.auto import tqdm
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from hf_lossless.certification.evaluation import evaluate
from hf_lossless.checkpoints.files import new_folder
from hf_lossless.checkpoints.record import record_of, write_record
from hf_lossless.config import LosslessCompressionConfig
from hf_lossless.data.rows import make_batches
from hf_lossless.data.tasks.image_classification import ImageClassification
from hf_lossless.errors import CheckpointError
from hf_lossless.reports.pictures.frontier import frontier_figure
from hf_lossless.reports.tables import certificate_texts, comparison_table, plan_table

_NUM_TRAIN, _NUM_CALIBRATION, _NUM_SELECTION = 800, 128, 128
_EPOCHS = 30

_METRIC_MARGIN = 0.01
"""Twice the default: of 741 digits, four more mistakes are half a point, and too few digits to tell them from none."""

_ROUNDING = 2.0**-18
"""Largest difference of outputs by rounding alone, as a share of the largest: 32 times the precision of float32."""

_REPORT = "Please report this with your versions of torch and transformers."


def run_demo(out: Path, console: Console) -> None:
    """Runs the demo: trains, compresses, saves, reloads and reports.

    It writes `original`, `compressed` and `frontier.png` to `out`.

    Raises:
        CheckpointError: `out` is not an empty folder, or the reloaded model differs from the saved one.
    """
    with new_folder(out) as folder, _one_thread():
        train, calibration, selection, held_out = _digits()
        console.print(f"training a small ViT on {len(train)} handwritten digits")
        processor = ViTImageProcessorPil(do_resize=False, size={"height": 8, "width": 8})
        original = _train(train, processor)
        original.save_pretrained(folder / "original")
        processor.save_pretrained(folder / "original")

        console.print(
            f"compressing it, calibrated on {len(calibration)} other digits, as far as {len(held_out)} more can certify"
        )
        config = LosslessCompressionConfig(
            dataset=calibration,
            selection_dataset=selection,
            certification_dataset=held_out,
            metric_margin=_METRIC_MARGIN,
            storage=("fixed", "entropy"),
        )
        compressed = AutoModelForImageClassification.from_pretrained(folder / "original", quantization_config=config)
        compressed.save_pretrained(folder / "compressed")
        processor.save_pretrained(folder / "compressed")
        result = compressed.hf_quantizer.result
        record = record_of(result)
        write_record(folder / "compressed", record)
        frontier_figure(record).savefig(folder / "frontier.png", dpi=150)

        reloaded = AutoModelForImageClassification.from_pretrained(folder / "compressed")
        task = ImageClassification()
        _refuse_difference(compressed, reloaded, next(make_batches(held_out, task, processor, reloaded, len(held_out))))
        evaluations = {
            "original": (evaluate(original, held_out, task, processor), result.plan.original_bytes),
            "compressed": (evaluate(reloaded, held_out, task, processor), result.size_bytes),
        }
    console.print(plan_table(result.plan))
    console.print("on the digits that certified it:")
    console.print(comparison_table(evaluations, result.plan.original_bytes))
    for text in certificate_texts(result):
        console.print(text, soft_wrap=True, highlight=False)
    console.print(
        "The reloaded model's tensors equal the saved one's, bit for bit, and its outputs to within rounding. "
        f"Everything is in {out}",
        soft_wrap=True,
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Limits torch to one thread: so small a model spends more time on waking threads than on arithmetic."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _digits() -> list[datasets.Dataset]:
    """Splits the 1,797 digits into rows to train on, to calibrate on, to select on and to certify on."""
    digits = load_digits()
    images = [Image.fromarray((image * 15.9375).astype("uint8")) for image in digits.images]  # 0..16 to 0..255
    rows = datasets.Dataset.from_list(
        [{"image": image, "label": int(label)} for image, label in zip(images, digits.target, strict=True)]
    ).shuffle(seed=0)
    ends = [0, *accumulate((_NUM_TRAIN, _NUM_CALIBRATION, _NUM_SELECTION)), len(rows)]
    return [rows.select(range(start, end)) for start, end in pairwise(ends)]


def _train(rows: datasets.Dataset, processor: ViTImageProcessorPil) -> ViTForImageClassification:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
    )
    config.num_labels = 10
    model = ViTForImageClassification(config)
    [batch] = make_batches(rows, ImageClassification(), processor, model, len(rows))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    steps = _EPOCHS * (len(rows) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    for _ in tqdm(range(steps), desc="training"):
        chosen = torch.randint(len(rows), (64,), generator=generator)
        loss = model(pixel_values=batch["pixel_values"][chosen], labels=batch["labels"][chosen]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()  # type: ignore[no-untyped-call]
    return model


def _refuse_difference(
    saved: ViTForImageClassification, reloaded: ViTForImageClassification, batch: dict[str, torch.Tensor]
) -> None:
    """Compares tensors bit for bit, and outputs to within rounding.

    Outputs of equal tensors may differ in their last bits: where tensors lie in memory decides on the order in which
    torch adds, and a loaded file's lie where they are in the file.
    """
    tensors, others = saved.state_dict(), reloaded.state_dict()
    differing = [
        name
        for name in sorted(tensors.keys() | others.keys())
        if name not in tensors or name not in others or not _same(tensors[name], others[name])
    ]
    if differing:
        raise CheckpointError(
            f"{len(differing)} of the reloaded model's tensors differ from the saved one's, the first of them is "
            f"{differing[0]!r}. {_REPORT}"
        )
    with torch.no_grad():
        expected, found = (model(pixel_values=batch["pixel_values"]).logits for model in (saved, reloaded))
    difference, largest = (found - expected).abs().max().item(), expected.abs().max().item()
    if not difference <= _ROUNDING * largest:
        raise CheckpointError(
            f"the reloaded model's outputs differ from the saved one's by up to {difference:.3g}, which rounding does "
            f"not explain: they are at most {largest:.3g}. {_REPORT}"
        )


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first, second)
