"""`compress`: from a model and its data to a compressed model, one straight line.

calibrate -> propose -> predict -> frontier -> choose -> apply
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_lossless import knapsack
from hf_lossless.apply import apply_plan
from hf_lossless.calibration.loss import Batch, LossFunction, batch_loss
from hf_lossless.calibration.perturbation import mean_loss
from hf_lossless.calibration.processes import own_share, process_state, same_in_every_process
from hf_lossless.calibration.statistics import Calibration, calibrate
from hf_lossless.candidates.activation_ranges import StaticGrid
from hf_lossless.candidates.low_rank import Factors
from hf_lossless.candidates.menu import Truncation, menu
from hf_lossless.candidates.parallel import for_each_layer
from hf_lossless.candidates.proposal import Candidate
from hf_lossless.candidates.ranks import ranks_by_layer
from hf_lossless.config import LosslessCheckpointConfig, LosslessCompressionConfig
from hf_lossless.errors import CalibrationError, ConfigurationError, DataError
from hf_lossless.layers import Layer, find_layers
from hf_lossless.modules.base import CompressedModule
from hf_lossless.plan import CompressionPlan, LayerPlan, activations_of
from hf_lossless.target import choose_plan
from hf_lossless.theories import cet, curvature, hawq, llc, lod
from hf_lossless.theories.activation_noise import ActivationOption, activation_options, choose_activation
from hf_lossless.theories.problem import Prediction, Problem


@dataclass(frozen=True)
class _Theory:
    """A theory, what it needs to know of the layers, and how it cuts a matrix to a rank."""

    predict: Callable[[Problem], dict[str, list[Prediction]]]
    truncation: Truncation
    gradients: bool = False
    gradients_for_ranks: bool = False
    curvature: bool = False
    by_derivatives: bool = False


_THEORIES = {
    "llc": _Theory(llc.predict, "plain", gradients_for_ranks=True),
    "lod": _Theory(lod.predict, "descent", gradients=True),
    "cet": _Theory(cet.predict, "plain", by_derivatives=True),
    "hawq": _Theory(hawq.predict, "plain", by_derivatives=True),
    "curvature": _Theory(curvature.predict, "metric", curvature=True, by_derivatives=True),
}


@dataclass(frozen=True)
class CompressionResult:
    """What `compress` gives back.

    Attributes:
        model: The compressed model: the very object that was passed in, its layers replaced.
        plan: What was chosen for each layer.
        frontier: Every plan that no other plan beats in both bytes and predicted loss.
        calibration: The statistics that the choice rests on.
        size_bytes: Bytes of the compressed model's tensors and plan.
        measured_loss_change: Change of the mean loss on the calibration rows, beside which the plan's
            `predicted_loss_change` can be judged. These rows have had a hand in the plan.
    """

    model: nn.Module
    plan: CompressionPlan
    frontier: knapsack.Frontier
    calibration: Calibration
    size_bytes: int
    measured_loss_change: float

    @property
    def ratio(self) -> float:
        """Bytes of the original model's tensors over `size_bytes`."""
        return self.plan.original_bytes / self.size_bytes


