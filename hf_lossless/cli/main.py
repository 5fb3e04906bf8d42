"""The command line: compress, evaluate, certify, inspect, card, report, push, export, neighbourhood, demo."""

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from hf_lossless.certification.certificate import CONFIDENCE, METRIC_MARGIN, TOLERANCE, Provenance
from hf_lossless.certification.certify import certify
from hf_lossless.certification.comparison import Comparison, compare
from hf_lossless.certification.evaluation import Evaluation
from hf_lossless.checkpoints.files import new_folder, refuse_occupied
from hf_lossless.checkpoints.record import record_of, write_record
from hf_lossless.checkpoints.saved_folder import SavedFolder
from hf_lossless.cli.demo import run_demo
from hf_lossless.cli.models import Judged, config_of, judge, load_model, refuse_quantised, task_of_model
from hf_lossless.cli.options import activation_widths, bit_widths, ranks_by_name
from hf_lossless.cli.publish import card, export_command, push, report
from hf_lossless.config import LosslessCompressionConfig
from hf_lossless.data.processes import process_state, progress_bar
from hf_lossless.data.rows import Rows, calibration_batches, load_rows
from hf_lossless.data.splits import fingerprint
from hf_lossless.data.tasks.registry import TASKS
from hf_lossless.errors import CheckpointError, LosslessError
from hf_lossless.planning.target import Target
from hf_lossless.reports.pictures.neighbourhood import neighbourhood_figure
from hf_lossless.reports.tables import (
    certificate_table,
    certificate_texts,
    comparison_table,
    comparison_text,
    gap_tables,
    inspection,
    layer_table,
    plan_table,
)
from hf_lossless.storage.layers import find_layers
from hf_lossless.storage.plan import QUANT_METHOD, STORAGES
from hf_lossless.theories import THEORIES
from hf_lossless.theories.neighbourhood import MAX_LAYERS, named_layers, neighbourhood, spread_layers

