"""Commands that measure and judge: `evaluate`, `certify`, `inspect`, `neighbourhood`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_lossless.certification.certificate import CONFIDENCE, METRIC_MARGIN, TOLERANCE
from hf_lossless.cli.options import CONFIDENCE_OPTION, DATA, JSON, METRIC_MARGIN_OPTION, RUNTIME, SPLIT, TASK
from hf_lossless.cli.screen import console, print_json
from hf_lossless.errors import CheckpointError
from hf_lossless.storage.plan import QUANT_METHOD

if TYPE_CHECKING:
    from hf_lossless.certification.comparison import Comparison
    from hf_lossless.certification.evaluation import Evaluation
    from hf_lossless.cli.models import Judged


def evaluate(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A compressed checkpoint (or any other).")],
    data: DATA,
    task: TASK = None,
    split: SPLIT = None,
    against: Annotated[str | None, typer.Option(help="The original, to be evaluated beside it.")] = None,
    runtime: RUNTIME = None,
    as_json: JSON = False,
) -> None:
    """Measure loss and metric on labelled rows."""
    from hf_lossless.certification.comparison import compare
    from hf_lossless.cli.models import judge, task_of_model
    from hf_lossless.data.processes import process_state
    from hf_lossless.data.rows import load_rows
    from hf_lossless.reports.tables import comparison_table, comparison_text

    models = {"model": model} if against is None else {"compressed": model, "original": against}
    tasks = {name: task_of_model(path, task) for name, path in models.items()}  # both before evaluating
    rows = load_rows(data, split)
    judged = {name: judge(path, rows, tasks[name], runtime) for name, path in models.items()}
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
        print_json({**values[0], **beside})
    else:
        sizes = {name: (evaluations[name], one.size_bytes) for name, one in judged.items()}
        console().print(comparison_table(sizes, first.original_bytes))
        if compared is not None:
            console().print(comparison_text(compared), soft_wrap=True)


def certify(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A compressed checkpoint.")],
    data: DATA,
    against: Annotated[str, typer.Option(help="The original.")],
    task: TASK = None,
    split: SPLIT = None,
    tolerance: Annotated[
        float, typer.Option(help="How much the loss may have risen, over the original's loss.")
    ] = TOLERANCE,
    confidence: CONFIDENCE_OPTION = CONFIDENCE,
    metric_margin: METRIC_MARGIN_OPTION = METRIC_MARGIN,
    runtime: RUNTIME = None,
    as_json: JSON = False,
) -> None:
    """Check a compressed checkpoint on rows of your own that had no part in it; status 1 where it fails."""
    from hf_lossless.certification.certificate import Provenance
    from hf_lossless.certification.certify import certify as certificate_of
    from hf_lossless.cli.models import config_of, judge, task_of_model
    from hf_lossless.data.processes import process_state
    from hf_lossless.data.rows import load_rows
    from hf_lossless.data.splits import fingerprint
    from hf_lossless.planning.target import Target
    from hf_lossless.reports.tables import certificate_table

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
    judged = {name: judge(path, rows, tasks[name], runtime) for name, path in models.items()}
    certificate = certificate_of(
        judged["original"].answers.outputs,
        judged["compressed"].answers.outputs,
        Provenance(
            data_fingerprint=fingerprint(rows),
            calibration_rows=None,
            selection_rows=None,
            theory=judged["compressed"].theory,
            seed=None,
            runtime=judged["compressed"].runtime,
        ),
        metric_name=tasks["original"].metric_name,
        tolerance=tolerance,
        confidence=confidence,
        metric_margin=metric_margin,
    )
    if process_state().is_main_process:
        if as_json:
            print_json(certificate.to_dict())
        else:
            console().print(certificate_table(certificate))
            console().print(certificate.paragraph(), soft_wrap=True, highlight=False)
    if not certificate.passed:
        raise typer.Exit(1)


def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A compressed checkpoint.")],
    as_json: JSON = False,
) -> None:
    """Show what a compressed checkpoint consists of."""
    from hf_lossless.checkpoints.saved_folder import SavedFolder
    from hf_lossless.reports.tables import inspection, plan_table

    saved = SavedFolder.read(folder)
    config, values = saved.entry, inspection(saved.entry)
    if as_json:
        print_json(values)
    else:
        console().print(plan_table(saved.plan))
        console().print(f"{values['size_bytes']:,} bytes, {values['ratio']:.2f} times smaller")
        verdict = "none was asked for" if config.certificate is None else config.certificate.verdict
        console().print(f"certificate: {verdict}", soft_wrap=True, highlight=False)


def neighbourhood(
    model: Annotated[str, typer.Argument(help="A checkpoint's folder or Hub id.")],
    data: DATA,
    task: TASK = None,
    split: SPLIT = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(help="A layer or pattern; may be repeated. Default: some, spread over the model."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Rows to measure on.")] = 128,
    seed: Annotated[int, typer.Option(help="Seed of sampling and noise.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="A folder for JSON and plot; must not exist, or be empty. Default: none.")
    ] = None,
    as_json: JSON = False,
) -> None:
    """Measure how large noise may be before first and second order no longer explain the loss (LLC Eq. 5 and 6).

    Each layer costs 18 forward passes over the rows, and second derivatives through the layers above it, twice.
    """
    import json

    import torch

    from hf_lossless.checkpoints.files import new_folder, refuse_occupied
    from hf_lossless.cli.models import load_model, refuse_quantised, task_of_model
    from hf_lossless.data.processes import process_state, progress_bar
    from hf_lossless.data.rows import Rows, calibration_batches
    from hf_lossless.reports.pictures.neighbourhood import neighbourhood_figure
    from hf_lossless.reports.tables import gap_tables, layer_table
    from hf_lossless.storage.layers import find_layers
    from hf_lossless.theories import neighbourhood as theory

    if out is not None:
        refuse_occupied(out)
    rows = Rows(dataset=data, split=split, task=task, num_samples=samples, seed=seed)
    chosen_task = task_of_model(model, task)
    refuse_quantised(model)
    loaded = load_model(chosen_task, model, dtype=torch.float32)  # the rounding of 16 bits would drown small noise
    layers = find_layers(loaded)
    layers = theory.named_layers(layers, layer) if layer else theory.evenly_spaced_layers(layers)
    batches = calibration_batches(loaded, rows)
    with progress_bar(len(layers), "layers") as advance:
        found = theory.neighbourhood(loaded, batches, layers, seed=seed, advance=advance)
    if not process_state().is_main_process:
        return
    values = {"model": model, "data": data, **found.to_dict()}
    if out is not None:
        with new_folder(out) as folder:
            (folder / "neighbourhood.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
            neighbourhood_figure(found).savefig(folder / "neighbourhood.png", dpi=150)
    if as_json:
        print_json(values)
        return
    for table in (*gap_tables(found), layer_table(found)):
        console().print(table)
    if out is not None:
        console().print(f"{out}: neighbourhood.json, neighbourhood.png", soft_wrap=True)


def _evaluation_json(evaluation: "Evaluation", judged: "Judged") -> dict[str, Any]:
    return {
        "loss": evaluation.loss,
        evaluation.metric_name: evaluation.metric,
        **evaluation.other_metrics,
        "num_examples": evaluation.num_examples,
        "size_bytes": judged.size_bytes,
        "ratio": judged.original_bytes / judged.size_bytes,
    }


def _comparison_json(compared: "Comparison") -> dict[str, Any]:
    return {
        "loss_change": compared.loss_change,
        "loss_change_error": compared.loss_change_error,
        "flips": compared.flips,
        "right_to_wrong": compared.right_to_wrong,
        "wrong_to_right": compared.wrong_to_right,
        "mean_kl": compared.mean_kl,
    }