def compress(
    model: nn.Module,
    batches: Iterable[Batch],
    config: LosslessCompressionConfig,
    *,
    loss: LossFunction = batch_loss,
    original_bytes: int | None = None,
) -> CompressionResult:
    """Compresses a model in place, to the target of `config`.

    Args:
        model: Any module with layers (see `layers`); put in evaluation mode.
        batches: Calibration batches: mappings of the model's arguments with "labels", or pairs (inputs, targets). All
            are kept in memory. Under several processes, the same in each.
        config: Target, widths, theory. Its dataset is not read here.
        loss: Mean loss of a model on a batch.
        original_bytes: Bytes of the original's tensors, where the model was loaded in another dtype than its
            checkpoint's; None: those of the model as it is.

    Returns:
        The compressed model, its plan, the frontier. An error leaves the model as it was.

    Raises:
        ConfigurationError: The model is compressed already, or has no layers left to compress.
        DataError: There are no batches.
        CalibrationError: The loss is not finite, or cannot be computed.
        UnreachableTargetError: No plan meets the target; the message says what the best one reaches.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2))
        >>> batch = (torch.randn(8, 16), torch.randint(0, 2, (8,)))
        >>> result = compress(model, [batch], LosslessCompressionConfig(max_bytes=2000, bits=(4, 8)))
        >>> result.size_bytes <= 2000
        True
    """
    batches = same_in_every_process(list(batches))
    if not batches:
        raise DataError("there are no calibration batches. Give at least one.")
    theory = _THEORIES[config.theory]
    layers = _layers_to_compress(model, config)
    present_bytes = tensor_bytes(model)
    other_bytes = present_bytes - sum(layer.weight.nbytes for layer in layers)
    ranks = ranks_by_layer(layers, config.ranks)
    with _evaluation_mode(model):
        with _progress(len(own_share(batches)), "calibrating") as advance:
            calibration = calibrate(
                model,
                batches,
                layers,
                loss,
                advance,
                gradients=theory.gradients or (theory.gradients_for_ranks and bool(ranks)),
                curvature=theory.curvature,
                activation_bits=config.activation_widths,
            )
        candidates = menu(layers, calibration, config, ranks, theory.truncation, by_derivatives=theory.by_derivatives)
        with _progress(sum(map(len, candidates.values())), "predicting") as advance:
            predictions = theory.predict(
                Problem(
                    model,
                    batches,
                    loss,
                    layers,
                    calibration,
                    candidates,
                    seed=config.seed,
                    activation_noise=config.activation_noise,
                    advance=advance,
                )
            )
    activations = for_each_layer(
        lambda layer: activation_options(calibration.layers[layer.name], config.activation_widths), layers
    )
    options = {
        layer.name: _options(
            layer,
            candidates[layer.name],
            predictions[layer.name],
            activations[layer.name],
            may_stay_float=None in config.activation_bits,
        )
        for layer in layers
    }
    frontier = knapsack.frontier(
        costs=[[option.plan.cost_bytes for option in group] for group in options.values()],
        losses=[[option.plan.predicted_loss_change for option in group] for group in options.values()],
    )

    def plan_at(point: int) -> CompressionPlan:
        chosen = zip(options.items(), frontier.choices(point), strict=True)
        layer_plans = {name: group[choice].plan for (name, group), choice in chosen}
        return CompressionPlan(
            theory=config.theory,
            layers=layer_plans,
            other_bytes=other_bytes,
            original_bytes=present_bytes if original_bytes is None else original_bytes,
            activations=activations_of(layer_plans),
            activation_noise=config.activation_noise,
        )

    plan = choose_plan(frontier, plan_at, config)
    apply_plan(model, plan.layers, _factors(plan, options), _static_grids(plan, options))
    model.eval()
    size_bytes = LosslessCheckpointConfig.of(plan).size_bytes
    measured = mean_loss(model, batches, loss) - calibration.loss
    return CompressionResult(model, plan, frontier, calibration.without_tensors(), size_bytes, measured)


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of all tensors that a checkpoint of the model holds; shared ones once."""
    unsaved = getattr(model, "_keys_to_ignore_on_save", None) or ()
    storages = {
        (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape): tensor.nbytes
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, Tensor) and tensor.numel() and name not in unsaved
    }
    return sum(storages.values())


def _layers_to_compress(model: nn.Module, config: LosslessCompressionConfig) -> list[Layer]:
    if any(isinstance(module, CompressedModule) for module in model.modules()):
        raise ConfigurationError(
            f"this {type(model).__name__} is compressed already. Load the original checkpoint and compress that."
        )
    layers = find_layers(model, config.modules_to_not_convert)
    if config.keep_head:
        heads = set(_head_modules(model))
        layers = [
            layer for layer in layers if not any(name.split(".")[0] in heads for name in (layer.name, *layer.tied))
        ]
    if not layers:
        left_out = " beside modules_to_not_convert" if config.modules_to_not_convert else ""
        raise ConfigurationError(
            f"{type(model).__name__} has no layer that could be compressed (linear, convolution or embedding)"
            f"{left_out}. Leave fewer modules out."
        )
    return layers


def _head_modules(model: nn.Module) -> list[str]:
    """The children of a Hugging Face model that lie outside its base model; none where it is a base model."""
    base = getattr(model, "base_model", None)
    children = list(model.named_children())
    if base is None or (base is model and any(name == "lm_head" for name, _ in children)):
        raise ConfigurationError(
            f"keep_head=True, but {type(model).__name__} does not say which part of it is the base model. "
            "Name the head in modules_to_not_convert instead."
        )
    return [] if base is model else [name for name, child in children if child is not base]


@dataclass(frozen=True)
class _Option:
    """What the knapsack may choose for a layer, the values of its factors, and the static grid of its input."""

    plan: LayerPlan
    factors: Factors | None
    static: StaticGrid | None


def _options(
    layer: Layer,
    candidates: list[Candidate],
    predictions: list[Prediction],
    activations: list[ActivationOption],
    *,
    may_stay_float: bool,
) -> list[_Option]:
    """What the knapsack may choose from; a candidate that the theory refuses is none of it."""
    options = []
    for candidate, prediction in zip(candidates, predictions, strict=True):
        if prediction.usable:
            loss_change, cost_bytes, activation = prediction.loss_change, candidate.cost_bytes, None
            if candidate.kind != "kept":
                activation = choose_activation(activations, loss_change, may_stay_float=may_stay_float)
            if activation is not None:
                loss_change += activation.loss_change
                cost_bytes += activation.grid.stored_bytes
            layer_plan = LayerPlan(
                kind=candidate.kind,
                grid=candidate.grid,
                low_rank=candidate.low_rank,
                activation=None if activation is None else activation.grid,
                cost_bytes=cost_bytes,
                predicted_loss_change=float(f"{loss_change:.4g}"),  # what follows is noise, and costs bytes
                regime=prediction.regime,
                tied=layer.tied,
            )
            static = None if activation is None else activation.static
            options.append(_Option(layer_plan, candidate.factors, static))
    if not options:
        widths = [candidate.grid.bits for candidate in candidates if candidate.grid is not None]
        raise CalibrationError(
            f"layer {layer.name!r} can be stored in no way: at each of {widths} bits the loss is not finite, or the "
            "theory refuses. Add wider widths (16 keeps a layer), or keep this layer out with modules_to_not_convert."
        )
    return options


def _factors(plan: CompressionPlan, options: dict[str, list[_Option]]) -> dict[str, Factors]:
    """The values of the factors that a plan chose."""
    chosen = {name: option.factors for name, option in _chosen(plan, options).items()}
    return {name: factors for name, factors in chosen.items() if factors is not None}


def _static_grids(plan: CompressionPlan, options: dict[str, list[_Option]]) -> dict[str, StaticGrid]:
    """Where the levels of the static activations lie that a plan chose."""
    chosen = {name: option.static for name, option in _chosen(plan, options).items()}
    return {name: static for name, static in chosen.items() if static is not None}


def _chosen(plan: CompressionPlan, options: dict[str, list[_Option]]) -> dict[str, _Option]:
    return {
        name: next(option for option in options[name] if option.plan == layer_plan)
        for name, layer_plan in plan.layers.items()
    }


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off and batch norms frozen; every module's mode comes back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _progress(total: int, what: str) -> Iterator[Callable[[], object]]:
    """A progress bar with the time left, on the main process only."""
    silent = {} if process_state().is_main_process else {"disable": True}  # None would override TQDM_DISABLE
    with tqdm(total=total, desc=what, **silent) as bar:
        yield bar.update