app = typer.Typer(
    help="Loss-preserving compression of Hugging Face checkpoints.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for _command in (card, report, push):
    app.command()(_command)
app.command(name="export")(export_command)
_console = Console()

_Data = Annotated[str, typer.Option("--data", help="A json, jsonl, csv or parquet file, a saved dataset, or a Hub id.")]
_Split = Annotated[str | None, typer.Option("--split", help="Which split of a dataset that has several.")]
_TaskName = Annotated[str | None, typer.Option("--task", help=f"{' or '.join(TASKS)}; default: by the model's class.")]
_Confidence = Annotated[float, typer.Option(help="Of the certificate, between 0 and 1.")]
_MetricMargin = Annotated[float, typer.Option(help="How far the metric may fall, for the certificate.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def compress(
    model: Annotated[str, typer.Argument(help="A checkpoint's folder or Hub id.")],
    data: _Data,
    out: Annotated[Path, typer.Option("--out", help="The folder to write; must not exist, or be empty.")],
    task: _TaskName = None,
    split: _Split = None,
    theory: Annotated[
        str, typer.Option(help=f"What predicts the change of the loss: {', '.join(THEORIES)}.")
    ] = "curvature",
    tolerance: Annotated[
        float | None,
        typer.Option(help=f"Target: certified rise of the loss, over the original's loss; default: {TOLERANCE}."),
    ] = None,
    confidence: _Confidence = CONFIDENCE,
    metric_margin: _MetricMargin = METRIC_MARGIN,
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
) -> None:
    """Compress a checkpoint and save it."""
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
    )
    chosen_task = task_of_model(model, task)
    refuse_quantised(model)
    compressed: Any = load_model(chosen_task, model, quantization_config=config)
    if process_state().is_main_process:
        with new_folder(out) as folder:
            compressed.save_pretrained(folder)
            chosen_task.load_processor(model).save_pretrained(folder)
            write_record(folder, record_of(result := compressed.hf_quantizer.result))
        _console.print(plan_table(result.plan))
        _console.print(
            f"{out}: {result.size_bytes:,} bytes, {result.ratio:.2f} times smaller; "
            f"predicted change of the loss {result.plan.predicted_loss_change:+.4f}, measured on the calibration rows "
            f"{result.measured_loss_change:+.4f}. "
            f"{'' if result.certificate else 'Judge it on rows it has not seen: hf-lossless evaluate'}",
            soft_wrap=True,
        )
        for text in certificate_texts(result):
            _console.print(text, soft_wrap=True, highlight=False)


@app.command(name="evaluate")
def evaluate_command(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A compressed checkpoint (or any other).")],
    data: _Data,
    task: _TaskName = None,
    split: _Split = None,
    against: Annotated[str | None, typer.Option(help="The original, to be evaluated beside it.")] = None,
    as_json: _Json = False,
) -> None:
    """Measure loss and metric on labelled rows."""
    models = {"model": model} if against is None else {"compressed": model, "original": against}
    tasks = {name: task_of_model(path, task) for name, path in models.items()}  # both, before the first takes its time
    rows = load_rows(data, split)
    judged = {name: judge(path, rows, tasks[name]) for name, path in models.items()}
    evaluations = {name: one.answers.evaluation for name, one in judged.items()}
    compared = None
    if against is not None:
        compared = compare(judged["original"].answers.outputs, judged["compressed"].answers.outputs)
    if not process_state().is_main_process:
        return
    first = next(iter(judged.values()))
    if as_json:
        values = [_evaluation_json(evaluations[name], one) for name, one in judged.items()]
        beside = {} if compared is None else {**_comparison_json(compared), "original": values[1]}
        _print_json({**values[0], **beside})
    else:
        sizes = {name: (evaluations[name], one.size_bytes) for name, one in judged.items()}
        _console.print(comparison_table(sizes, first.original_bytes))
        if compared is not None:
            _console.print(comparison_text(compared), soft_wrap=True)


@app.command(name="certify")
def certify_command(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A compressed checkpoint.")],
    data: _Data,
    against: Annotated[str, typer.Option(help="The original.")],
    task: _TaskName = None,
    split: _Split = None,
    tolerance: Annotated[
        float, typer.Option(help="How much the loss may have risen, over the original's loss.")
    ] = TOLERANCE,
    confidence: _Confidence = CONFIDENCE,
    metric_margin: _MetricMargin = METRIC_MARGIN,
    as_json: _Json = False,
) -> None:
    """Check a compressed checkpoint on rows of your own that had no part in it; status 1 where it fails."""
    # The same settings as a compression's, and the same refusals.
    Target(tolerance=tolerance, confidence=confidence, metric_margin=metric_margin)
    models = {"original": against, "compressed": folder}
    tasks = {name: task_of_model(path, task) for name, path in models.items()}
    entry = getattr(config_of(folder), "quantization_config", None)
    if not isinstance(entry, dict) or entry.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(
            f"{folder} holds no model compressed by hf_lossless. Compress one with: hf-lossless compress"
        )
    rows = tasks["original"].columns_of(load_rows(data, split))
    tasks["original"].refuse_unlabelled(rows, "A certificate needs labels")
    judged = {name: judge(path, rows, tasks[name]) for name, path in models.items()}
    certificate = certify(
        judged["original"].answers.outputs,
        judged["compressed"].answers.outputs,
        Provenance(
            data_fingerprint=fingerprint(rows),
            calibration_rows=None,
            selection_rows=None,
            theory=judged["compressed"].theory,
            seed=None,
        ),
        metric_name=tasks["original"].metric_name,
        tolerance=tolerance,
        confidence=confidence,
        metric_margin=metric_margin,
    )
    if process_state().is_main_process:
        if as_json:
            _print_json(certificate.to_dict())
        else:
            _console.print(certificate_table(certificate))
            _console.print(certificate.paragraph(), soft_wrap=True, highlight=False)
    if not certificate.passed:
        raise typer.Exit(1)


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A compressed checkpoint.")],
    as_json: _Json = False,
) -> None:
    """Show what a compressed checkpoint consists of."""
    saved = SavedFolder.read(folder)
    config, values = saved.entry, inspection(saved.entry)
    if as_json:
        _print_json(values)
    else:
        _console.print(plan_table(saved.plan))
        _console.print(f"{values['size_bytes']:,} bytes, {values['ratio']:.2f} times smaller")
        verdict = "none was asked for" if config.certificate is None else config.certificate.verdict
        _console.print(f"certificate: {verdict}", soft_wrap=True, highlight=False)


