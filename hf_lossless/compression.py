"""`compress`: turns a model and its data into a compressed model, in one straight line.

analyse (calibrate -> propose -> predict) -> plan (frontier, target, round, check) -> realise (apply -> correct)
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from hf_lossless.calibration.batch_norms import batch_norms, follow, input_moments
from hf_lossless.calibration.biases import bias_corrections, correct_biases
from hf_lossless.calibration.fisher import fisher_batches, with_fisher
from hf_lossless.calibration.perturbation import LossChange, loss_change
from hf_lossless.calibration.statistics import Calibration, calibrate
from hf_lossless.candidates.choices import Choices
from hf_lossless.candidates.damping_choice import chosen_scale
from hf_lossless.candidates.propose import propose
from hf_lossless.candidates.ranks import ranks_by_layer
from hf_lossless.certification.certificate import Certificate
from hf_lossless.config import LosslessCompressionConfig
from hf_lossless.data.batches import Batch, LossFunction, batch_loss
from hf_lossless.data.processes import own_share, process_state, progress_bar, same_in_every_process
from hf_lossless.errors import ConfigurationError, DataError
from hf_lossless.planning import knapsack
from hf_lossless.planning.loss_check import LossCheck, loss_check
from hf_lossless.planning.planner import Planned, Planner
from hf_lossless.storage.apply import apply
from hf_lossless.storage.layers import Layer, find_layers, tensor_bytes
from hf_lossless.storage.modules.base import CompressedModule, compressed_layers
from hf_lossless.storage.plan import QUANT_METHOD, CompressionPlan, checkpoint_bytes
from hf_lossless.storage.runtime.optimize import optimize
from hf_lossless.storage.runtime.runtimes import Runtime
from hf_lossless.theories import THEORIES
from hf_lossless.theories.problem import Problem

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompressionResult:
    """The compressed model, with its plan, measurements and certificate.

    Attributes:
        model: The compressed model: the object that was passed in, with its layers replaced.
        plan: The chosen way to store each layer.
        frontier: Every plan that no other plan beats in both bytes and predicted loss.
        calibration: The statistics behind the choice.
        size_bytes: Bytes of the compressed model's tensors and plan.
        measured_loss_change: Measured change of the mean loss on the calibration rows, to compare with the plan's
            `predicted_loss_change`. The plan depends on these rows.
        checks: All measurements with their predictions, on the same rows; that of this model comes last.
        bound: The rate-distortion bound of bytes and predicted loss (see `theories.rate_distortion`), by ascending
            bytes; None where entropy coding was not among the choices.
        certificate: The certificate on held-out rows; None where the target was a size or a budget.
        not_smaller: Why no smaller plan is certified; None without a certificate.
    """

    model: nn.Module
    plan: CompressionPlan
    frontier: knapsack.Frontier
    calibration: Calibration
    size_bytes: int
    measured_loss_change: float
    checks: tuple[LossCheck, ...]
    bound: tuple[tuple[int, float], ...] | None = None
    certificate: Certificate | None = None
    not_smaller: str | None = None

    @property
    def ratio(self) -> float:
        """Returns the bytes of the original model's tensors over `size_bytes`."""
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
            are kept in memory. With several processes, the same in each.
        config: Target, widths, theory. Its dataset is not read here.
        loss: Mean loss of a model on a batch.
        original_bytes: Bytes of the original's tensors, where the model was loaded in another dtype than its
            checkpoint's; None: those of the given model.

    Returns:
        The compressed model, its plan and the frontier. An error before the plan is realised leaves the model
        unchanged.

    Raises:
        ConfigurationError: The model is compressed already, or has no layers left to compress; or the target is a
            tolerance, for which batches cannot be split.
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
    if config.target.tolerance is not None:
        raise no_rows_to_hold_back(config)
    with evaluation_mode(model):
        planner = analyse(model, batches, config, loss=loss, original_bytes=original_bytes)
        planned = planner.plan(config.target)
        measured = realise(model, planner.problem, planned, config.choices.runtime)
    model.eval()
    result = CompressionResult(
        model,
        planned.plan,
        planned.frontier,
        planner.problem.calibration.without_tensors(),
        checkpoint_bytes(planned.plan),
        measured.mean,
        checks_of(planner.problem, planned, measured),
        planner.bound(),
    )
    attach_quantizer(result)
    return result


