"""LoRA of peft on every kind of compressed layer: trained, saved, loaded; merging is refused."""

from pathlib import Path

import pytest
import torch
import transformers as hf
from new_process import run_python
from tiny_models import TINY_MODELS
from torch import Tensor, nn

from hf_lossless import ConfigurationError, LosslessCompressionConfig, compress
from hf_lossless.storage.modules.base import CompressedModule

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

EVERY_LAYER = {"bits": (4,), "loss_budget": 1e9}
KINDS = {  # model, layers to adapt, how they are compressed
    "linear": ("bert", ["query", "value"], EVERY_LAYER),
    "conv1d": ("gpt2", ["c_attn", "c_fc"], EVERY_LAYER),
    "conv2d": ("resnet", ["convolution"], EVERY_LAYER),
    "embedding": ("bert", ["word_embeddings"], EVERY_LAYER),
    "coded": ("bert", ["query", "word_embeddings"], {"storage": "entropy", "bits": (4,), "loss_budget": 1e9}),
    "ranks": ("bert", ["query", "word_embeddings"], {"bits": (4,), "ranks": "auto", "ratio": 5}),
    "tied": ("bert-mlm", ["decoder", "word_embeddings"], EVERY_LAYER),
}


def saved(folder: Path, name: str, settings: dict) -> hf.PreTrainedModel:
    tiny = TINY_MODELS[name]
    model = tiny.build()
    compress(model, [tiny.batch()], LosslessCompressionConfig(**settings))
    model.save_pretrained(folder)
    return tiny.auto_class.from_pretrained(folder)


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def trained(model: nn.Module, batch: dict[str, Tensor]) -> nn.Module:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=5.0)
    for _ in range(2):  # B is zero at first, so that A has no gradient in the first step
        optimizer.zero_grad()
        model(**batch).loss.backward()
        assert all(parameter.grad is not None for parameter in parameters)
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_train_save_load(tmp_path: Path, kind: str):
    name, targets, settings = KINDS[kind]
    tiny, model = TINY_MODELS[name], saved(tmp_path / "small", name, settings)
    before = logits(model, tiny.inputs())
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, fan_in_fan_out=kind == "conv1d"))
    assert torch.equal(logits(adapted, tiny.inputs()), before)  # B is zero
    found = [module for module in adapted.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    assert found and all("hf_lossless" in type(module).__module__ for module in found)

    after = logits(trained(adapted, tiny.batch()), tiny.inputs())
    assert not torch.equal(after, before)
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(tiny.auto_class.from_pretrained(tmp_path / "small"), tmp_path / "adapter")
    assert torch.equal(logits(again, tiny.inputs()), after)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted, tiny.inputs()), before)

    for merge in (adapted.merge_and_unload, adapted.merge_adapter):
        with pytest.raises(ConfigurationError, match=r"cannot be merged into a compressed layer.*compress that"):
            merge()
    assert torch.equal(logits(adapted, tiny.inputs()), after)
    assert torch.equal(logits(adapted.unload(), tiny.inputs()), before)


def test_head_that_is_trained_in_full_is_a_plain_layer(tmp_path: Path):
    tiny, model = TINY_MODELS["bert"], saved(tmp_path / "small", "bert", EVERY_LAYER)
    assert isinstance(model.classifier, CompressedModule)
    before = logits(model, tiny.inputs())
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query"])
    adapted = peft.get_peft_model(model, config)
    head = adapted.base_model.model.classifier.modules_to_save["default"]
    assert type(head) is nn.Linear and head.weight.requires_grad
    assert torch.equal(logits(adapted, tiny.inputs()), before)
    old = head.weight.detach().clone()
    after = logits(trained(adapted, tiny.batch()), tiny.inputs())
    assert not torch.equal(head.weight, old)
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(tiny.auto_class.from_pretrained(tmp_path / "small"), tmp_path / "adapter")
    assert torch.equal(logits(again, tiny.inputs()), after)


def test_initialisation_that_changes_the_weight_is_refused(tmp_path: Path):
    model = saved(tmp_path, "bert", EVERY_LAYER)
    config = peft.LoraConfig(r=4, target_modules=["query"], init_lora_weights="pissa")
    with pytest.raises(ConfigurationError, match="would write to the weight of a compressed layer"):
        peft.get_peft_model(model, config)


def test_adapter_of_transformers_itself(tmp_path: Path):
    tiny, model = TINY_MODELS["bert"], saved(tmp_path / "small", "bert", EVERY_LAYER)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["query"], init_lora_weights=False))
    after = logits(model, tiny.inputs())
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "config.json").exists()
    again = tiny.auto_class.from_pretrained(tmp_path / "small")
    again.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(again, tiny.inputs()), after)


def test_peft_may_be_imported_first():
    code = (
        "import peft, hf_lossless\n"
        "from peft.tuners.lora.model import LoraModel\n"
        "assert hasattr(LoraModel._create_new_module, '__wrapped__')"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