@app.command(name="neighbourhood")
def neighbourhood_command(
    model: Annotated[str, typer.Argument(help="A checkpoint's folder or Hub id.")],
    data: _Data,
    task: _TaskName = None,
    split: _Split = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(help=f"A layer or pattern; may be repeated. Default: {MAX_LAYERS} spread over the model."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Rows to measure on.")] = 128,
    seed: Annotated[int, typer.Option(help="Seed of sampling and noise.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="A folder for JSON and plot; must not exist, or be empty. Default: none.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Measure how large noise may be before first and second order no longer explain the loss (LLC Eq. 5 and 6).

    Each layer costs 18 forward passes over the rows, and second derivatives through the layers above it, twice.
    """
    if out is not None:
        refuse_occupied(out)
    rows = Rows(dataset=data, split=split, task=task, num_samples=samples, seed=seed)
    chosen_task = task_of_model(model, task)
    refuse_quantised(model)
    loaded = load_model(chosen_task, model, dtype=torch.float32)  # the rounding of 16 bits would drown small noise
    layers = find_layers(loaded)
    layers = named_layers(layers, layer) if layer else spread_layers(layers)
    batches = calibration_batches(loaded, rows)
    with progress_bar(len(layers), "layers") as advance:
        found = neighbourhood(loaded, batches, layers, seed=seed, advance=advance)
    if not process_state().is_main_process:
        return
    values = {"model": model, "data": data, **found.to_dict()}
    if out is not None:
        with new_folder(out) as folder:
            (folder / "neighbourhood.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
            neighbourhood_figure(found).savefig(folder / "neighbourhood.png", dpi=150)
    if as_json:
        _print_json(values)
        return
    for table in (*gap_tables(found), layer_table(found)):
        _console.print(table)
    if out is not None:
        _console.print(f"{out}: neighbourhood.json, neighbourhood.png", soft_wrap=True)


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option(help="Folder for the results; default: a new temporary one.")] = None,
) -> None:
    """Train, compress, save, reload and judge a small ViT on handwritten digits; needs no network."""
    run_demo(out if out is not None else Path(tempfile.mkdtemp(prefix="hf-lossless-demo-")), _console)


def main() -> None:
    """Entry point: a caller's mistake ends with its message and status 1, without a traceback."""
    try:
        app()
    except (LosslessError, OSError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(1)


def _evaluation_json(evaluation: Evaluation, judged: Judged) -> dict[str, Any]:
    return {
        "loss": evaluation.loss,
        evaluation.metric_name: evaluation.metric,
        **evaluation.other_metrics,
        "num_examples": evaluation.num_examples,
        "size_bytes": judged.size_bytes,
        "ratio": judged.original_bytes / judged.size_bytes,
    }


def _comparison_json(compared: Comparison) -> dict[str, Any]:
    return {
        "loss_change": compared.loss_change,
        "loss_change_error": compared.loss_change_error,
        "flips": compared.flips,
        "right_to_wrong": compared.right_to_wrong,
        "wrong_to_right": compared.wrong_to_right,
        "mean_kl": compared.mean_kl,
    }


def _print_json(values: dict[str, Any]) -> None:
    print(json.dumps(values, indent=2))
