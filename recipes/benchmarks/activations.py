"""Quantised activations by themselves: weights stay in floating point. Writes activations.json.

    python recipes/benchmarks/activations.py [--assets DIR] [--models NAME ...]

Calibrated on 128 rows of the validation split, judged on other rows of it. First the inputs of all layers are quantised
together: divergence of the predicted classes from the original's (KL), loss, metric, and how many answers changed. Then
those of one layer at a time: Spearman's rank correlation of what was predicted with the divergence that was measured,
and the median of measured over predicted. A table of the first goes into recipes/README.md as well.
"""

import argparse
import json
import platform
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from assets import add_assets_option, assets_folder
from readme import write_part
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn.functional import nll_loss

import hf_lossless
from hf_lossless.calibration.statistics import calibrate
from hf_lossless.data.batches import Batch, batch_loss
from hf_lossless.data.rows import load_rows, make_batches
from hf_lossless.data.tasks.registry import TASKS
from hf_lossless.storage.layers import Layer, find_layers
from hf_lossless.storage.modules.activations import QuantisedInput
from hf_lossless.theories.quantised_inputs import ActivationOption, activation_options

_HERE = Path(__file__).resolve().parent
_WIDTHS = (4, 6, 8)
_CALIBRATION_ROWS, _ROWS, _ROWS_BY_LAYER = 128, 512, 128
_MODELS = {
    "minilm-sst2": ("text-classification", "minilm-sst2/validation.jsonl"),
    "vit-fashion-mnist": ("image-classification", "fashion-mnist/validation.parquet"),
    "resnet-fashion-mnist": ("image-classification", "fashion-mnist/validation.parquet"),
}


@contextmanager
def quantised(choices: dict[str, tuple[Layer, ActivationOption]]) -> Iterator[None]:
    """Quantises the inputs of these layers."""
    handles = []
    for layer, option in choices.values():
        module = QuantisedInput(layer.kind, option.grid, layer.weight.device)
        if option.static is not None:
            module.store(option.static.scale, option.static.zero)
        handles.append(layer.module.register_forward_pre_hook(_through(module)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _through(quantiser: nn.Module) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    return lambda module, arguments: (quantiser(arguments[0]), *arguments[1:])


def log_classes(model: nn.Module, batches: list[Batch]) -> Tensor:
    with torch.no_grad():
        outputs = [model(**{name: x for name, x in batch.items() if name != "labels"}).logits for batch in batches]
    return torch.cat(outputs).double().log_softmax(-1)


def divergence(original: Tensor, changed: Tensor) -> float:
    return (original.exp() * (original - changed)).sum(-1).mean().item()


def measure(name: str, assets: Path) -> dict[str, Any]:
    task_name, data = _MODELS[name]
    task = TASKS[task_name]
    model, processor = task.load_model(str(assets / name)).eval(), task.load_processor(str(assets / name))
    rows = load_rows(str(assets / data))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1)).tolist()
    ends = _CALIBRATION_ROWS, _CALIBRATION_ROWS + _ROWS
    calibration_rows, others = rows.select(sorted(order[: ends[0]])), rows.select(sorted(order[ends[0] : ends[1]]))
    few = others.select(range(_ROWS_BY_LAYER))
    batches = [list(make_batches(part, task, processor, model, 32)) for part in (calibration_rows, others, few)]
    labels = torch.cat([batch["labels"] for batch in batches[1]])
    layers = {layer.name: layer for layer in find_layers(model)}
    calibration = calibrate(model, batches[0], list(layers.values()), batch_loss, activation_bits=_WIDTHS)
    options = {layer: activation_options(found, _WIDTHS) for layer, found in calibration.layers.items()}
    options = {layer: group for layer, group in options.items() if group}
    original, original_of_few = log_classes(model, batches[1]), log_classes(model, batches[2])
    results: dict[str, Any] = {
        "loss": nll_loss(original, labels).item(),
        "metric": task.example_scores(original.argmax(-1), labels).double().mean().item(),
        "layers": len(options),
    }
    for index in range(2 * len(_WIDTHS)):
        grid = next(iter(options.values()))[index].grid
        choices = {layer: (layers[layer], group[index]) for layer, group in options.items()}
        with quantised(choices):
            changed = log_classes(model, batches[1])
        pairs = []
        for layer, choice in choices.items():
            with quantised({layer: choice}):
                pairs.append((choice[1].loss_change, divergence(original_of_few, log_classes(model, batches[2]))))
        results[f"{grid.bits} {grid.range}"] = {
            "divergence": divergence(original, changed),
            "loss_change": nll_loss(changed, labels).item() - results["loss"],
            "metric": task.example_scores(changed.argmax(-1), labels).double().mean().item(),
            "changed_answers": int((changed.argmax(-1) != original.argmax(-1)).sum()),
            "predicted": sum(predicted for predicted, _ in pairs),
            "rank_correlation": float(spearmanr(pairs).statistic),
            "measured_over_predicted": statistics.median(
                measured / predicted for predicted, measured in pairs if predicted
            ),
        }
        print(name, grid, results[f"{grid.bits} {grid.range}"], flush=True)
    return results


def summary(report: dict[str, Any]) -> str:
    """Divergence, change of the loss and changed answers with all inputs quantised, by model."""
    models = [name for name in _MODELS if name in report]
    lines = ["| | " + " | ".join(models) + " |", "|---" * (len(models) + 1) + "|"]
    for bits in sorted(_WIDTHS, reverse=True):
        for range_ in ("static", "dynamic"):
            rows = [report[name][f"{bits} {range_}"] for name in models]
            cells = [f"{row['divergence']:.4f} / {row['loss_change']:+.3f} / {row['changed_answers']}" for row in rows]
            lines.append(f"| {bits} bits, {range_} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_assets_option(parser)
    parser.add_argument("--models", nargs="+", default=list(_MODELS), choices=list(_MODELS))
    arguments = parser.parse_args()
    assets = assets_folder(parser, arguments)
    path = _HERE / "activations.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name in arguments.models:
        results[name] = measure(name, assets)
        results["environment"] = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "hf_lossless": hf_lossless.__version__,
            "machine": platform.machine(),
            "rows": {"calibration": _CALIBRATION_ROWS, "together": _ROWS, "one layer at a time": _ROWS_BY_LAYER},
        }
        path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    write_part("activations", summary(results))


if __name__ == "__main__":
    main()
