"""Save and reload of layers that are stored as factors, through transformers; plans are written by hand."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers as hf
from round_trips import assert_same_model, assert_same_outputs, outputs_of
from rounded_plans import apply_rounded
from safetensors.torch import load_file, save_file
from tiny_models import TINY_MODELS, TinyModel
from tiny_plans import by_hand
from torch import Tensor, nn

from hf_lossless import (
    CheckpointError,
    CompressionPlan,
    LosslessCheckpointConfig,
    LosslessError,
    LosslessHfQuantizer,
)
from hf_lossless.checkpoints.names import forget_compressed_ties
from hf_lossless.checkpoints.saved_folder import SavedFolder
from hf_lossless.storage.layers import Layer, find_layers, tensor_bytes
from hf_lossless.storage.modules.base import compressed_layers
from hf_lossless.storage.modules.low_rank import LowRankModule
from hf_lossless.storage.modules.packed import PackedModule
from hf_lossless.storage.modules.tied import Tied, TiedLinear

ARCHITECTURES = list(TINY_MODELS)
SELECTED = ["bert", "bert-mlm", "vit", "resnet", "gpt2"]
ONE_OF_EACH_KIND = ["bert", "resnet", "gpt2"]

FLOAT, PACKED = {"kind": "low_rank"}, {"kind": "low_rank", "left": 4, "right": 5}
SUM, HALF = {"kind": "sum", "left": 8, "right": 8}, {"kind": "low_rank", "right": 4}
SETTINGS = {  # each layer takes the next
    "float": [FLOAT],
    "packed": [PACKED],
    "sum": [SUM, {"kind": "sum"}],
    "mixed": [FLOAT, SUM, PACKED, {"kind": "grid"}, HALF, {"kind": "kept"}],
}


@dataclass(frozen=True)
class RoundTrip:
    """A model with factors, the folder it was saved to, and the model that this folder gives."""

    tiny: TinyModel
    model: hf.PreTrainedModel
    folder: Path
    again: hf.PreTrainedModel
    loading_info: dict
    dtype: torch.dtype

    @property
    def inputs(self) -> dict[str, Tensor]:
        return self.tiny.inputs(dtype=self.dtype)

    @property
    def plan(self) -> CompressionPlan:
        return self.again.config.quantization_config.plan


MakeRoundTrip = Callable[..., RoundTrip]


@pytest.fixture(scope="module")
def round_trip(tmp_path_factory: pytest.TempPathFactory) -> MakeRoundTrip:
    """Makes each round trip once. Tests must leave its models as they are."""
    made: dict[tuple, RoundTrip] = {}

    def make(name: str, setting: str = "mixed", dtype: torch.dtype = torch.float32) -> RoundTrip:
        if (name, setting, dtype) not in made:
            tiny, root = TINY_MODELS[name], tmp_path_factory.mktemp(f"{name}-{setting}")
            tiny.build().to(dtype).save_pretrained(root / "original")
            model = factorise(tiny.auto_class.from_pretrained(root / "original", dtype=dtype), SETTINGS[setting])
            model.save_pretrained(root / "small")
            again, info = tiny.auto_class.from_pretrained(root / "small", output_loading_info=True)
            made[name, setting, dtype] = RoundTrip(tiny, model, root / "small", again, info, dtype)
        return made[name, setting, dtype]

    return make


def factorise(model: hf.PreTrainedModel, choices: list[dict]) -> hf.PreTrainedModel:
    """Stores the layers as chosen, and makes of the model what the plug-in would."""
    layers = find_layers(model)
    present_bytes = tensor_bytes(model)
    made = {layer.name: chosen(layer, choices[index % len(choices)]) for index, layer in enumerate(layers)}
    plan = CompressionPlan(
        theory="llc",
        layers={name: layer_plan for name, (layer_plan, _) in made.items()},
        other_bytes=present_bytes - sum(layer.weight.nbytes for layer in layers),
        original_bytes=present_bytes,
    )
    apply_rounded(model, plan.layers, {name: factors for name, (_, factors) in made.items() if factors is not None})
    forget_compressed_ties(model)
    model._weight_conversions = []
    model.hf_quantizer = LosslessHfQuantizer(LosslessCheckpointConfig.of(plan), pre_quantized=True)
    model.config.quantization_config = model.hf_quantizer.quantization_config
    return model


def chosen(layer: Layer, choice: dict):
    """The choice, at half the rank that would save nothing; a grid where a layer cannot have factors."""
    out_features, in_features = layer.matrix.shape
    rank = out_features * in_features // (2 * (out_features + in_features))
    if getattr(layer.module, "groups", 1) > 1 or rank == 0:
        choice = {"kind": "grid"}
    return by_hand(layer, **choice, rank=rank)


def saved_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def low_rank_layers(model: nn.Module) -> dict[str, LowRankModule]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankModule)}


def assert_reloaded(trip: RoundTrip) -> None:
    assert not any(trip.loading_info.values()), trip.loading_info
    assert_same_model(trip.again, trip.model, trip.inputs)
    assert outputs_of(trip.model, trip.inputs).dtype == trip.again.dtype == trip.dtype
    assert low_rank_layers(trip.again).keys() == low_rank_layers(trip.model).keys() != set()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_reload_of_every_architecture(round_trip: MakeRoundTrip, name: str, dtype: torch.dtype):
    trip = round_trip(name, "mixed", dtype)
    assert_reloaded(trip)
    twin = copy.deepcopy(trip.again)
    twin.tie_weights()
    assert_same_model(twin, trip.again, trip.inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("setting", ["float", "packed", "sum"])
@pytest.mark.parametrize("name", SELECTED)
def test_reload_of_other_plans(round_trip: MakeRoundTrip, name: str, setting: str, dtype: torch.dtype):
    assert_reloaded(round_trip(name, setting, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", SELECTED)
def test_sizes_are_those_on_disk(round_trip: MakeRoundTrip, name: str, setting: str, dtype: torch.dtype):
    trip = round_trip(name, setting, dtype)
    assert trip.plan == trip.model.config.quantization_config.plan
    assert sum(tensor.nbytes for tensor in saved_tensors(trip.folder).values()) == trip.plan.tensor_bytes
    assert tensor_bytes(trip.again) == trip.plan.tensor_bytes
    for layer_name, module in compressed_layers(trip.again).items():
        assert module.weight_bytes == trip.plan.layers[layer_name].cost_bytes


@pytest.mark.parametrize("name", SELECTED)
def test_each_layer_has_one_guard_and_its_parts_have_none(round_trip: MakeRoundTrip, name: str):
    trip = round_trip(name)
    guards = {key.removesuffix(".weight") for key, tensor in saved_tensors(trip.folder).items() if not tensor.numel()}
    assert guards == {key for key, layer_plan in trip.plan.layers.items() if layer_plan.kind != "kept"}
    assert guards == set(compressed_layers(trip.again))


@pytest.mark.parametrize("name", SELECTED)
def test_shards(round_trip: MakeRoundTrip, tmp_path: Path, name: str):
    trip = round_trip(name)
    trip.model.save_pretrained(tmp_path, max_shard_size="2KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again, info = trip.tiny.auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert_same_model(again, trip.model, trip.inputs)
    assert not any(info.values()), info


@pytest.mark.parametrize("name", SELECTED)
def test_device_map_auto(round_trip: MakeRoundTrip, name: str):
    trip = round_trip(name)
    again = trip.tiny.auto_class.from_pretrained(trip.folder, device_map="auto")
    assert_same_model(again, trip.model, trip.inputs)


@pytest.mark.parametrize("name", SELECTED)
def test_saving_what_was_reloaded_writes_the_same_bytes(round_trip: MakeRoundTrip, tmp_path: Path, name: str):
    trip = round_trip(name)
    trip.again.save_pretrained(tmp_path)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / file).read_bytes() == (trip.folder / file).read_bytes()


@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "t5"])
def test_generate_gives_the_same_tokens(round_trip: MakeRoundTrip, name: str):
    trip = round_trip(name)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = trip.model.generate(input_ids=trip.inputs["input_ids"], **settings)
    assert torch.equal(trip.again.generate(input_ids=trip.inputs["input_ids"], **settings), expected)


@pytest.mark.parametrize("setting", ["float", "packed", "sum"])
@pytest.mark.parametrize("name", ["bert-mlm", "gpt2", "llama-tied", "t5"])
def test_tied_weights_are_stored_once(round_trip: MakeRoundTrip, name: str, setting: str):
    trip = round_trip(name, setting)
    assert_reloaded(trip)
    ((home_name, home_plan),) = [(key, layer_plan) for key, layer_plan in trip.plan.layers.items() if layer_plan.tied]
    for model in (trip.model, trip.again, copy.deepcopy(trip.again)):
        model.tie_weights()
        home, head = model.get_submodule(home_name), model.get_output_embeddings()
        assert isinstance(home, LowRankModule) and isinstance(head, TiedLinear) and head.home is home
        states = torch.randn(2, 32)
        bias = 0 if head.bias is None else head.bias
        torch.testing.assert_close(head(states), states @ home.matrix().T + bias)
        if name == "bert-mlm":
            assert head.bias is model.cls.predictions.bias
    assert all(isinstance(trip.again.get_submodule(tied_name), Tied) for tied_name in home_plan.tied)
    stored = {key for key, tensor in saved_tensors(trip.folder).items() if tensor.numel()}
    tensors_of_ties = {key for key in stored for tied_name in home_plan.tied if key.startswith(f"{tied_name}.")}
    assert tensors_of_ties <= {"cls.predictions.decoder.bias"}


@pytest.mark.parametrize("setting", ["float", "mixed"])
@pytest.mark.parametrize("name", [*ONE_OF_EACH_KIND, "t5"])
def test_reload_in_another_dtype(round_trip: MakeRoundTrip, name: str, setting: str):
    trip = round_trip(name, setting)
    again, info = trip.tiny.auto_class.from_pretrained(trip.folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info.values()), info
    expected = copy.deepcopy(trip.again).to(torch.bfloat16)
    inputs = trip.tiny.inputs(dtype=torch.bfloat16)
    assert_same_model(again, expected, inputs)
    for model in (again, expected):
        modules = [module for module in model.modules() if isinstance(module, PackedModule)]
        assert all(module.scales.dtype == getattr(torch, module.grid.scale_dtype) for module in modules)
    assert again.config.quantization_config.plan.tensor_bytes == tensor_bytes(again)


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_a_saved_cast_counts_its_bytes(round_trip: MakeRoundTrip, tmp_path: Path, name: str):
    trip = round_trip(name, "float")
    model = copy.deepcopy(trip.again).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    plan = SavedFolder.read(tmp_path).entry.plan
    assert plan.tensor_bytes == sum(tensor.nbytes for tensor in saved_tensors(tmp_path).values())
    assert all(
        layer_plan.cost_bytes == trip.plan.layers[layer_name].cost_bytes / 2
        for layer_name, layer_plan in plan.layers.items()
        if layer_plan.kind == "low_rank"
    )
    again = trip.tiny.auto_class.from_pretrained(tmp_path)
    assert_same_model(again, model, trip.tiny.inputs(dtype=torch.bfloat16))


@pytest.mark.parametrize("setting", SETTINGS)
def test_layers_that_transformers_keeps_in_float32(round_trip: MakeRoundTrip, setting: str):
    trip = round_trip("t5", setting, torch.float16)  # T5 keeps `wo` in float32 when it is loaded in float16
    assert_reloaded(trip)
    for model in (trip.model, trip.again):
        for name, module in compressed_layers(model).items():
            wanted = torch.float32 if name.endswith("wo") else torch.float16
            assert module.dtype == module.weight.dtype == wanted
            for part in module.modules():
                if isinstance(part, PackedModule):
                    assert part.dtype == wanted and part.scales.dtype == getattr(torch, part.grid.scale_dtype)
            assert all(parameter.dtype == wanted for parameter in module.parameters())
    assert tensor_bytes(trip.again) == trip.plan.tensor_bytes


@pytest.mark.parametrize("setting", ["float", "mixed"])
@pytest.mark.parametrize("name", ["bert", "vit", "resnet", "nomic-bert", "bert-mlm", "gpt2", "llama-tied"])
def test_base_model_of_a_checkpoint_with_a_head(round_trip: MakeRoundTrip, tmp_path: Path, name: str, setting: str):
    trip = round_trip(name, setting)
    expected = outputs_of(trip.again.base_model, trip.inputs)
    base = hf.AutoModel.from_pretrained(trip.folder)
    assert_same_outputs(outputs_of(base, trip.inputs), expected)
    assert base.config.quantization_config.plan.tensor_bytes == tensor_bytes(base)
    base.save_pretrained(tmp_path)
    plan = SavedFolder.read(tmp_path).entry.plan
    assert plan.tensor_bytes == sum(tensor.nbytes for tensor in saved_tensors(tmp_path).values())
    assert plan.original_bytes == tensor_bytes(type(base)(copy.deepcopy(trip.tiny.config)))
    again, info = hf.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_same_model(again, base, trip.inputs)


def test_factors_are_trained_and_codes_are_not(round_trip: MakeRoundTrip):
    trip = round_trip("bert", "mixed")
    model = copy.deepcopy(trip.again)
    model(**trip.tiny.batch()).loss.backward()
    factors = {
        key: parameter for key, parameter in model.named_parameters() if key.endswith(("left.weight", "right.weight"))
    }
    assert factors and all(parameter.grad.abs().sum() > 0 for parameter in factors.values())
    assert all(not buffer.requires_grad for buffer in model.buffers())


WORDS = "bert.embeddings.word_embeddings"  # FLOAT: the first of "mixed"
POSITIONS = "bert.embeddings.position_embeddings"  # SUM
Tensors = dict[str, Tensor]


def dropped(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: change(tensors[name]).contiguous()}


@pytest.mark.parametrize("cls", [hf.AutoModelForSequenceClassification, hf.AutoModel], ids=["whole", "base-model"])
@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (dropped(f"{WORDS}.left.weight"), r"'.*word_embeddings\.left\.weight' is missing"),
        (dropped(f"{WORDS}.right.weight"), r"'.*word_embeddings\.right\.weight' is missing"),
        (dropped(f"{POSITIONS}.base.scales"), r"'.*position_embeddings\.base\.scales' is missing"),
        (dropped(f"{POSITIONS}.right.zeros"), r"'.*position_embeddings\.right\.zeros' is missing"),
        (
            changed(f"{WORDS}.left.weight", lambda left: left[:, :-1]),
            rf"'{WORDS}\.left\.weight' in .* has shape \[96, 11\], the plan needs \[96, 12\]",
        ),
        (
            changed(f"{WORDS}.right.weight", torch.Tensor.int),
            rf"'{WORDS}\.right\.weight' in .* is of type I32, the plan needs F32",
        ),
        (
            changed(f"{POSITIONS}.left.codes", lambda codes: codes.view(torch.int8)),
            rf"'{POSITIONS}\.left\.codes' in .* is of type I8, the plan needs U8",
        ),
        (
            changed(f"{POSITIONS}.base.scales", torch.Tensor.float),
            rf"'{POSITIONS}\.base\.scales' in .* is of type F32, the plan needs F16",
        ),
    ],
    ids=[
        *("missing-left", "missing-right", "missing-scales-of-the-base", "missing-zeros-of-a-factor"),
        *("factor-of-wrong-shape", "factor-of-wrong-type", "codes-of-wrong-type", "scales-of-wrong-type"),
    ],
)
def test_an_altered_file(
    round_trip: MakeRoundTrip, tmp_path: Path, alter: Callable[[Tensors], Tensors], message: str, cls: type
):
    trip = round_trip("bert", "mixed")
    (tmp_path / "config.json").write_bytes((trip.folder / "config.json").read_bytes())
    save_file(alter(saved_tensors(trip.folder)), tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{message}.*Take the folder again from where it came from"):
        cls.from_pretrained(tmp_path)


@pytest.mark.parametrize("extra", [f"{WORDS}.left.codes", f"{WORDS}.base.codes", f"{WORDS}.codes"])
def test_a_tensor_too_many(round_trip: MakeRoundTrip, tmp_path: Path, extra: str):
    trip = round_trip("bert", "mixed")
    (tmp_path / "config.json").write_bytes((trip.folder / "config.json").read_bytes())
    save_file({**saved_tensors(trip.folder), extra: torch.ones(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"'{extra}' in .* does not belong to this checkpoint.*Take the folder"):
        trip.tiny.auto_class.from_pretrained(tmp_path)


@pytest.mark.parametrize("part", [f"{WORDS}.left.weight", f"{POSITIONS}.base.codes"])
def test_a_state_dict_that_lacks_a_tensor(round_trip: MakeRoundTrip, part: str):
    """No files then, whose headers could be compared."""
    trip = round_trip("bert", "mixed")
    state = trip.model.state_dict()

    def load() -> hf.PreTrainedModel:
        config = hf.AutoConfig.from_pretrained(trip.folder)
        return type(trip.again).from_pretrained(None, config=config, state_dict=dict(state))

    assert_same_model(load(), trip.again, trip.inputs)
    del state[part]
    with pytest.raises(CheckpointError, match=rf"the tensor '{part}' was not loaded\. Take the folder again"):
        load()


def test_factors_are_read_in_the_dtype_that_is_asked(round_trip: MakeRoundTrip, tmp_path: Path):
    """A head's checkpoint whose base model is loaded: factors may lie there in another floating dtype."""
    trip = round_trip("bert", "mixed")
    (tmp_path / "config.json").write_bytes((trip.folder / "config.json").read_bytes())
    alter = changed(f"{WORDS}.left.weight", torch.Tensor.double)
    save_file(alter(saved_tensors(trip.folder)), tmp_path / "model.safetensors", {"format": "pt"})
    base = hf.AutoModel.from_pretrained(tmp_path)
    assert base.get_parameter("embeddings.word_embeddings.left.weight").dtype == torch.float32
    assert_same_outputs(outputs_of(base, trip.inputs), outputs_of(trip.again.base_model, trip.inputs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [32, 96]}, r"as a matrix \[32, 96\], but its weight is a matrix \[96, 32\]"),
        ({"rank": 24}, r"the rank 24, which saves nothing"),
        ({"rank": 11}, r"'.*word_embeddings\.left\.weight' in .* has shape \[96, 12\], the plan needs \[96, 11\]"),
    ],
    ids=["shape", "rank-that-saves-nothing", "another-rank"],
)
def test_an_altered_plan(round_trip: MakeRoundTrip, tmp_path: Path, change: dict, message: str):
    trip = round_trip("bert", "mixed")
    (tmp_path / "model.safetensors").write_bytes((trip.folder / "model.safetensors").read_bytes())
    values = json.loads((trip.folder / "config.json").read_text())
    values["quantization_config"]["plan"]["layers"][WORDS]["low_rank"] |= change
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(LosslessError, match=message):
        trip.tiny.auto_class.from_pretrained(tmp_path)
