"""A compressed model can be saved from any side; what could not be loaded again is refused when it is saved."""

import copy
from pathlib import Path

import accelerate
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from tiny_models import TINY_MODELS, TinyModel
from torch import Tensor, nn

from hf_lossless import CheckpointError, LosslessCompressionConfig, compress
from hf_lossless.storage.modules.base import CompressedModule, compressed_layers
from hf_lossless.storage.modules.tied import Tied

EVERY_LAYER = {"bits": (3,), "loss_budget": 1e9}


def compressed(name: str, **settings) -> tuple[TinyModel, hf.PreTrainedModel]:
    tiny = TINY_MODELS[name]
    model = tiny.build()
    compress(model, [tiny.batch()], LosslessCompressionConfig(**(settings or EVERY_LAYER)))
    return tiny, model


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("name", ["bert", "bert-mlm", "resnet", "gpt2", "nomic-bert", "t5", "mixtral"])
def test_compressed_in_place_then_saved(tmp_path: Path, name: str):
    tiny, model = compressed(name)
    model.save_pretrained(tmp_path)
    again, info = tiny.auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert torch.equal(logits(again, tiny.inputs()), logits(model, tiny.inputs()))
    assert compressed_layers(again).keys() == compressed_layers(model).keys()
    assert not any(info.values())


def test_loaded_then_compressed_in_place_then_saved(tmp_path: Path):
    """Nomic BERT's older names, which join q, k and v, are not those of its codes."""
    tiny = TINY_MODELS["nomic-bert"]
    tiny.build().save_pretrained(tmp_path / "original")
    model = tiny.auto_class.from_pretrained(tmp_path / "original")
    compress(model, [tiny.batch()], LosslessCompressionConfig(**EVERY_LAYER))
    model.save_pretrained(tmp_path / "small")
    again = tiny.auto_class.from_pretrained(tmp_path / "small")
    assert torch.equal(logits(again, tiny.inputs()), logits(model, tiny.inputs()))


def test_models_of_the_same_config_keep_apart(tmp_path: Path):
    tiny = TINY_MODELS["bert"]
    twin = tiny.build()
    model = tiny.model_class(twin.config).eval()
    compress(model, [tiny.batch()], LosslessCompressionConfig(**EVERY_LAYER))
    assert model.config is model.bert.config and model.config is not twin.config
    twin.save_pretrained(tmp_path)
    assert not hasattr(twin.config, "quantization_config")
    assert torch.equal(logits(tiny.auto_class.from_pretrained(tmp_path), tiny.inputs()), logits(twin, tiny.inputs()))


@pytest.mark.parametrize("road", ["in place", "reloaded"])
@pytest.mark.parametrize("name", ["bert", "bert-mlm", "gpt2"])
def test_base_model_saved_alone(tmp_path: Path, name: str, road: str):
    tiny, model = compressed(name)
    if road == "reloaded":
        model.save_pretrained(tmp_path / "whole")
        model = tiny.auto_class.from_pretrained(tmp_path / "whole")
    model.base_model.save_pretrained(tmp_path / "base")
    base, info = hf.AutoModel.from_pretrained(tmp_path / "base", output_loading_info=True)
    inputs = {"input_ids": tiny.inputs()["input_ids"]}
    with torch.no_grad():
        expected = model.base_model(**inputs).last_hidden_state
        assert torch.equal(base(**inputs).last_hidden_state, expected)
    newly_made = {"pooler.dense.weight", "pooler.dense.bias"} if name == "bert-mlm" else set()  # as of the original
    assert [set(found) for found in info.values()] == [newly_made, set(), set(), set()]
    assert base.config.quantization_config.plan.layers.keys() == compressed_layers(base).keys()

    model.save_pretrained(tmp_path / "after")  # the base model's plan is not left in the config that both share
    after = tiny.auto_class.from_pretrained(tmp_path / "after")
    assert torch.equal(logits(after, tiny.inputs()), logits(model, tiny.inputs()))


def test_model_of_transformers_inside_another_module(tmp_path: Path):
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = TINY_MODELS["bert"].build()

        def forward(self, ids: Tensor) -> Tensor:
            return self.inner(input_ids=ids).logits

    model, batch = Wrapper().eval(), TINY_MODELS["bert"].batch()
    compress(model, [(batch["input_ids"], batch["labels"])], LosslessCompressionConfig(**EVERY_LAYER))
    model.inner.save_pretrained(tmp_path)
    again = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(again, {"input_ids": batch["input_ids"]}), model(batch["input_ids"]))


