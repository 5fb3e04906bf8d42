"""Compress, save and reload through transformers, for every architecture and every way that transformers loads."""

import copy
import itertools
import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers as hf
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from round_trips import RoundTrip, assert_same_model, assert_same_outputs, outputs_of
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import TINY_MODELS, TinyModel
from torch import Tensor

from hf_lossless import CheckpointError, LosslessCompressionConfig
from hf_lossless.checkpoints.saved_folder import SavedFolder
from hf_lossless.data.batches import batch_loss
from hf_lossless.storage.layers import tensor_bytes
from hf_lossless.storage.modules.base import CompressedModule
from hf_lossless.storage.modules.tied import Tied, TiedEmbedding, TiedLinear
from hf_lossless.storage.packing import packed_width

ARCHITECTURES = list(TINY_MODELS)
CLASSIFIERS = [
    "bert",
    "distilbert",
    "roberta",
    "mpnet",
    "nomic-bert",
    "vit",
    "deit",
    "resnet",
    "convnext",
    "mobilenet-v2",
]
GENERATORS = ["gpt2", "llama", "llama-tied", "t5"]
TIED = ["bert-mlm", "gpt2", "llama-tied", "t5"]
ONE_OF_EACH_KIND = ["bert", "resnet", "gpt2"]

ANY_LOSS = 1e9
SETTINGS = {
    "3bit": {"bits": (3,), "loss_budget": ANY_LOSS},
    "mixed": {"bits": (2, 4, 16), "ratio": 1.3},
    "asymmetric": {"bits": (4,), "symmetric": False, "group_size": 8, "loss_budget": ANY_LOSS},
    "kept": {"bits": (16,), "loss_budget": ANY_LOSS},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
EVERY_ARCHITECTURE = [  # at both settings and in both dtypes, and some in all four ways
    pytest.param(name, setting, DTYPES[dtype], id=f"{name}-{setting}-{dtype}")
    for name in ARCHITECTURES
    for setting, dtype in itertools.product(("3bit", "mixed"), DTYPES)
    if name in ONE_OF_EACH_KIND or (setting, dtype) in (("3bit", "fp32"), ("mixed", "bf16"))
]


MakeRoundTrip = Callable[..., RoundTrip]


@pytest.fixture(scope="module")
def round_trip(tmp_path_factory: pytest.TempPathFactory) -> MakeRoundTrip:
    """Makes each round trip once. Tests must leave its models as they are."""
    made: dict[tuple, RoundTrip] = {}

    def make(name: str, setting: str = "3bit", dtype: torch.dtype = torch.float32) -> RoundTrip:
        if (name, setting, dtype) not in made:
            tiny, root = TINY_MODELS[name], tmp_path_factory.mktemp(f"{name}-{setting}")
            original, folder = root / "original", root / "compressed"
            tiny.build().to(dtype).save_pretrained(original)
            model = compress(tiny, original, dtype=dtype, **SETTINGS[setting])
            model.save_pretrained(folder)
            again, info = tiny.auto_class.from_pretrained(folder, output_loading_info=True)
            made[name, setting, dtype] = RoundTrip(tiny, original, model, folder, again, info, dtype)
        return made[name, setting, dtype]

    return make


def compress(
    tiny: TinyModel, original: Path, dtype: torch.dtype = torch.float32, device_map: str | None = None, **settings
) -> hf.PreTrainedModel:
    config = LosslessCompressionConfig(dataset=[tiny.batch(dtype=dtype)], **settings)
    return tiny.auto_class.from_pretrained(original, dtype=dtype, device_map=device_map, quantization_config=config)


def saved_tensors(folder: Path) -> dict[str, Tensor]:
    tensors = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}
    return tensors


def compressed_modules(model: torch.nn.Module) -> dict[str, CompressedModule]:
    return {name: module for name, module in model.named_modules() if isinstance(module, CompressedModule)}


