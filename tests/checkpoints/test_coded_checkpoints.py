"""Entropy-coded models from end to end: what is saved is what comes back, in its very bytes."""

import copy
import json
import math
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from round_trips import RoundTrip, RoundTrips, assert_same_model, assert_same_outputs, outputs_of
from safetensors.torch import load_file, save_file
from tiny_checkpoints import text_rows
from tiny_models import TINY_MODELS, TinyModel
from torch import Tensor

from hf_lossless import CheckpointError, ConfigurationError, LosslessCompressionConfig, PlanError
from hf_lossless.checkpoints.saved_folder import SavedFolder
from hf_lossless.storage.entropy import coder
from hf_lossless.storage.layers import tensor_bytes
from hf_lossless.storage.modules.coded import CodedModule

SETTINGS = {
    "both": {"storage": ("fixed", "entropy"), "ratio": 4},
    "entropy": {"storage": "entropy", "loss_budget": 0.05},
    "all": {"storage": "entropy", "bits": (4,), "loss_budget": 0.5},
    "inputs": {"storage": "entropy", "bits": (4,), "loss_budget": 0.5, "activation_bits": (8,)},
}
ARCHITECTURES = ["bert", "bert-mlm", "vit", "resnet", "convnext", "gpt2", "llama-tied", "t5", "nomic-bert"]


@pytest.fixture(scope="module")
def round_trip(tmp_path_factory: pytest.TempPathFactory) -> RoundTrips:
    return RoundTrips(tmp_path_factory.mktemp("round-trips"), compress, "both")


def compress(tiny: TinyModel, original: Path, setting: str, dtype: torch.dtype = torch.float32, **arguments):
    batches = [tiny.batch(seed=seed, dtype=dtype) for seed in range(2)]
    config = LosslessCompressionConfig(dataset=batches, **SETTINGS[setting])
    return tiny.auto_class.from_pretrained(original, dtype=dtype, quantization_config=config, **arguments)


def coded_modules(model: torch.nn.Module) -> dict[str, CodedModule]:
    return {name: module for name, module in model.named_modules() if isinstance(module, CodedModule)}


def saved_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def planned(trip: RoundTrip) -> set[str]:
    return {name for name, layer_plan in trip.plan.layers.items() if layer_plan.kind == "coded"}


@pytest.mark.parametrize(
    ("name", "setting", "dtype"),
    [
        *((name, "all", torch.float32) for name in ARCHITECTURES if name != "convnext"),
        ("convnext", "entropy", torch.float32),  # at four bits it would answer the same to everything
        ("bert", "both", torch.float32),
        ("resnet", "entropy", torch.float32),
        ("bert", "all", torch.bfloat16),
        ("bert", "inputs", torch.float32),
    ],
    ids=str,
)
def test_reload_is_the_compressed_model(round_trip: RoundTrips, name: str, setting: str, dtype: torch.dtype):
    trip = round_trip(name, setting, dtype)
    expected = outputs_of(trip.model, trip.inputs)
    assert torch.isfinite(expected).all() and expected.dtype == dtype
    assert_same_model(trip.again, trip.model, trip.inputs)
    assert not any(trip.loading_info.values()), trip.loading_info

    twin = copy.deepcopy(trip.again)
    twin.tie_weights()
    assert_same_model(twin, trip.model, trip.inputs)

    # What is stored is what is planned, and its bytes are those that are said.
    stored = saved_tensors(trip.folder)
    names = planned(trip)
    assert names == coded_modules(trip.again).keys() and names
    for layer_name in names:
        assert stored[f"{layer_name}.coded"].dtype == torch.uint8 and stored[f"{layer_name}.weight"].shape == (0,)
        assert {key for key in stored if key.startswith(f"{layer_name}.")} <= {
            f"{layer_name}.{part}" for part in ("coded", "weight", "bias", "activation.scale", "activation.zero")
        }
    assert trip.plan == trip.model.config.quantization_config.plan == trip.model.hf_quantizer.result.plan
    assert sum(tensor.nbytes for tensor in stored.values()) == trip.plan.tensor_bytes == tensor_bytes(trip.again)
    for layer_name, layer_plan in trip.plan.layers.items():
        own = [stored[key].nbytes for key in stored if key.startswith(f"{layer_name}.") and key[-4:] != "bias"]
        assert sum(own) == layer_plan.cost_bytes
    text = (trip.folder / "config.json").read_text()
    values = json.loads(text)
    del values["quantization_config"]
    entry_bytes = len(text) - len(json.dumps(values, indent=2, sort_keys=True) + "\n")
    result = trip.model.hf_quantizer.result
    assert result.size_bytes == trip.plan.tensor_bytes + entry_bytes == SavedFolder.read(trip.folder).entry.size_bytes
    if setting == "both":
        assert result.ratio >= 4
    if setting == "entropy":
        assert trip.plan.predicted_loss_change <= 0.05