def test_part_whose_weight_lies_elsewhere_is_refused(tmp_path: Path):
    _, model = compressed("t5")
    assert isinstance(model.encoder.embed_tokens, Tied)
    with pytest.raises(
        CheckpointError, match=r"'embed_tokens' computes with a weight that lies outside.*Save the whole"
    ):
        model.encoder.save_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_saved_again_in_another_dtype(tmp_path: Path, dtype: torch.dtype):
    tiny, model = compressed("bert")
    model.save_pretrained(tmp_path / "one")
    model.to(dtype).save_pretrained(tmp_path / "two")
    again = tiny.auto_class.from_pretrained(tmp_path / "two", dtype="auto")
    assert again.dtype == dtype
    assert torch.equal(logits(again, tiny.inputs()), logits(model, tiny.inputs()))


def test_layer_that_is_replaced_is_refused_when_saved(tmp_path: Path):
    _, model = compressed("bert")
    model.bert.pooler.dense = nn.Linear(32, 32)
    with pytest.raises(CheckpointError, match=r"compresses the layer 'bert\.pooler\.dense', which is a Linear now"):
        model.save_pretrained(tmp_path)
    del model.bert.pooler.dense
    with pytest.raises(CheckpointError, match=r"'bert\.pooler\.dense', which is not there any more"):
        model.save_pretrained(tmp_path)


def test_layer_that_the_plan_does_not_know_is_refused_when_saved(tmp_path: Path):
    _, model = compressed("bert")
    model.extra = copy.deepcopy(model.bert.pooler.dense)
    with pytest.raises(CheckpointError, match=r"'extra' is compressed, but its plan does not name it"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    "settings", [EVERY_LAYER, {"ranks": "auto", "bits": (3,), "loss_budget": 1e9}], ids=["3bit", "ranks"]
)
def test_guards_are_in_the_state_dict(settings: dict):
    _, model = compressed("bert", **settings)
    state = model.state_dict()
    for name, module in compressed_layers(model).items():
        assert state[f"{name}.weight"].shape == (0,) and state[f"{name}.weight"].dtype == torch.float32
        inner = [f"{name}.{part}" for part, one in module.named_modules() if part and isinstance(one, CompressedModule)]
        assert not {f"{part}.weight" for part in inner} & state.keys()


def test_state_dict_goes_back_and_forth():
    tiny, model = compressed("bert")
    state = copy.deepcopy(model.state_dict())
    expected = logits(model, tiny.inputs())
    for module in compressed_layers(model).values():
        module.scales.zero_()
    assert not torch.equal(logits(model, tiny.inputs()), expected)
    assert model.load_state_dict(state) == ([], [])
    assert torch.equal(logits(model, tiny.inputs()), expected)


@pytest.mark.parametrize("strict", [True, False])
def test_state_dict_of_the_other_kind_is_refused(strict: bool):
    tiny, model = compressed("bert")
    original = tiny.build()
    with pytest.raises(RuntimeError, match=r"size mismatch for bert.*shape torch.Size\(\[0\]\)"):
        original.load_state_dict(model.state_dict(), strict=strict)
    with pytest.raises(RuntimeError, match="that layer is compressed and takes no dense weight"):
        model.load_state_dict(original.state_dict(), strict=strict)


def test_checkpoint_of_a_trainer(tmp_path: Path):
    tiny, model = compressed("bert", bits=(3,), loss_budget=1e9, keep_head=True)
    batch = tiny.batch(rows=4)
    rows = [{name: value[row] for name, value in batch.items()} for row in range(4)]
    arguments = hf.TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=2, learning_rate=0.1, report_to=[], use_cpu=True, disable_tqdm=True
    )
    hf.Trainer(model, arguments, train_dataset=rows).train()
    again = tiny.auto_class.from_pretrained(tmp_path / "checkpoint-2")
    assert torch.equal(logits(again, tiny.inputs()), logits(model.eval(), tiny.inputs()))
    assert not torch.equal(again.classifier.bias, tiny.build().classifier.bias)  # the head was trained

    resumed = copy.deepcopy(model)
    resumed.classifier.bias.data.zero_()
    hf.Trainer(resumed, arguments, train_dataset=rows).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(logits(resumed.eval(), tiny.inputs()), logits(model, tiny.inputs()))


def test_saved_by_accelerate(tmp_path: Path):
    tiny, model = compressed("bert")
    accelerate.Accelerator(cpu=True).save_model(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["bert.pooler.dense.weight"].shape == (0,)
    twin = copy.deepcopy(model)
    twin.load_state_dict(tensors)
    assert torch.equal(logits(twin, tiny.inputs()), logits(model, tiny.inputs()))


def test_offloaded_to_the_cpu_and_saved(tmp_path: Path):
    tiny, model = compressed("bert")
    expected = logits(model, tiny.inputs())
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.warns(UserWarning, match="offloaded"):
        model.hf_device_map = {"": "cpu"}
        model.save_pretrained(tmp_path)
    again = tiny.auto_class.from_pretrained(tmp_path)
    assert torch.equal(logits(again, tiny.inputs()), expected)
