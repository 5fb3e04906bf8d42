"""What goes into a model's graph and comes out of it, under the names that optimum and transformers.js know."""

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_lossless.errors import ConfigurationError

_HEADS = {
    "ForSequenceClassification": ("logits",),
    "ForTokenClassification": ("logits",),
    "ForMaskedLM": ("logits",),
    "ForImageClassification": ("logits",),
    "ForQuestionAnswering": ("start_logits", "end_logits"),
    "ForCausalLM": ("logits",),
    "LMHeadModel": ("logits",),
}
"""Outputs by the end of a class's name; a base model's are below."""

_BASE = ("last_hidden_state", "pooler_output")
_TEXT_AXES = {0: "batch_size", 1: "sequence_length"}
_SIZE = 224
"""Pixels of a side, where neither config nor processor says."""


@dataclass(frozen=True)
class Signature:
    """A graph's inputs and outputs.

    Attributes:
        axes: Names of the axes that may have any length, by input.
        outputs: Names of the outputs, in their order.
        vocabulary: Number of tokens; 0 for images.
        longest: Tokens of the longest text; 0: there is no limit.
        image: (channels, height, width) of an image.
    """

    axes: dict[str, dict[int, str]]
    outputs: tuple[str, ...]
    vocabulary: int = 0
    longest: int = 0
    image: tuple[int, int, int] = (3, _SIZE, _SIZE)

    def example(self, rows: int, length: int, seed: int) -> dict[str, Tensor]:
        """Draws random inputs; of a text the second row, where there is one, is shorter by a third.

        Args:
            rows: Of the batch.
            length: Tokens of a text, cut to what the model takes.
            seed: Of the generator.
        """
        generator = torch.Generator().manual_seed(seed)
        if not self.vocabulary:
            return {"pixel_values": torch.randn(rows, *self.image, generator=generator)}
        length = min(length, self.longest or length)
        mask = torch.ones(rows, length, dtype=torch.int64)
        mask[1:2, length - length // 3 :] = 0
        values = {
            "input_ids": torch.randint(self.vocabulary, (rows, length), generator=generator),
            "attention_mask": mask,
            "token_type_ids": torch.zeros(rows, length, dtype=torch.int64),
        }
        return {name: values[name] for name in self.axes}


def signature_of(model: PreTrainedModel, folder: Path) -> Signature:
    """Finds the inputs and outputs of a model's graph.

    Args:
        model: The model.
        folder: Where its processor may lie, which says how large images are.

    Raises:
        ConfigurationError: It is of a kind that is not exported: encoder and decoder, or other inputs than one text or
            one image.
    """
    name, config = type(model).__name__, model.config
    outputs = next((found for end, found in _HEADS.items() if name.endswith(end)), None)
    if outputs is None:
        outputs = _BASE if name.endswith("Model") else None
    takes = inspect.signature(model.forward).parameters
    remedy = "Take another format."
    if config.is_encoder_decoder:
        raise ConfigurationError(
            f"{name} has an encoder and a decoder, whose graphs the format onnx does not make. {remedy}"
        )
    if outputs is None or model.main_input_name not in ("input_ids", "pixel_values"):
        raise ConfigurationError(
            f"the format onnx knows no outputs of a {name} with the input {model.main_input_name!r}. It knows base "
            f"models and {', '.join(_HEADS)} of one text or one image. {remedy}"
        )
    if model.main_input_name == "pixel_values":
        return Signature({"pixel_values": {0: "batch_size"}}, outputs, image=_image(config, folder))
    names = ["input_ids", "attention_mask"]
    if "token_type_ids" in takes and getattr(config, "type_vocab_size", 0) > 1:
        names.append("token_type_ids")
    padding = getattr(config, "pad_token_id", None) or 0  # RoBERTa's positions begin behind it
    positions = getattr(config, "max_position_embeddings", None) or 0
    longest = max(positions - padding - 1, 0)
    return Signature({name: _TEXT_AXES for name in names}, outputs, config.vocab_size, longest)


def _image(config: Any, folder: Path) -> tuple[int, int, int]:
    """Channels and sides of an image, as the config or else the processor says."""
    size = getattr(config, "image_size", None)
    path = folder / "preprocessor_config.json"
    if size is None and path.is_file():
        said = json.loads(path.read_text(encoding="utf-8"))
        size = said.get("crop_size") if said.get("do_center_crop") else said.get("size")
    if isinstance(size, dict):
        size = (size["height"], size["width"]) if "height" in size else size.get("shortest_edge", _SIZE)
    height, width = size if isinstance(size, list | tuple) else (size or _SIZE,) * 2
    return getattr(config, "num_channels", 3), height, width