@pytest.mark.parametrize(("name", "setting"), [("bert", "both"), ("gpt2", "all")])
def test_saving_what_was_reloaded_writes_the_same_bytes(
    round_trip: RoundTrips, tmp_path: Path, name: str, setting: str
):
    trip = round_trip(name, setting)
    trip.again.save_pretrained(tmp_path)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / file).read_bytes() == (trip.folder / file).read_bytes()


def test_the_same_data_give_the_same_files(round_trip: RoundTrips, tmp_path: Path):
    trip = round_trip("resnet", "entropy")
    compress(trip.tiny, trip.original, "entropy").save_pretrained(tmp_path)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / file).read_bytes() == (trip.folder / file).read_bytes()


@pytest.mark.parametrize("name", ["bert", "llama-tied"])
def test_shards(round_trip: RoundTrips, tmp_path: Path, name: str):
    trip = round_trip(name, "all")
    trip.model.save_pretrained(tmp_path, max_shard_size="1KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again, info = trip.tiny.auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert_same_model(again, trip.model, trip.inputs)
    assert not any(info.values()), info


def test_device_map_auto(round_trip: RoundTrips, tmp_path: Path):
    trip = round_trip("gpt2", "all")
    model = compress(trip.tiny, trip.original, "all", device_map="auto")
    assert_same_model(model, trip.model, trip.inputs)
    model.save_pretrained(tmp_path)
    again = trip.tiny.auto_class.from_pretrained(tmp_path, device_map="auto")
    assert_same_model(again, trip.model, trip.inputs)


@pytest.mark.parametrize("name", ["bert", "vit", "gpt2"])
def test_base_model_of_a_checkpoint_with_a_head(round_trip: RoundTrips, tmp_path: Path, name: str):
    trip = round_trip(name, "all")
    expected = outputs_of(trip.again.base_model, trip.inputs)
    base = hf.AutoModel.from_pretrained(trip.folder)
    assert_same_outputs(outputs_of(base, trip.inputs), expected)
    base.save_pretrained(tmp_path)
    entry = SavedFolder.read(tmp_path).entry
    assert entry.plan.tensor_bytes == sum(tensor.nbytes for tensor in saved_tensors(tmp_path).values())
    assert entry.plan.original_bytes == tensor_bytes(type(base).from_pretrained(trip.original))
    again, info = hf.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert_same_model(again, base, trip.inputs)
    assert not any(info.values()), info


@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "t5"])
def test_generate_gives_the_same_tokens(round_trip: RoundTrips, name: str):
    trip = round_trip(name, "all")
    inputs = {"input_ids": trip.inputs["input_ids"]}
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = trip.model.generate(**inputs, **settings)
    assert torch.equal(trip.again.generate(**inputs, **settings), expected)


@pytest.mark.parametrize("name", ["bert", "resnet", "gpt2"])
def test_reload_in_another_dtype(round_trip: RoundTrips, tmp_path: Path, name: str):
    trip = round_trip(name, "all")
    again = trip.tiny.auto_class.from_pretrained(trip.folder, dtype=torch.bfloat16)
    expected = copy.deepcopy(trip.again).to(torch.bfloat16)
    inputs = trip.tiny.inputs(dtype=torch.bfloat16)
    assert_same_model(again, expected, inputs)
    again.save_pretrained(tmp_path)
    entry = SavedFolder.read(tmp_path).entry
    assert entry.plan.tensor_bytes == sum(tensor.nbytes for tensor in saved_tensors(tmp_path).values())
    assert entry.plan.layers == trip.plan.layers  # coded layers are of no dtype


