"""`LosslessCompressionConfig`: the configuration of `from_pretrained(..., quantization_config=...)` and `compress()`.

It is flat for its users. Internally it is split into `Rows`, `Choices` and `Target`, which check their values.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any, Literal

from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_lossless.candidates.choices import Choices
from hf_lossless.certification.certificate import CONFIDENCE, METRIC_MARGIN
from hf_lossless.data.rows import Rows
from hf_lossless.errors import ConfigurationError
from hf_lossless.planning.target import Target
from hf_lossless.storage.plan import KEPT_BITS, QUANT_METHOD
from hf_lossless.storage.runtime.runtimes import Runtime
from hf_lossless.theories import THEORIES, Theory

_PARTS = (Rows, Choices, Target)
_NOT_SETTINGS = ("dataset", "selection_dataset", "certification_dataset", "processor")


class LosslessCompressionConfig(QuantizationConfigMixin):
    """The target, the choices and the data of a compression.

    Exactly one target is given: `tolerance`, `ratio`, `max_bytes` or `loss_budget`; without any it is
    `tolerance=0.01`. Only a tolerance gives a certificate: the search finds the smallest plan that held-out rows cannot
    distinguish from the original (see `certified_search`). The other targets are met by predictions, and no rows are
    held back.

    Args:
        dataset: Labelled rows: a datasets.Dataset, a DatasetDict (see `split`), a list of dicts, the path of a json,
            jsonl, csv or parquet file, of a saved dataset or of a folder of images, a Hub id; or ready batches of
            tensors (a list or a DataLoader). Rows without labels are calibrated on the model's own predictions.
        tolerance: Share of the original's mean loss by which the mean loss may rise; zero or below: it has to fall.
        confidence: Confidence of the certificate: 1 - the probability that a worse model is certified.
        metric_margin: How far the task's metric may fall, for the certificate; zero or below: it has to rise.
        selection_dataset: Rows on which plans are compared; None: a part of `dataset`, by a hash of the rows.
        certification_dataset: Rows that the certificate rests on; None: a part of `dataset` likewise. No row may be in
            the other data sets.
        ratio: Least ratio of the bytes of the original's tensors to those of the compressed model's tensors and plan.
        max_bytes: The most bytes that tensors and plan may take.
        loss_budget: The most that the loss may rise by prediction, in the loss's unit (nats).
        theory: Theory that predicts the loss changes: "llc", "lod", "cet", "hawq" or "curvature".
        activation_noise: Whether to count the noise of activations quantised to the width of their layer's weight, as
            LLC Algorithm 1 does. The run time keeps activations in floating point either way, and the plan says so.
        activation_bits: Widths, 2 to 8, that the input of a compressed layer may be quantised to at run time, simulated
            in floating point; None among them: it may stay in floating point. Each layer takes the narrowest that is
            predicted to cost no more than the rounding of its weight. Only with theory="curvature".
        bits: Widths to choose from, 1 to 8; 16 stands for keeping a layer unchanged.
        storage: Kinds of grids to choose from: "fixed", codes of the widths in `bits`; "entropy", steps shaped by the
            curvature and codes stored at their entropy, which takes a half of the bytes or less at the same loss, and
            longer to load. Only with theory="curvature"; needs the extra "entropy".
        group_size: Inputs that share a scale; None: one scale per output channel. Not of entropy-coded grids.
        symmetric: Symmetric grids, or grids with a zero point for each group.
        ranks: Low-rank factors to choose from as well: "auto", a ladder of ranks for every layer that includes its
            numerical rank; or ranks by layer, {"encoder.layer.0.output.dense": 32, "*.query": (16, 64)}, with the same
            patterns as modules_to_not_convert. Factors are in floating point, or have the widths in `bits` from 4 up.
            None: no factors.
        modules_to_not_convert: Modules that are not compressed: full names, last parts, parents' names or glob
            patterns.
        keep_head: Whether modules outside of the base model (classifier, language-model head) are not compressed.
        runtime: How the compressed model is computed, and so measured: "auto", "fast", "small" or "exact" (see
            storage/runtime/README.md). A certificate names it, and a reload takes the one that it names, unless the
            environment variable HF_LOSSLESS_RUNTIME says otherwise.
        num_samples: Rows to calibrate on, drawn with `seed`; fewer where the data has fewer. Ready batches are all
            used.
        batch_size: Rows in a calibration batch.
        split: Which split of a DatasetDict or of a Hub dataset.
        task: "text-classification", "image-classification", "question-answering", "multiple-choice", "text-generation"
            or "fill-mask"; None: by the model's class.
        processor: Tokenizer or image processor; None: the one saved with the model.
        seed: Seed of sampling and noise.

    Raises:
        ConfigurationError: A value is unknown or out of range, or more than one target is given.

    Example:
        >>> config = LosslessCompressionConfig(dataset=[{"text": "good", "label": 1}], ratio=8)
        >>> config.theory, config.bits
        ('curvature', (2, 3, 4, 8, 16))
        >>> LosslessCompressionConfig(dataset=[{"text": "good", "label": 1}]).tolerance
        0.01
    """

    def __init__(
        self,
        dataset: Any = None,
        *,
        tolerance: float | None = None,
        confidence: float = CONFIDENCE,
        metric_margin: float = METRIC_MARGIN,
        selection_dataset: Any = None,
        certification_dataset: Any = None,
        ratio: float | None = None,
        max_bytes: int | None = None,
        loss_budget: float | None = None,
        theory: str = "curvature",
        activation_noise: bool = False,
        activation_bits: Iterable[int | None] = (None,),
        bits: Iterable[int] = (2, 3, 4, 8, KEPT_BITS),
        storage: str | Iterable[str] = ("fixed",),
        group_size: int | None = 64,
        symmetric: bool = True,
        ranks: Literal["auto"] | Mapping[str, int | Iterable[int]] | None = None,
        modules_to_not_convert: Iterable[str] = (),
        keep_head: bool = False,
        runtime: Runtime = "auto",
        num_samples: int = 128,
        batch_size: int = 32,
        split: str | None = None,
        task: str | None = None,
        processor: Any = None,
        seed: int = 0,
    ) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # plug-ins use a plain string
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        self.theory = theory
        self.activation_noise = activation_noise
        for part in _PARTS:
            checked = part(**{name: given[name] for name in _names(part)})
            self.__dict__ |= {name: getattr(checked, name) for name in _names(part)}
        self._check_theory()
        unused = [name for name in ("selection_dataset", "certification_dataset") if given[name] is not None]
        if unused and self.target.tolerance is None:
            raise ConfigurationError(
                f"{unused[0]} is given, but only the target tolerance= makes a certificate. Leave it out, or the other "
                "target."
            )

    def _check_theory(self) -> None:
        if self.theory not in THEORIES:
            raise ConfigurationError(f"theory={self.theory!r} is unknown. Choose one of {', '.join(THEORIES)}.")
        theory, choices = THEORIES[self.theory], self.choices
        if self.activation_noise and "activation_noise" not in theory.options:
            raise ConfigurationError(
                f"activation_noise=True, but theory={self.theory!r} counts no noise of activations. "
                f"Leave it out, or take {_theories(lambda one: 'activation_noise' in one.options)}."
            )
        if choices.activation_widths and not theory.quantised_inputs:
            raise ConfigurationError(
                f"activation_bits={choices.activation_bits}, but theory={self.theory!r} cannot say what quantised "
                f"activations cost. Take {_theories(lambda one: one.quantised_inputs)}, or leave activation_bits out."
            )
        if "entropy" in choices.storage and not theory.coded:
            raise ConfigurationError(
                f"storage={choices.storage}, but theory={self.theory!r} cannot say what entropy-coded layers cost. "
                f'Take {_theories(lambda one: one.coded)}, or leave "entropy" out.'
            )

    @property
    def rows(self) -> Rows:
        """Returns the settings of the data."""
        return Rows(**{name: getattr(self, name) for name in _names(Rows)})

    @property
    def choices(self) -> Choices:
        """Returns the settings of the ways to store layers."""
        return Choices(**{name: getattr(self, name) for name in _names(Choices)})

    @property
    def target(self) -> Target:
        """Returns the settings of the target."""
        return Target(**{name: getattr(self, name) for name in _names(Target)})

    def __deepcopy__(self, memo: dict[int, Any]) -> "LosslessCompressionConfig":
        """Copies the settings and shares the data: auto classes copy their arguments, but generators have no copy."""
        twin = copy.copy(self)
        memo[id(self)] = twin
        return twin

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings without data and processor, JSON-ready."""
        settings = {key: value for key, value in self.__dict__.items() if key not in _NOT_SETTINGS}
        return {key: _json_ready(value) for key, value in settings.items()}


def _names(part: type[Rows] | type[Choices] | type[Target]) -> list[str]:
    return [field.name for field in fields(part)]


def _theories(has: Callable[[Theory], bool]) -> str:
    """Lists the theories with a property, in the form of the option."""
    return " or ".join(f'theory="{name}"' for name, theory in THEORIES.items() if has(theory))


def _json_ready(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _json_ready(one) for key, one in value.items()}
    return list(value) if isinstance(value, tuple) else value
