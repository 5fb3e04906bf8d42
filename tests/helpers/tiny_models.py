"""Models of a few thousand random weights, one for each architecture, with a batch of data for each."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

VOCABULARY, LENGTH, LABELS, IMAGE = 96, 8, 3, 32

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class TinyModel:
    """An architecture, small: `build` makes the model, `batch` its arguments with labels."""

    auto_class: Any
    model_class: type[hf.PreTrainedModel]
    config: hf.PreTrainedConfig
    make_batch: Callable[[int, int], Batch]

    def build(self, seed: int = 0) -> hf.PreTrainedModel:
        """The model in evaluation mode, with activations and scores of order one, that differ from row to row."""
        torch.manual_seed(seed)
        model = self.model_class(copy.deepcopy(self.config)).eval()  # models write what they learn into theirs
        for module in model.modules():  # as transformers makes them, signals fade on the way, some to 1e-27
            if isinstance(module, nn.Linear | nn.Conv2d | hf.pytorch_utils.Conv1D):
                is_transposed = isinstance(module, hf.pytorch_utils.Conv1D)
                nn.init.kaiming_normal_(module.weight, mode="fan_out" if is_transposed else "fan_in")
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # they start at zero, where a lost one would not be missed
                nn.init.normal_(parameter, std=0.1)
        return model

    def batch(self, rows: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32) -> Batch:
        """Arguments with labels; real numbers (pixels) in `dtype`."""
        batch = self.make_batch(rows, seed)
        return {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}

    def inputs(self, rows: int = 3, seed: int = 1, dtype: torch.dtype = torch.float32) -> Batch:
        return {name: value for name, value in self.batch(rows, seed, dtype).items() if name != "labels"}


def _ids(rows: int, seed: int) -> Tensor:
    return torch.randint(5, VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


def _text(rows: int, seed: int) -> Batch:
    mask = torch.ones(rows, LENGTH, dtype=torch.long)
    mask[0, -2:] = 0
    return {"input_ids": _ids(rows, seed), "attention_mask": mask, "labels": torch.arange(rows) % LABELS}


def _language(rows: int, seed: int) -> Batch:
    ids = _ids(rows, seed)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def _translation(rows: int, seed: int) -> Batch:
    ids = _ids(rows, seed)
    return {"input_ids": ids, "decoder_input_ids": ids.flip(1), "labels": ids}


def _image(rows: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(rows, 3, IMAGE, IMAGE, generator=generator)
    pixels += torch.randn(rows, 3, 1, 1, generator=generator)  # brightness, for networks that take means over pixels
    return {"pixel_values": pixels, "labels": torch.arange(rows) % LABELS}


_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 16,
    "pad_token_id": 1,
    "num_labels": LABELS,
}
_PATCHES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": IMAGE,
    "patch_size": 8,
    "num_labels": LABELS,
}
_DECODER = {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
_GPT2 = hf.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=32, **_DECODER)


_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    **_DECODER,
}
_BART = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 32,
}


TINY_MODELS = {
    "bert": TinyModel(
        hf.AutoModelForSequenceClassification,
        hf.BertForSequenceClassification,
        hf.BertConfig(**_ENCODER),
        _text,
    ),
    "bert-mlm": TinyModel(hf.AutoModelForMaskedLM, hf.BertForMaskedLM, hf.BertConfig(**_ENCODER), _language),
    "distilbert": TinyModel(
        hf.AutoModelForSequenceClassification,
        hf.DistilBertForSequenceClassification,
        hf.DistilBertConfig(
            vocab_size=VOCABULARY,
            dim=32,
            n_layers=2,
            n_heads=2,
            hidden_dim=48,
            max_position_embeddings=16,
            num_labels=LABELS,
        ),
        _text,
    ),
    "roberta": TinyModel(
        hf.AutoModelForSequenceClassification,
        hf.RobertaForSequenceClassification,
        hf.RobertaConfig(**_ENCODER),
        _text,
    ),
    "mpnet": TinyModel(
        hf.AutoModelForSequenceClassification,
        hf.MPNetForSequenceClassification,
        hf.MPNetConfig(**_ENCODER),
        _text,
    ),
    "nomic-bert": TinyModel(  # on the Hub its q, k and v are one tensor, and its base model has no pooler
        hf.AutoModelForSequenceClassification,
        hf.NomicBertForSequenceClassification,
        hf.NomicBertConfig(**_ENCODER),
        _text,
    ),
    "vit": TinyModel(
        hf.AutoModelForImageClassification, hf.ViTForImageClassification, hf.ViTConfig(**_PATCHES), _image
    ),
    "deit": TinyModel(
        hf.AutoModelForImageClassification, hf.DeiTForImageClassification, hf.DeiTConfig(**_PATCHES), _image
    ),
    "resnet": TinyModel(
        hf.AutoModelForImageClassification,
        hf.ResNetForImageClassification,
        hf.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=LABELS),
        _image,
    ),
    "convnext": TinyModel(
        hf.AutoModelForImageClassification,
        hf.ConvNextForImageClassification,
        hf.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=IMAGE, num_labels=LABELS),
        _image,
    ),
    "mobilenet-v2": TinyModel(
        hf.AutoModelForImageClassification,
        hf.MobileNetV2ForImageClassification,
        hf.MobileNetV2Config(depth_multiplier=0.1, image_size=IMAGE, num_labels=LABELS),
        _image,
    ),
    "efficientnet": TinyModel(
        hf.AutoModelForImageClassification,
        hf.EfficientNetForImageClassification,
        hf.EfficientNetConfig(
            image_size=IMAGE,
            width_coefficient=0.25,
            depth_coefficient=1.0,
            hidden_dim=320,
            kernel_sizes=[3, 5],
            in_channels=[32, 16],
            out_channels=[16, 24],
            strides=[1, 2],
            num_block_repeats=[1, 2],
            expand_ratios=[1, 4],
            depthwise_padding=[],
            num_labels=LABELS,
        ),
        _image,
    ),
    "gpt2": TinyModel(hf.AutoModelForCausalLM, hf.GPT2LMHeadModel, _GPT2, _language),
    "llama": TinyModel(hf.AutoModelForCausalLM, hf.LlamaForCausalLM, hf.LlamaConfig(**_LLAMA), _language),
    "llama-tied": TinyModel(
        hf.AutoModelForCausalLM, hf.LlamaForCausalLM, hf.LlamaConfig(**_LLAMA, tie_word_embeddings=True), _language
    ),
    "mixtral": TinyModel(  # on the Hub every expert's matrices are tensors of their own
        hf.AutoModelForCausalLM,
        hf.MixtralForCausalLM,
        hf.MixtralConfig(**_LLAMA, num_local_experts=2, output_router_logits=True),
        _language,
    ),
    "t5": TinyModel(
        hf.AutoModelForSeq2SeqLM,
        hf.T5ForConditionalGeneration,
        hf.T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=16,
            d_ff=48,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
        ),
        _translation,
    ),
    "bart": TinyModel(
        hf.AutoModelForSeq2SeqLM,
        hf.BartForConditionalGeneration,
        hf.BartConfig(**_BART),
        _translation,
    ),
    "marian": TinyModel(  # computes its positions anew and does not save them
        hf.AutoModelForSeq2SeqLM,
        hf.MarianMTModel,
        hf.MarianConfig(**_BART, pad_token_id=0, decoder_start_token_id=0),
        _translation,
    ),
}