@pytest.mark.parametrize("name", ["bert", "bert-mlm"])
def test_state_dict_round_trip(round_trip: RoundTrips, name: str):
    trip = round_trip(name, "all")
    state = copy.deepcopy(trip.again.state_dict())
    twin = copy.deepcopy(trip.again)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert not any(twin.load_state_dict(state))
    assert_same_model(twin, trip.again, trip.inputs)


def test_a_tolerance_is_certified_or_not_on_the_decoded_model(text_folder: Path, tmp_path: Path):
    config = LosslessCompressionConfig(text_rows(60), tolerance=0.5, storage="entropy")
    model = hf.AutoModelForSequenceClassification.from_pretrained(text_folder, quantization_config=config)
    result = model.hf_quantizer.result
    assert result.certificate is not None and coded_modules(model)
    model.save_pretrained(tmp_path)
    again = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert again.config.quantization_config.certificate == result.certificate
    inputs = TINY_MODELS["bert"].inputs()
    assert_same_model(again, model, inputs)


# What is refused

QUERY = "bert.encoder.layer.0.attention.self.query"


@pytest.fixture
def altered(round_trip: RoundTrips, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the folder with its tensor `query.coded` changed."""

    def alter(change: Callable[[Tensor], Tensor]) -> Path:
        trip = round_trip("bert", "all")
        trip.again.save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
        tensors = load_file(file)
        tensors[f"{QUERY}.coded"] = change(tensors[f"{QUERY}.coded"])
        save_file(tensors, file, {"format": "pt"})
        return tmp_path

    return alter


def flipped(place: float) -> Callable[[Tensor], Tensor]:
    def flip(content: Tensor) -> Tensor:
        content = content.clone()
        content[int(place * (len(content) - 1))] ^= 1
        return content

    return flip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flipped(0.0), rf"the tensor '{QUERY}\.coded' cannot be decoded: it is no coded matrix"),
        (flipped(0.5), rf"the tensor '{QUERY}\.coded' cannot be decoded: its checksum does not match"),
        (flipped(1.0), rf"the tensor '{QUERY}\.coded' cannot be decoded: its checksum does not match"),
        (lambda content: content[:-4].clone(), rf"the tensor '{QUERY}\.coded' in .* has shape \[\d+\], the plan needs"),
        (lambda content: content.view(torch.int8), rf"the tensor '{QUERY}\.coded' in .* is of type I8, the plan needs"),
        (torch.zeros_like, rf"the tensor '{QUERY}\.coded' cannot be decoded: it is no coded matrix"),
    ],
    ids=["first-byte", "middle", "last-byte", "cut", "another-type", "zeros"],
)
def test_a_tensor_that_was_changed(altered, change, message: str):
    folder = altered(change)
    with pytest.raises(CheckpointError, match=rf"{message}.*Take the folder again from where it came from"):
        hf.AutoModelForSequenceClassification.from_pretrained(folder)


def test_a_tensor_that_was_changed_in_a_part_of_the_model(altered):
    name = QUERY.removeprefix("bert.")  # as this model has it
    with pytest.raises(CheckpointError, match=rf"the tensor '{name}\.coded' cannot be decoded: its checksum"):
        hf.AutoModel.from_pretrained(altered(flipped(0.5)))


def test_a_layer_of_another_one_of_the_same_length(round_trip: RoundTrips, tmp_path: Path):
    """Its own checksum is right; its shape is not."""
    trip = round_trip("bert", "all")
    trip.again.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name, other = QUERY, "bert.encoder.layer.0.intermediate.dense"
    tensors[f"{name}.coded"], tensors[f"{other}.coded"] = tensors[f"{other}.coded"], tensors[f"{name}.coded"]
    save_file(tensors, file, {"format": "pt"})
    config = tmp_path / "config.json"
    values = json.loads(config.read_text())
    layers = values["quantization_config"]["plan"]["layers"]
    layers[name]["cost_bytes"], layers[other]["cost_bytes"] = layers[other]["cost_bytes"], layers[name]["cost_bytes"]
    config.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"is a matrix \[48, 32\], and not \[32, 32\]"):
        trip.tiny.auto_class.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"shape": [32, 31]}, PlanError, r"as a matrix \[32, 31\], but its weight is a matrix \[32, 32\]"),
        ({"step": -1}, PlanError, r"coded\.step: .*greater than 0"),
    ],
    ids=["shape", "step"],
)
def test_a_plan_that_was_changed(round_trip: RoundTrips, tmp_path: Path, changes: dict, error: type, message: str):
    trip = round_trip("bert", "all")
    trip.again.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    values = json.loads(config.read_text())
    values["quantization_config"]["plan"]["layers"][QUERY]["coded"] |= changes
    config.write_text(json.dumps(values))
    with pytest.raises(error, match=message):
        trip.tiny.auto_class.from_pretrained(tmp_path)


def test_fewer_bytes_than_an_input_takes(round_trip: RoundTrips, tmp_path: Path):
    trip = round_trip("bert", "inputs")
    trip.again.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    values = json.loads(config.read_text())
    layers = values["quantization_config"]["plan"]["layers"]
    name = next(name for name, layer in layers.items() if (layer.get("activation") or {}).get("range") == "static")
    layers[name]["cost_bytes"] = 3
    config.write_text(json.dumps(values))
    with pytest.raises(PlanError, match=rf"gives layer '{name}' 3 bytes, fewer than its input's range takes"):
        trip.tiny.auto_class.from_pretrained(tmp_path)


def test_without_the_library(round_trip: RoundTrips, monkeypatch):
    monkeypatch.setitem(sys.modules, "constriction", None)
    trip = round_trip("bert", "all")
    again = compress(trip.tiny, trip.original, "all")
    state, expected = trip.tiny.auto_class.from_pretrained(trip.folder).state_dict(), again.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)
    golden = Path(__file__).parent / "golden" / "v5-coded-bert"
    message = r"constriction, which is not installed\. Install it with: pip install 'hf-lossless\[entropy\]'"
    with pytest.raises(ConfigurationError, match=message):
        hf.AutoModelForSequenceClassification.from_pretrained(golden)


def test_layers_are_decoded_in_threads(round_trip: RoundTrips, monkeypatch, tmp_path: Path):
    pytest.importorskip("numba")
    trip = round_trip("bert", "all")
    monkeypatch.setattr(coder, "COMPILED_FROM", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    decode, threads, together = CodedModule.decode, set(), threading.Barrier(3)

    def decode_in_its_thread(module: CodedModule, name: str, kernel: coder.Kernel | None = None) -> None:
        if threading.current_thread() not in threads:
            threads.add(threading.current_thread())
            together.wait(30)  # passes when three are at it
        decode(module, name, kernel)

    monkeypatch.setattr(CodedModule, "decode", decode_in_its_thread)
    again = trip.tiny.auto_class.from_pretrained(trip.folder)
    for name, module in again.named_modules():
        if isinstance(module, CodedModule):
            assert torch.equal(module.matrix(), trip.again.get_submodule(name).matrix())

    monkeypatch.setattr(CodedModule, "decode", decode)
    trip.again.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in (f"{QUERY}.coded", *[name for name in tensors if name.endswith(".coded")][-1:]):
        tensors[name][40] ^= 1
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"'.*\.coded' cannot be decoded: its checksum does not match"):
        trip.tiny.auto_class.from_pretrained(tmp_path)


def test_bits_of_coded_layers_are_a_part_of_the_fixed_ones(round_trip: RoundTrips):
    trip = round_trip("bert", "all")
    coded = [layer for layer in trip.plan.layers.values() if layer.coded is not None]
    bits = [layer.bits for layer in coded if math.prod(layer.coded.shape) > 100]  # of fewer, the tables count for more
    assert all(math.isfinite(one) and 0 < one < 16 for one in bits)