def attach_quantizer(result: CompressionResult) -> None:
    """Tells a model of transformers, or those inside a model, of the plan, so that `save_pretrained` writes it.

    The plug-in lies above this room: it is asked for where transformers keeps it.
    """
    if any(isinstance(module, PreTrainedModel) for module in result.model.modules()):
        quantizer: Any = AUTO_QUANTIZER_MAPPING[QUANT_METHOD]
        quantizer.attach_result(result)


def checks_of(problem: Problem, planned: Planned, measured: LossChange) -> tuple[LossCheck, ...]:
    """Returns the checks made for a plan, followed by that of the model that `realise` made of it."""
    return (*planned.checks, loss_check(planned.plan, measured, len(problem.batches), checked="model"))


def no_rows_to_hold_back(config: LosslessCompressionConfig) -> ConfigurationError:
    """Makes the error for a tolerance where there are only batches."""
    return ConfigurationError(
        f"the target is tolerance={config.target.tolerance:g} (the default), which holds back rows for a certificate, "
        "and ready batches are no rows. Give one of ratio=, max_bytes=, loss_budget=; or, for a model of transformers, "
        "rows as dataset in from_pretrained(quantization_config=...)."
    )


def analyse(
    model: nn.Module,
    batches: Iterable[Batch],
    config: LosslessCompressionConfig,
    *,
    loss: LossFunction = batch_loss,
    original_bytes: int | None = None,
) -> Planner:
    """Calibrates a model and predicts the loss change of each way to store each of its layers, for plans of any size.

    Args:
        model: The model, in evaluation mode; unchanged afterwards.
        batches: As for `compress`.
        config: Widths, ranks and theory; its target is not used.
        loss: As for `compress`.
        original_bytes: As for `compress`.

    Raises:
        ConfigurationError: The model is compressed already, or has no layers left to compress.
        DataError: There are no batches.
        CalibrationError: The loss is not finite, or cannot be computed.
    """
    batches = same_in_every_process(list(batches))
    if not batches:
        raise DataError("there are no calibration batches. Give at least one.")
    theory, choices = THEORIES[config.theory], config.choices
    layers = _layers_to_compress(model, choices)
    present_bytes = tensor_bytes(model)
    ranks = ranks_by_layer(layers, choices.ranks)
    fisher = None
    if "entropy" in choices.storage and loss is batch_loss:
        fisher = fisher_batches(model, batches, config.rows.seed)
    num_passes = len(own_share(batches)) + (len(own_share(fisher.batches)) if fisher else 0)
    with progress_bar(num_passes, "calibrating") as advance:
        calibration = calibrate(
            model,
            batches,
            layers,
            loss,
            advance,
            gradients=theory.gradients or (theory.gradients_for_ranks and bool(ranks)),
            curvature=theory.curvature and fisher is None,
            activation_bits=choices.activation_widths,
        )
        if fisher is not None:
            calibration = with_fisher(calibration, model, fisher, layers, advance)
    damping_scale = chosen_scale(model, batches, layers, calibration) if fisher is not None else 1.0
    candidates = propose(
        layers,
        calibration,
        choices,
        ranks,
        theory.truncation,
        by_derivatives=theory.by_derivatives,
        damping_scale=damping_scale,
        seed=config.rows.seed,
    )
    with progress_bar(sum(map(len, candidates.values())), "predicting") as advance:
        problem = Problem(
            model,
            batches,
            loss,
            layers,
            calibration,
            candidates,
            seed=config.rows.seed,
            activation_noise=config.activation_noise,
            advance=advance,
        )
        predictions = theory.predict(problem)
    if process_state().is_main_process:
        _warn_of_kept(problem)
    return Planner(
        problem,
        predictions,
        checked=theory.by_derivatives,
        theory=config.theory,
        choices=choices,
        other_bytes=present_bytes - sum(layer.weight.nbytes for layer in layers),
        original_bytes=present_bytes if original_bytes is None else original_bytes,
    )


