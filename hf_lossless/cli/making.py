"""Commands that make a compressed checkpoint: `compress`, `demo`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from hf_lossless.certification.certificate import CONFIDENCE, METRIC_MARGIN, TOLERANCE
from hf_lossless.cli.options import (
    CONFIDENCE_OPTION,
    DATA,
    METRIC_MARGIN_OPTION,
    RUNTIME,
    SPLIT,
    TASK,
    activation_widths,
    bit_widths,
    ranks_by_name,
)
from hf_lossless.cli.screen import console
from hf_lossless.storage.plan import STORAGES
from hf_lossless.storage.runtime.runtimes import checked_runtime
from hf_lossless.theories import THEORIES


def compress(
    model: Annotated[str, typer.Argument(help="A checkpoint's folder or Hub id.")],
    data: DATA,
    out: Annotated[Path, typer.Option("--out", help="The folder to write; must not exist, or be empty.")],
    task: TASK = None,
    split: SPLIT = None,
    theory: Annotated[
        str, typer.Option(help=f"What predicts the change of the loss: {', '.join(THEORIES)}.")
    ] = "curvature",
    tolerance: Annotated[
        float | None,
        typer.Option(help=f"Target: certified rise of the loss, over the original's loss; default: {TOLERANCE}."),
    ] = None,
    confidence: CONFIDENCE_OPTION = CONFIDENCE,
    metric_margin: METRIC_MARGIN_OPTION = METRIC_MARGIN,
    selection_data: Annotated[
        str | None, typer.Option(help="Rows to compare plans on; default: a part of --data.")
    ] = None,
    certification_data: Annotated[
        str | None, typer.Option(help="Rows that the certificate rests on; default: a part of --data.")
    ] = None,
    ratio: Annotated[float | None, typer.Option(help="Target: at least so many times smaller.")] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Target: at most so many bytes.")] = None,
    loss_budget: Annotated[float | None, typer.Option(help="Target: predicted rise of the loss, at most.")] = None,
    bits: Annotated[str, typer.Option(help="Widths to choose from; 16 keeps a layer.")] = "2,3,4,8,16",
    storage: Annotated[
        str, typer.Option(help=f"Kinds of grids to choose from: {', '.join(STORAGES)}; entropy is smaller.")
    ] = "fixed",
    group_size: Annotated[int, typer.Option(help="Inputs that share a scale; 0: one scale per output.")] = 64,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="Grids with a zero point.")] = False,
    ranks: Annotated[
        list[str] | None,
        typer.Option(help="Low-rank factors too: auto, or LAYER=16,32 for a layer or pattern; may be repeated."),
    ] = None,
    skip: Annotated[list[str] | None, typer.Option(help="A module to leave alone; may be repeated.")] = None,
    keep_head: Annotated[bool, typer.Option("--keep-head", help="Leave the task head alone.")] = False,
    activation_noise: Annotated[
        bool, typer.Option("--activation-noise", help="Count activations as quantised too, as the LLC paper does.")
    ] = False,
    activation_bits: Annotated[
        str, typer.Option(help="Widths of quantised activations to choose from, 2 to 8; none: floating point.")
    ] = "none",
    samples: Annotated[int, typer.Option(help="Rows to calibrate on.")] = 128,
    seed: Annotated[int, typer.Option(help="Seed of sampling and noise.")] = 0,
    runtime: RUNTIME = None,
) -> None:
    """Compress a checkpoint and save it."""
    from hf_lossless.checkpoints.files import new_folder, refuse_occupied
    from hf_lossless.checkpoints.record import record_of, write_record
    from hf_lossless.cli.models import load_model, refuse_quantised, task_of_model
    from hf_lossless.config import LosslessCompressionConfig
    from hf_lossless.data.processes import process_state
    from hf_lossless.reports.tables import certificate_texts, plan_table

    refuse_occupied(out)
    config = LosslessCompressionConfig(
        dataset=data,
        split=split,
        task=task,
        theory=theory,
        activation_noise=activation_noise,
        activation_bits=activation_widths(activation_bits),
        tolerance=tolerance,
        confidence=confidence,
        metric_margin=metric_margin,
        selection_dataset=selection_data,
        certification_dataset=certification_data,
        ratio=ratio,
        max_bytes=max_bytes,
        loss_budget=loss_budget,
        bits=bit_widths(bits),
        storage=storage.split(","),
        group_size=group_size or None,
        symmetric=not asymmetric,
        ranks=ranks_by_name(ranks or []),
        modules_to_not_convert=skip or (),
        keep_head=keep_head,
        num_samples=samples,
        seed=seed,
        runtime=checked_runtime(runtime or "auto", "--runtime"),
    )
    chosen_task = task_of_model(model, task)
    refuse_quantised(model)
    compressed: Any = load_model(chosen_task, model, quantization_config=config)
    if process_state().is_main_process:
        with new_folder(out) as folder:
            compressed.save_pretrained(folder)
            chosen_task.load_processor(model).save_pretrained(folder)
            write_record(folder, record_of(result := compressed.hf_quantizer.result))
        console().print(plan_table(result.plan))
        console().print(
            f"{out}: {result.size_bytes:,} bytes, {result.ratio:.2f} times smaller; "
            f"predicted change of the loss {result.plan.predicted_loss_change:+.4f}, measured on the calibration rows "
            f"{result.measured_loss_change:+.4f}. "
            f"{'' if result.certificate else 'Judge it on rows it has not seen: hf-lossless evaluate'}",
            soft_wrap=True,
        )
        for text in certificate_texts(result):
            console().print(text, soft_wrap=True, highlight=False)


def demo(
    out: Annotated[Path | None, typer.Option(help="Folder for the results; default: a new temporary one.")] = None,
) -> None:
    """Train, compress, save, reload and judge a small ViT on handwritten digits; needs no network."""
    import tempfile

    from hf_lossless.cli.demo import run_demo

    run_demo(out if out is not None else Path(tempfile.mkdtemp(prefix="hf-lossless-demo-")), console())
