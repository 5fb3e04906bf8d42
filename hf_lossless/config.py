"""The two configurations: what a user asks for, and what a compressed checkpoint says of itself.

`LosslessCompressionConfig` goes into `from_pretrained(..., quantization_config=...)` or `compress()`.
`LosslessCheckpointConfig` is what config.json then holds under "quantization_config". They are two classes because
they share nothing but their method's name, and because transformers refuses to load a checkpoint whose stored class is
another one than the class of the argument: that is what stops a model from being compressed twice.
"""

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_lossless.errors import ConfigurationError
from hf_lossless.storage.entropy.coder import require_coder
from hf_lossless.storage.plan import KEPT_BITS, QUANT_METHOD

STORAGES = ("fixed", "entropy")
THEORIES = ("llc", "lod", "cet", "hawq", "curvature")

_NOT_SETTINGS = ("dataset", "selection_dataset", "certification_dataset", "processor")

TOLERANCE = 0.01
"""Share of the original's loss by which the loss may rise, where no target is given."""

METRIC_MARGIN = 0.005
CONFIDENCE = 0.95

_SAY = {"ratio": "ratio=6", "max_bytes": "max_bytes=1_000_000", "loss_budget": "loss_budget=0.01"}


class LosslessCompressionConfig(QuantizationConfigMixin):
    """What to compress to, and with what data.

    Exactly one target is given: `tolerance`, `ratio`, `max_bytes` or `loss_budget`; without any it is
    `tolerance=0.01`. It alone asks for a certificate: the smallest plan is sought that rows not used before cannot tell
    from the original (see `certified`). The others are met by what is predicted, and no row is held back.

    Args:
        dataset: Labelled rows: a datasets.Dataset, a DatasetDict (see `split`), a list of dicts, the path of a json,
            jsonl, csv or parquet file, of a saved dataset or of a folder of images, a Hub id; or ready batches of
            tensors (a list or a DataLoader). Rows without labels are calibrated on the model's own predictions.
        tolerance: Share of the original's mean loss by which the mean loss may rise; zero or below: it has to fall.
        confidence: Of the certificate: 1 - the chance that a model which is worse by more is certified.
        metric_margin: How far the task's metric may fall, for the certificate; zero or below: it has to rise.
        selection_dataset: Rows on which plans are compared; None: a part of `dataset`, by a hash of the rows.
        certification_dataset: Rows that the certificate rests on; None likewise. None of its rows may be in the others.
        ratio: Bytes of the original model's tensors over bytes of the compressed one's tensors and plan, at least.
        max_bytes: The most bytes that tensors and plan may take.
        loss_budget: The most that the predicted loss may rise, in the loss's unit (nats).
        theory: What predicts the loss changes: "llc", "lod", "cet", "hawq" or "curvature".
        activation_noise: Count the noise of activations quantised to the width of their layer's weight, as LLC
            Algorithm 1 does. The run time keeps activations in floating point either way, and the plan says so.
        activation_bits: Widths, 2 to 8, that the input of a compressed layer may be quantised to at run time, simulated
            in floating point; None among them: it may stay in floating point. Each layer takes the narrowest that is
            predicted to cost no more than the rounding of its weight. Only with theory="curvature".
        bits: Widths to choose from, 1 to 8; 16 stands for keeping a layer as it is.
        storage: Kinds of grids to choose from: "fixed", codes of the widths in `bits`; "entropy", steps shaped by the
            curvature and codes stored at their entropy, which takes a half of the bytes or less at the same loss, and
            longer to load. Only with theory="curvature"; needs the extra "entropy".
        group_size: Inputs that share a scale; None: one scale per output channel. Not of entropy-coded grids.
        symmetric: Symmetric grids, or grids with a zero point for each group.
        ranks: Low-rank factors to choose from as well: "auto", a ladder of ranks for every layer, its numerical rank
            among them; or ranks by layer, {"encoder.layer.0.output.dense": 32, "*.query": (16, 64)}, with the same
            patterns as modules_to_not_convert. Factors are in floating point, or have the widths in `bits` from 4 up.
            None: no factors.
        modules_to_not_convert: Modules to leave alone: full names, last parts, parents' names or glob patterns.
        keep_head: Leave everything outside the base model (classifier, language-model head) alone.
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
        num_samples: int = 128,
        batch_size: int = 32,
        split: str | None = None,
        task: str | None = None,
        processor: Any = None,
        seed: int = 0,
    ) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # plug-ins use a plain string
        self.dataset = dataset
        self.tolerance = TOLERANCE if tolerance is ratio is max_bytes is loss_budget is None else tolerance
        self.confidence = confidence
        self.metric_margin = metric_margin
        self.selection_dataset = selection_dataset
        self.certification_dataset = certification_dataset
        self.ratio = ratio
        self.max_bytes = max_bytes
        self.loss_budget = loss_budget
        self.theory = theory
        self.activation_noise = activation_noise
        self.activation_bits = _activation_widths(activation_bits)
        self.bits = _widths(bits)
        self.storage = _storages(storage)
        self.group_size = group_size
        self.symmetric = symmetric
        self.ranks = _ranks(ranks)
        if isinstance(modules_to_not_convert, str):
            modules_to_not_convert = (modules_to_not_convert,)
        self.modules_to_not_convert = tuple(modules_to_not_convert or ())
        self.keep_head = keep_head
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.split = split
        self.task = task
        self.processor = processor
        self.seed = seed
        self._validate()

    def _validate(self) -> None:
        targets = {name: getattr(self, name) for name in ("tolerance", *_SAY)}
        given = {name: value for name, value in targets.items() if value is not None}
        if len(given) != 1:
            raise ConfigurationError(
                f"got several targets at once: {given}. Give exactly one of {', '.join(targets)}, or none: "
                f"tolerance={TOLERANCE} is the default."
            )
        self._validate_certificate()
        for name in _SAY.keys() & given.keys():
            value = given[name]
            # A budget of 0 is what "lossless" says.
            if not _is_finite(value) or value < 0 or (value == 0 and name != "loss_budget"):
                least = "of at least 0" if name == "loss_budget" else "above 0"
                raise ConfigurationError(
                    f"{name}={value!r} is not a finite number {least}. Give one, say {_SAY[name]}."
                )
        if self.theory not in THEORIES:
            raise ConfigurationError(f"theory={self.theory!r} is unknown. Choose one of {', '.join(THEORIES)}.")
        if self.activation_noise and self.theory != "llc":
            raise ConfigurationError(
                f"activation_noise=True, but theory={self.theory!r} counts no noise of activations. "
                'Leave it out, or take theory="llc".'
            )
        if self.activation_widths and self.theory != "curvature":
            raise ConfigurationError(
                f"activation_bits={self.activation_bits}, but theory={self.theory!r} cannot say what quantised "
                'activations cost. Take theory="curvature", or leave activation_bits out.'
            )
        if "entropy" in self.storage:
            if self.theory != "curvature":
                raise ConfigurationError(
                    f"storage={self.storage}, but theory={self.theory!r} cannot say what entropy-coded layers cost. "
                    'Take theory="curvature", or leave "entropy" out.'
                )
            require_coder()  # now, and not when the model has been calibrated
        for name, lowest in (("group_size", 1), ("num_samples", 1), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if name == "group_size" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
                raise ConfigurationError(f"{name}={value!r} is not a whole number of at least {lowest}. Give one.")

    def _validate_certificate(self) -> None:
        if self.tolerance is not None and not _is_finite(self.tolerance):
            raise ConfigurationError(
                f"tolerance={self.tolerance!r} is not a finite number. Give a share of the original's loss, say 0.01; "
                "zero or below demands that the loss falls."
            )
        if not _is_finite(self.confidence) or not 0 < self.confidence < 1:
            raise ConfigurationError(f"confidence={self.confidence!r} is not between 0 and 1. Give say 0.95.")
        if not _is_finite(self.metric_margin) or not -1 < self.metric_margin < 1:
            raise ConfigurationError(
                f"metric_margin={self.metric_margin!r} is not between -1 and 1. Metrics run from 0 to 1: half a point "
                "is 0.005."
            )
        unused = [name for name in ("selection_dataset", "certification_dataset") if getattr(self, name) is not None]
        if unused and self.tolerance is None:
            raise ConfigurationError(
                f"{unused[0]} is given, but only the target tolerance= makes a certificate. Leave it out, or the other "
                "target."
            )

    def with_target(self, **target: float) -> "LosslessCompressionConfig":
        """The same configuration with another target, say ratio=6."""
        twin = copy.copy(self)
        twin.tolerance = twin.ratio = twin.max_bytes = twin.loss_budget = None
        twin.selection_dataset = twin.certification_dataset = None
        for name, value in target.items():
            setattr(twin, name, value)
        twin._validate()
        return twin

    @property
    def activation_widths(self) -> tuple[int, ...]:
        """The widths among `activation_bits`."""
        return tuple(width for width in self.activation_bits if width is not None)

    def __deepcopy__(self, memo: dict[int, Any]) -> "LosslessCompressionConfig":
        """A copy that shares the data: auto classes copy their arguments, and a generator cannot be copied."""
        twin = copy.copy(self)
        memo[id(self)] = twin
        return twin

    def to_dict(self) -> dict[str, Any]:
        """The settings without data and processor; JSON-ready."""
        settings = {key: value for key, value in self.__dict__.items() if key not in _NOT_SETTINGS}
        return {key: _json_ready(value) for key, value in settings.items()}


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _json_ready(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _json_ready(one) for key, one in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _widths(bits: Any) -> tuple[int, ...]:
    """The widths, each once, in order."""
    widths = list(bits) if isinstance(bits, Iterable) else [bits]
    allowed = (*range(1, 9), KEPT_BITS)
    wrong = [width for width in widths if not isinstance(width, int) or isinstance(width, bool) or width not in allowed]
    if wrong or not widths:
        raise ConfigurationError(
            f"bits={bits!r} cannot be used{f' because of {wrong}' if wrong else ''}. "
            "Choose widths from 1 to 8, and 16 for keeping a layer, say bits=(2, 4, 8, 16)."
        )
    return tuple(sorted(set(widths)))


def _activation_widths(bits: Any) -> tuple[int | None, ...]:
    """None first where it is given, then the widths, each once, in order."""
    given = list(bits) if isinstance(bits, Iterable) and not isinstance(bits, str) else [bits]
    widths = [width for width in given if width is not None]
    wrong = [width for width in widths if type(width) is not int or not 2 <= width <= 8]
    if wrong or not given:
        raise ConfigurationError(
            f"activation_bits={bits!r} cannot be used{f' because of {wrong}' if wrong else ''}. "
            "Choose widths from 2 to 8, and None for floating point, say activation_bits=(None, 8)."
        )
    return (*((None,) if None in given else ()), *sorted(set(widths)))


def _storages(storage: Any) -> tuple[str, ...]:
    """The kinds of storage, each once, in their order."""
    given = [storage] if isinstance(storage, str) else list(storage) if isinstance(storage, Iterable) else [storage]
    wrong = [one for one in given if one not in STORAGES]
    if wrong or not given:
        raise ConfigurationError(
            f"storage={storage!r} cannot be used{f' because of {wrong}' if wrong else ''}. "
            f'Choose of {", ".join(STORAGES)}, say storage=("fixed", "entropy").'
        )
    return tuple(one for one in STORAGES if one in given)


def _ranks(ranks: Any) -> Literal["auto"] | dict[str, tuple[int, ...]] | None:
    """Ranks by layer name, each once, in order."""
    if ranks is None:
        return None
    if isinstance(ranks, str) and ranks == "auto":
        return "auto"
    remedy = 'Give "auto", or ranks by layer name, say ranks={"encoder.layer.0.output.dense": (16, 32)}.'
    if not isinstance(ranks, Mapping) or not ranks:
        raise ConfigurationError(f"ranks={ranks!r} cannot be used. {remedy}")
    by_name = {}
    for name, given in ranks.items():
        numbers = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
        wrong = [one for one in numbers if not isinstance(one, int) or isinstance(one, bool) or one < 1]
        if wrong or not numbers or not isinstance(name, str):
            raise ConfigurationError(
                f"ranks gives layer {name!r} the rank {given!r}: a rank is a whole number of at least 1. {remedy}"
            )
        by_name[name] = tuple(sorted(set(numbers)))
    return by_name