def _warn_of_kept(problem: Problem) -> None:
    """Warns of the layers that are kept for want of a gradient on the calibration rows."""
    if problem.unreached:
        _logger.warning("kept as they are, for no calibration row reaches them: %s", ", ".join(problem.unreached))
    if problem.underflown:
        _logger.warning(
            "kept as they are, for the gradient of the loss underflows there (float16 holds sizes from 6e-8, float32 "
            "from 1e-45): %s. Load the model in a wider dtype, or check the scale of its inputs and weights.",
            ", ".join(problem.underflown),
        )


def realise(model: nn.Module, problem: Problem, planned: Planned, runtime: Runtime = "exact") -> LossChange:
    """Applies a plan, and corrects biases and batch norms for the rounded weights.

    Args:
        model: The analysed model or a copy of it, in evaluation mode; changed in place.
        problem: The analysed problem.
        planned: The plan and its values.
        runtime: How the model is computed from now on, and in the measurement.

    Returns:
        The change of the mean loss on the calibration rows.
    """
    batches, loss = problem.batches, problem.loss
    corrections = bias_corrections(problem.model, problem.layers, problem.calibration, planned.error)
    moments = input_moments(model, batches, loss) if batch_norms(model) else None
    apply(model, planned.stored)
    correct_biases(model, corrections)
    if moments is not None:
        follow(model, batches, loss, moments)
    if compressed_layers(model):  # a plan may keep every layer
        optimize(model, runtime)
    return loss_change(model, batches, loss, problem.calibration.batch_losses)


def _layers_to_compress(model: nn.Module, choices: Choices) -> list[Layer]:
    if any(isinstance(module, CompressedModule) for module in model.modules()):
        raise ConfigurationError(
            f"this {type(model).__name__} is compressed already. Load the original checkpoint and compress that."
        )
    layers = find_layers(model, choices.modules_to_not_convert)
    if choices.keep_head:
        heads = set(_head_modules(model))
        layers = [
            layer for layer in layers if not any(name.split(".")[0] in heads for name in (layer.name, *layer.tied))
        ]
    for layer in layers:
        if layer.weight.is_meta or layer.weight.is_inference():
            what, remedy = "offloaded", "Put the whole model on its devices before it is compressed."
            if layer.weight.is_inference():
                what, remedy = "an inference tensor", "Load the model outside of torch.inference_mode()."
            raise ConfigurationError(
                f"the weight of layer {layer.name!r} is {what}, so it cannot be calibrated. {remedy}"
            )
    if not layers:
        left_out = " beside modules_to_not_convert" if choices.modules_to_not_convert else ""
        raise ConfigurationError(
            f"{type(model).__name__} has no layer that could be compressed (linear, convolution or embedding)"
            f"{left_out}. Leave fewer modules out."
        )
    return layers


def _head_modules(model: nn.Module) -> list[str]:
    """Lists the children of a Hugging Face model outside of its base model; none where it is a base model."""
    base = getattr(model, "base_model", None)
    children = list(model.named_children())
    if base is None or (base is model and any(name == "lm_head" for name, _ in children)):
        raise ConfigurationError(
            f"keep_head=True, but {type(model).__name__} does not say which part of it is the base model. "
            "Name the head in modules_to_not_convert instead."
        )
    return [] if base is model else [name for name, child in children if child is not base]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Puts a model in evaluation mode inside the context, and restores every module's mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