@pytest.fixture
def load_warnings() -> Iterator[list[str]]:
    """What transformers logs as warnings; its logger does not propagate, so that caplog sees nothing."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    hf.logging.add_handler(handler)
    yield messages
    hf.logging.remove_handler(handler)


@pytest.mark.parametrize(("name", "setting", "dtype"), EVERY_ARCHITECTURE)
def test_reload_is_the_compressed_model(round_trip: MakeRoundTrip, name: str, setting: str, dtype: torch.dtype):
    trip = round_trip(name, setting, dtype)
    expected = outputs_of(trip.model, trip.inputs)
    assert_same_model(trip.again, trip.model, trip.inputs)
    assert expected.dtype == trip.again.dtype == dtype
    assert not any(trip.loading_info.values()), trip.loading_info

    twin = copy.deepcopy(trip.again)
    twin.tie_weights()
    assert_same_model(twin, trip.model, trip.inputs)
    for parameter in twin.parameters():
        parameter.data.zero_()
    for module in compressed_modules(twin).values():
        module.scales.zero_()
    assert_same_outputs(outputs_of(trip.again, trip.inputs), expected)  # the copy shares nothing


@pytest.mark.parametrize("setting", ["asymmetric", "kept"])
@pytest.mark.parametrize("name", [*ONE_OF_EACH_KIND, "bert-mlm", "llama-tied", "t5", "bart"])
def test_reload_of_other_plans(round_trip: MakeRoundTrip, name: str, setting: str):
    trip = round_trip(name, setting)
    assert_same_model(trip.again, trip.model, trip.inputs)
    assert not any(trip.loading_info.values()), trip.loading_info
    assert tensor_bytes(trip.again) == trip.plan.tensor_bytes


@pytest.mark.parametrize(
    ("name", "setting", "dtype"),
    [case for case in EVERY_ARCHITECTURE if "marian" not in case.values],  # its positions are not saved
)
def test_sizes_are_those_on_disk(round_trip: MakeRoundTrip, name: str, setting: str, dtype: torch.dtype):
    trip = round_trip(name, setting, dtype)
    result = trip.model.hf_quantizer.result
    assert trip.plan == trip.model.config.quantization_config.plan == result.plan
    assert result.plan.original_bytes == sum(tensor.nbytes for tensor in saved_tensors(trip.original).values())
    assert tensor_bytes(trip.again) == trip.plan.tensor_bytes
    assert sum(tensor.nbytes for tensor in saved_tensors(trip.folder).values()) == trip.plan.tensor_bytes

    text = (trip.folder / "config.json").read_text()
    values = json.loads(text)
    del values["quantization_config"]
    entry_bytes = len(text) - len(json.dumps(values, indent=2, sort_keys=True) + "\n")
    assert result.size_bytes == trip.plan.tensor_bytes + entry_bytes
    assert SavedFolder.read(trip.folder).entry.size_bytes == result.size_bytes
    if setting == "mixed":
        assert result.ratio >= SETTINGS["mixed"]["ratio"]


@pytest.mark.parametrize(("name", "setting", "dtype"), EVERY_ARCHITECTURE)
def test_planned_layers_are_compressed(round_trip: MakeRoundTrip, name: str, setting: str, dtype: torch.dtype):
    trip = round_trip(name, setting, dtype)
    parameters = {name for name, _ in trip.again.named_parameters(remove_duplicate=False)}
    stored = saved_tensors(trip.folder)
    for layer_name, layer_plan in trip.plan.layers.items():
        module = trip.again.get_submodule(layer_name)
        assert isinstance(module, CompressedModule) == (layer_plan.kind == "grid")
        if layer_plan.grid is None:
            continue
        assert f"{layer_name}.weight" not in parameters
        assert torch.equal(stored[f"{layer_name}.codes"], module.codes)  # under the plan's name, not an older one
        assert stored[f"{layer_name}.weight"].shape == (0,)
        rows = module.matrix_shape[0] if module.kind == "embedding" else 1
        codes_per_row = math.prod(module.matrix_shape) // rows
        assert module.codes.shape == (rows, packed_width(codes_per_row, layer_plan.bits))
        assert module.codes.nbytes == rows * math.ceil(codes_per_row / 8) * layer_plan.bits
        for tied_name in layer_plan.tied:
            assert isinstance(trip.again.get_submodule(tied_name), Tied)
            assert f"{tied_name}.weight" not in parameters
    if setting == "3bit":
        assert all(layer_plan.bits == 3 for layer_plan in trip.plan.layers.values())
        dense = {
            name
            for name, module in trip.again.named_modules()
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d | hf.pytorch_utils.Conv1D)
        }
        assert dense == ({"lm_head"} if name == "bart" else set())  # tied to embeddings that scale what they look up


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", GENERATORS)
def test_generate_gives_the_same_tokens(round_trip: MakeRoundTrip, name: str, dtype: torch.dtype):
    trip = round_trip(name, "mixed", dtype)
    inputs = {"input_ids": trip.inputs["input_ids"]}
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = trip.model.generate(**inputs, **settings)
    assert torch.equal(trip.again.generate(**inputs, **settings), expected)
    assert torch.equal(copy.deepcopy(trip.again).generate(**inputs, **settings), expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_shards(round_trip: MakeRoundTrip, tmp_path: Path, name: str):
    trip = round_trip(name, "mixed", torch.bfloat16)
    trip.model.save_pretrained(tmp_path, max_shard_size="2KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again, info = trip.tiny.auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert_same_model(again, trip.model, trip.inputs)
    assert not any(info.values()), info
    assert sum(tensor.nbytes for tensor in saved_tensors(tmp_path).values()) == trip.plan.tensor_bytes


@pytest.mark.parametrize("name", [*ONE_OF_EACH_KIND, "nomic-bert", "llama-tied", "mixtral", "t5"])
def test_device_map_auto(round_trip: MakeRoundTrip, tmp_path: Path, name: str):
    trip = round_trip(name)
    model = compress(trip.tiny, trip.original, device_map="auto", **SETTINGS["3bit"])
    assert_same_model(model, trip.model, trip.inputs)
    model.save_pretrained(tmp_path)
    again = trip.tiny.auto_class.from_pretrained(tmp_path, device_map="auto")
    assert_same_model(again, trip.model, trip.inputs)


@pytest.mark.parametrize("name", [*ONE_OF_EACH_KIND, "bert-mlm", "vit"])
def test_saving_what_was_reloaded_writes_the_same_bytes(round_trip: MakeRoundTrip, tmp_path: Path, name: str):
    trip = round_trip(name, "mixed")
    trip.again.save_pretrained(tmp_path)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / file).read_bytes() == (trip.folder / file).read_bytes()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loading_logs_no_report(round_trip: MakeRoundTrip, load_warnings: list[str], name: str):
    trip = round_trip(name)
    trip.tiny.auto_class.from_pretrained(trip.folder)
    assert load_warnings == []


@pytest.mark.parametrize("setting", ["3bit", "kept"])
@pytest.mark.parametrize("name", [*CLASSIFIERS, "bert-mlm", "gpt2", "llama", "llama-tied"])
def test_base_model_of_a_checkpoint_with_a_head(round_trip: MakeRoundTrip, tmp_path: Path, name: str, setting: str):
    trip = round_trip(name, setting)
    expected = outputs_of(trip.again.base_model, trip.inputs)
    base, info = hf.AutoModel.from_pretrained(trip.folder, output_loading_info=True)
    assert_same_outputs(outputs_of(base, trip.inputs), expected)
    prefix = f"{trip.again.base_model_prefix}."
    assert all("pooler" in key or not key.startswith(prefix) for key in info["unexpected_keys"])
    assert all("pooler" in key for key in info["missing_keys"]) and not info["mismatched_keys"]

    # The base model can be saved in turn, and be given a head.
    assert base.config.quantization_config.plan.tensor_bytes == tensor_bytes(base)
    base.save_pretrained(tmp_path)
    entry = SavedFolder.read(tmp_path).entry
    assert entry.plan.tensor_bytes == sum(tensor.nbytes for tensor in saved_tensors(tmp_path).values())
    original = type(base).from_pretrained(trip.original)
    assert entry.plan.original_bytes == tensor_bytes(original)
    again, info = hf.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_same_outputs(outputs_of(again, trip.inputs), expected)

    with_head, info = trip.tiny.auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert_same_outputs(outputs_of(with_head.base_model, trip.inputs), expected)
    assert all("pooler" in key or not key.startswith(prefix) for key in info["missing_keys"])
    unexpected = {key for key in info["unexpected_keys"] if "pooler" not in key}
    assert not unexpected and not info["mismatched_keys"]
    assert with_head.config.quantization_config.plan.tensor_bytes == tensor_bytes(with_head)
    with_head.save_pretrained(tmp_path / "with-head")
    again, info = trip.tiny.auto_class.from_pretrained(tmp_path / "with-head", output_loading_info=True)
    assert not any(info.values()), info
    assert_same_model(again, with_head, trip.inputs)


@pytest.mark.parametrize("setting", ["3bit", "asymmetric"])
@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_a_cast_leaves_scales_alone(round_trip: MakeRoundTrip, name: str, setting: str):
    trip = round_trip(name, setting)
    before = copy.deepcopy(trip.again.state_dict())
    casts = {
        torch.bfloat16: lambda module: module.to(torch.bfloat16),
        torch.float16: torch.nn.Module.half,  # transformers refuses .half() and .float() of the whole model
        torch.float32: torch.nn.Module.float,
        torch.float64: torch.nn.Module.double,
    }
    for dtype, cast in casts.items():
        model = copy.deepcopy(trip.again)
        cast(model)
        assert outputs_of(model, trip.tiny.inputs(dtype=dtype)).dtype == dtype
        for layer_name, module in compressed_modules(model).items():
            assert module.dtype == module.weight.dtype == dtype
            for part in ("codes", "scales", "zeros"):
                tensor = getattr(module, part)
                if tensor is not None:
                    assert tensor.dtype == before[f"{layer_name}.{part}"].dtype
                    assert torch.equal(tensor, before[f"{layer_name}.{part}"])
    assert all(module.scales.dtype == torch.float16 for module in compressed_modules(trip.again).values())


def test_a_saved_cast_counts_its_bytes(round_trip: MakeRoundTrip, tmp_path: Path):
    trip = round_trip("bert", "mixed")
    model = copy.deepcopy(trip.again).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    entry = SavedFolder.read(tmp_path).entry
    assert entry.plan.tensor_bytes == sum(tensor.nbytes for tensor in saved_tensors(tmp_path).values())
    assert entry.plan.tensor_bytes < trip.plan.tensor_bytes
    assert entry.plan.original_bytes == trip.plan.original_bytes
    again = trip.tiny.auto_class.from_pretrained(tmp_path)
    assert_same_model(again, model, trip.inputs)


@pytest.mark.parametrize("name", ["bert", "resnet", "gpt2", "t5"])
def test_reload_in_another_dtype(round_trip: MakeRoundTrip, name: str):
    trip = round_trip(name)
    again, info = trip.tiny.auto_class.from_pretrained(trip.folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info.values()), info
    expected = copy.deepcopy(trip.again).to(torch.bfloat16)
    inputs = trip.tiny.inputs(dtype=torch.bfloat16)
    assert_same_model(again, expected, inputs)
    assert again.config.quantization_config.plan.tensor_bytes == tensor_bytes(again)


def test_layers_that_transformers_keeps_in_float32(round_trip: MakeRoundTrip):
    trip = round_trip("t5", dtype=torch.float16)  # T5 keeps `wo` in float32 when it is loaded in float16
    assert_same_model(trip.again, trip.model, trip.inputs)
    for model in (trip.model, trip.again):
        kept = {name for name, module in compressed_modules(model).items() if module.dtype == torch.float32}
        assert kept == {name for name in compressed_modules(model) if name.endswith("wo")}
        assert all(module.scales.dtype == torch.float16 for module in compressed_modules(model).values())
    assert tensor_bytes(trip.again) == trip.plan.tensor_bytes


@pytest.mark.parametrize("name", [*ONE_OF_EACH_KIND, "bert-mlm"])
def test_state_dict_round_trip(round_trip: MakeRoundTrip, name: str):
    trip = round_trip(name, "mixed")
    state = copy.deepcopy(trip.again.state_dict())
    twin = copy.deepcopy(trip.again)
    for tensor in twin.state_dict().values():
        tensor.zero_()
    assert not torch.equal(outputs_of(twin, trip.inputs), outputs_of(trip.again, trip.inputs))
    assert not any(twin.load_state_dict(state))
    assert_same_model(twin, trip.again, trip.inputs)


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_trainer_evaluates_and_gradients_pass(round_trip: MakeRoundTrip, tmp_path: Path, name: str):
    trip = round_trip(name)
    model = copy.deepcopy(trip.again)
    quantizer = model.hf_quantizer
    assert quantizer.is_trainable is True and quantizer.is_qat_trainable is True
    batch = trip.tiny.batch(rows=4)
    rows = [{key: value[row] for key, value in batch.items()} for row in range(4)]
    arguments = hf.TrainingArguments(
        output_dir=str(tmp_path), per_device_eval_batch_size=4, use_cpu=True, report_to="none", disable_tqdm=True
    )
    loss, expected = (
        hf.Trainer(each, args=arguments, eval_dataset=rows).evaluate()["eval_loss"] for each in (model, trip.model)
    )
    assert loss == pytest.approx(expected, rel=1e-5) and math.isfinite(loss)

    model(**batch).loss.backward()
    first_bias = {"bert": "bert.encoder.layer.0.attention.self.value.bias", "gpt2": "transformer.h.0.attn.c_attn.bias"}
    reached = model.get_parameter(first_bias.get(name, "resnet.embedder.embedder.normalization.bias"))
    assert reached.grad is not None and reached.grad.abs().sum() > 0
    assert all(not buffer.requires_grad for buffer in model.buffers())


@pytest.mark.parametrize("name", TIED)
def test_tied_weights_are_stored_once(round_trip: MakeRoundTrip, name: str):
    trip = round_trip(name)
    (home_name, home_plan), *others = [(name, plan) for name, plan in trip.plan.layers.items() if plan.tied]
    assert not others
    for model in (trip.model, trip.again, copy.deepcopy(trip.again)):
        home = model.get_submodule(home_name)
        assert isinstance(home, CompressedModule)
        for tied_name in home_plan.tied:
            tied = model.get_submodule(tied_name)
            assert isinstance(tied, TiedLinear | TiedEmbedding) and tied.home is home
            assert torch.equal(tied.weight, home.weight)
            assert {key for key, _ in tied.state_dict().items()} <= {"bias"}
    stored = {key for key, tensor in saved_tensors(trip.folder).items() if tensor.numel()}
    assert f"{home_name}.codes" in stored
    assert not any(key.startswith(tied_name) for tied_name in home_plan.tied for key in stored - {_DECODER_BIAS})

    head = trip.again.get_output_embeddings()
    states = torch.randn(2, 32)
    bias = 0 if head.bias is None else head.bias
    torch.testing.assert_close(head(states), states @ home.weight.detach().T + bias)


_DECODER_BIAS = "cls.predictions.decoder.bias"  # transformers ties it to cls.predictions.bias and saves one of them


def test_bias_of_a_tied_head_stays_tied(round_trip: MakeRoundTrip):
    trip = round_trip("bert-mlm")
    for model in (trip.model, trip.again):
        model = copy.deepcopy(model)
        model.tie_weights()
        predictions = model.cls.predictions
        assert predictions.decoder.bias is predictions.bias
        original = trip.tiny.build().cls.predictions.bias
        assert torch.equal(predictions.bias, original) and original.abs().sum() > 0


@pytest.mark.parametrize(
    ("name", "settings", "left_alone"),
    [
        ("bert", {"keep_head": True}, ["classifier"]),
        ("resnet", {"keep_head": True}, ["classifier.1"]),
        ("gpt2", {"keep_head": True}, ["lm_head", "transformer.wte"]),
        ("bert", {"modules_to_not_convert": "embeddings"}, ["bert.embeddings.word_embeddings"]),
        (
            "bert",
            {"modules_to_not_convert": ["*.layer.0.attention.*.query", "pooler"]},
            ["bert.encoder.layer.0.attention.self.query", "bert.pooler.dense"],
        ),
        ("bert-mlm", {"modules_to_not_convert": ["decoder"]}, ["cls.predictions.decoder"]),
        ("nomic-bert", {"modules_to_not_convert": ["*.q_proj"]}, ["nomic_bert.layers.0.self_attn.q_proj"]),
    ],
    ids=["head-bert", "head-resnet", "head-gpt2-tied", "parent", "glob-and-part", "tied-decoder", "q-of-qkv"],
)
def test_modules_left_alone(
    round_trip: MakeRoundTrip, tmp_path: Path, name: str, settings: dict, left_alone: list[str]
):
    trip = round_trip(name)
    model = compress(trip.tiny, trip.original, **SETTINGS["3bit"], **settings)
    model.save_pretrained(tmp_path)
    again, info = trip.tiny.auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    original = trip.tiny.build()
    plan = again.config.quantization_config.plan
    for layer_name in left_alone:
        kept = again.get_submodule(layer_name)
        assert type(kept) is type(original.get_submodule(layer_name))
        assert torch.equal(kept.weight, original.get_submodule(layer_name).weight)
        assert layer_name not in plan.layers
    assert compressed_modules(again)
    assert_same_model(again, model, trip.inputs)
    assert tensor_bytes(again) == plan.tensor_bytes


@pytest.mark.parametrize("name", ["bert", "gpt2", "bert-mlm"])
def test_ids_out_of_range_are_refused(round_trip: MakeRoundTrip, name: str):
    trip = round_trip(name)
    embedding = trip.again.get_input_embeddings()
    for wrong in (-1, embedding.num_embeddings):
        with pytest.raises(IndexError):
            embedding(torch.tensor([[0, wrong]]))


def test_hooks_of_accelerate_are_kept():
    """Several devices: a hook on each block brings its inputs there; a compressed block needs it as well."""
    tiny = TINY_MODELS["llama-tied"]
    model = tiny.build()
    for name in ("model.embed_tokens", "lm_head"):
        add_hook_to_module(model.get_submodule(name), AlignDevicesHook(execution_device="cpu", io_same_device=True))
    from hf_lossless import compress as compress_in_place

    compress_in_place(model, [tiny.batch()], LosslessCompressionConfig(**SETTINGS["3bit"]))
    for name in ("model.embed_tokens", "lm_head"):
        module = model.get_submodule(name)
        assert isinstance(module, CompressedModule | Tied)
        assert isinstance(module._hf_hook, AlignDevicesHook)
    assert outputs_of(model, tiny.inputs()).shape[-1] == tiny.config.vocab_size


def test_the_ratio_is_of_the_checkpoint_in_its_own_dtype(tmp_path):
    tiny = TINY_MODELS["bert"]
    tiny.build().to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    tensors = load_file(tmp_path / "bf16" / "model.safetensors")
    config = LosslessCompressionConfig(dataset=[tiny.batch()], loss_budget=1.0, bits=(2, 4))
    model = tiny.auto_class.from_pretrained(tmp_path / "bf16", dtype=torch.float32, quantization_config=config)
    assert model.config.quantization_config.plan.original_bytes == sum(tensor.nbytes for tensor in tensors.values())


def test_the_loss_of_a_half_precision_classifier_is_computed_in_float32():
    tiny = TINY_MODELS["bert"]
    model = tiny.build().to(torch.bfloat16)
    with torch.no_grad():
        logits = model(**tiny.inputs()).logits
        loss = batch_loss(model, {**tiny.inputs(), "labels": tiny.batch()["labels"]})
    expected = torch.nn.functional.cross_entropy(logits.float(), tiny.batch()["labels"])
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)


def test_a_plan_that_lies_about_its_bytes(tmp_path):
    tiny = TINY_MODELS["bert"]
    tiny.build().save_pretrained(tmp_path / "model")
    config = LosslessCompressionConfig(dataset=[tiny.batch()], loss_budget=1.0, bits=(4,))
    tiny.auto_class.from_pretrained(tmp_path / "model", quantization_config=config).save_pretrained(tmp_path / "small")
    file = tmp_path / "small" / "config.json"
    values = json.loads(file.read_text())
    values["quantization_config"]["plan"]["other_bytes"] += 1
    file.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"speaks of \d+ bytes of tensors, the files hold \d+"):
        tiny.auto_class.from_pretrained(tmp_path / "small")
