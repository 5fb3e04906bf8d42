"""The command line: compress, evaluate, inspect, neighbourhood, demo."""

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from hf_lossless.calibration.data import calibration_batches
from hf_lossless.calibration.processes import process_state
from hf_lossless.checkpoint import new_folder, read_entry, refuse_occupied, refuse_other_bytes
from hf_lossless.config import THEORIES, LosslessCheckpointConfig, LosslessCompressionConfig
from hf_lossless.demo import run_demo
from hf_lossless.errors import CheckpointError, ConfigurationError, LosslessError, reason
from hf_lossless.evaluation import Evaluation, evaluate
from hf_lossless.layers import find_layers
from hf_lossless.pipeline import tensor_bytes
from hf_lossless.report import comparison_table, inspection, plan_table
from hf_lossless.report_neighbourhood import gap_tables, layer_table, plot_neighbourhood
from hf_lossless.tasks.base import Task
from hf_lossless.tasks.registry import TASKS, task_named, task_of_class
from hf_lossless.theories.neighbourhood import MAX_LAYERS, named_layers, neighbourhood, spread_layers

app = typer.Typer(
    help="Loss-preserving compression of Hugging Face checkpoints.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
_console = Console()

_Data = Annotated[str, typer.Option("--data", help="A json, jsonl, csv or parquet file, a saved dataset, or a Hub id.")]
_Split = Annotated[str | None, typer.Option("--split", help="Which split of a dataset that has several.")]
_TaskName = Annotated[str | None, typer.Option("--task", help=f"{' or '.join(TASKS)}; default: by the model's class.")]
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
    ratio: Annotated[float | None, typer.Option(help="Target: at least so many times smaller.")] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Target: at most so many bytes.")] = None,
    loss_budget: Annotated[float | None, typer.Option(help="Target: predicted rise of the loss, at most.")] = None,
    bits: Annotated[str, typer.Option(help="Widths to choose from; 16 keeps a layer.")] = "2,3,4,8,16",
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
        activation_bits=_activation_widths(activation_bits),
        ratio=ratio,
        max_bytes=max_bytes,
        loss_budget=loss_budget,
        bits=_widths(bits),
        group_size=group_size or None,
        symmetric=not asymmetric,
        ranks=_ranks(ranks or []),
        modules_to_not_convert=skip or (),
        keep_head=keep_head,
        num_samples=samples,
        seed=seed,
    )
    chosen_task = _task(model, task)
    _refuse_quantised(model)
    compressed: Any = _load_model(chosen_task, model, quantization_config=config)
    if process_state().is_main_process:
        with new_folder(out) as folder:
            compressed.save_pretrained(folder)
            chosen_task.load_processor(model).save_pretrained(folder)
        result = compressed.hf_quantizer.result
        _console.print(plan_table(result.plan))
        _console.print(
            f"{out}: {result.size_bytes:,} bytes, {result.ratio:.2f} times smaller; "
            f"predicted change of the loss {result.plan.predicted_loss_change:+.4f}, measured on the calibration rows "
            f"{result.measured_loss_change:+.4f}. "
            "Judge it on rows it has not seen: hf-lossless evaluate",
            soft_wrap=True,
        )


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
    tasks = {name: _task(path, task) for name, path in models.items()}  # both, before the first takes its time
    rows = {name: _evaluated(path, data, tasks[name], split) for name, path in models.items()}
    if as_json:
        values = [_evaluation_json(*row) for row in rows.values()]
        _print_json({**values[0], "original": values[1]} if against is not None else values[0])
    else:
        _, _, original_bytes = next(iter(rows.values()))
        sizes = {name: (result, size_bytes) for name, (result, size_bytes, _) in rows.items()}
        _console.print(comparison_table(sizes, original_bytes))


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A compressed checkpoint.")],
    as_json: _Json = False,
) -> None:
    """Show what a compressed checkpoint consists of."""
    config = read_entry(folder)
    refuse_other_bytes(config.plan, sorted(folder.glob("*.safetensors")))
    values = inspection(config)
    if as_json:
        _print_json(values)
    else:
        _console.print(plan_table(config.plan))
        _console.print(f"{values['size_bytes']:,} bytes, {values['ratio']:.2f} times smaller")


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
    # Of the configuration of a compression only what concerns rows is used; one target must be given, any.
    config = LosslessCompressionConfig(
        dataset=data, split=split, task=task, num_samples=samples, seed=seed, loss_budget=0.0
    )
    chosen_task = _task(model, task)
    _refuse_quantised(model)
    loaded = _load_model(chosen_task, model, dtype=torch.float32)  # the rounding of 16 bits would drown small noise
    layers = find_layers(loaded)
    layers = named_layers(layers, layer) if layer else spread_layers(layers)
    batches = calibration_batches(loaded, config)
    silent = {} if process_state().is_main_process else {"disable": True}  # None would override TQDM_DISABLE
    with tqdm(total=len(layers), desc="layers", **silent) as bar:
        found = neighbourhood(loaded, batches, layers, seed=seed, advance=bar.update)
    if not process_state().is_main_process:
        return
    values = {"model": model, "data": data, **found.to_dict()}
    if out is not None:
        with new_folder(out) as folder:
            (folder / "neighbourhood.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
            plot_neighbourhood(found, folder / "neighbourhood.png")
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


def _widths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigurationError(
            f"--bits {text!r} is not a list of widths. Write for example --bits 2,3,4,8,16"
        ) from error


def _activation_widths(text: str) -> tuple[int | None, ...]:
    try:
        return tuple(None if part.strip() == "none" else int(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigurationError(
            f"--activation-bits {text!r} is not a list of widths. Write for example --activation-bits none,8"
        ) from error


def _ranks(texts: list[str]) -> Literal["auto"] | dict[str, tuple[int, ...]] | None:
    if texts == ["auto"]:
        return "auto"
    ranks: dict[str, tuple[int, ...]] = {}
    for text in texts:
        name, _, numbers = text.rpartition("=")
        try:
            given = tuple(int(part) for part in numbers.split(",")) if name else ()
        except ValueError:
            given = ()
        if not given:
            raise ConfigurationError(
                f"--ranks {text!r} is neither auto alone nor a layer with its ranks. "
                "Write for example --ranks auto, or --ranks classifier=8,16"
            )
        ranks[name] = (*ranks.get(name, ()), *given)
    return ranks or None


def _task(model: str, name: str | None) -> Task:
    """The task named, or that of the model; the model must be there and have a head for it."""
    architecture = next(iter(_config(model).architectures or ()), None)
    if name is None and architecture is None:
        raise ConfigurationError(f"the config.json of {model} names no architecture. Name the task with --task.")
    task = task_named(name) if name is not None else task_of_class(str(architecture))
    if architecture is not None and task.head not in architecture:
        raise ConfigurationError(
            f"{model} is a {architecture}, which does not do the task {task.name}: a new head would be random. "
            f"Take a checkpoint of a class ...{task.head}."
        )
    return task


def _refuse_quantised(model: str) -> None:
    """Before any weight is read; inside from_pretrained it is transformers that refuses."""
    method = getattr(_config(model), "quantization_config", None)
    if method is not None:
        name = method.get("quant_method") if isinstance(method, dict) else method.quant_method
        raise ConfigurationError(f"{model} is quantised already ({name}). Compress the original checkpoint instead.")


def _config(model: str) -> PreTrainedConfig:
    """A model's config.json."""
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(model)
        return config
    except LosslessError:
        raise
    except (OSError, ValueError) as error:
        what = "the folder" if Path(model).is_dir() else "no folder here, and on the Hub"
        raise CheckpointError(
            f"the config.json of {model} ({what}) cannot be read: {reason(error)}. "
            "Give a folder written by save_pretrained, or a Hub id."
        ) from error


def _load_model(task: Task, model: str, **kwargs: Any) -> PreTrainedModel:
    try:
        return task.load_model(model, **kwargs)
    except SafetensorError as error:
        raise CheckpointError(
            f"the weights of {model} cannot be read: {reason(error)}. Take the folder again from where it came from."
        ) from error


def _evaluated(model: str, data: str, task: Task, split: str | None) -> tuple[Evaluation, int, int]:
    """Evaluation, bytes now, and bytes of the original."""
    loaded = _load_model(task, model)
    result = evaluate(loaded, data, task, task.load_processor(model), split)
    return result, *_sizes(loaded)


def _sizes(model: PreTrainedModel) -> tuple[int, int]:
    config = getattr(model.config, "quantization_config", None)
    if isinstance(config, LosslessCheckpointConfig):
        return config.size_bytes, config.plan.original_bytes
    size_bytes = tensor_bytes(model)
    return size_bytes, size_bytes


def _evaluation_json(evaluation: Evaluation, size_bytes: int, original_bytes: int) -> dict[str, Any]:
    return {
        "loss": evaluation.loss,
        evaluation.metric_name: evaluation.metric,
        "num_examples": evaluation.num_examples,
        "size_bytes": size_bytes,
        "ratio": original_bytes / size_bytes,
    }


def _print_json(values: dict[str, Any]) -> None:
    print(json.dumps(values, indent=2))
