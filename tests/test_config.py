"""The two configurations; what they refuse is in test_errors.py."""

import copy
import dataclasses
import inspect
import json
import re

import pytest
import torch
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoQuantizationConfig

from hf_lossless import CompressionPlan, Grid, LayerPlan, LosslessCheckpointConfig, LosslessCompressionConfig
from hf_lossless.candidates.choices import Choices
from hf_lossless.certification.certificate import Certificate, Provenance
from hf_lossless.certification.certify import certify
from hf_lossless.certification.comparison import Outputs
from hf_lossless.data.rows import Rows
from hf_lossless.errors import ConfigurationError
from hf_lossless.planning.target import Target
from hf_lossless.storage.plan import FORMAT_VERSION, QUANT_METHOD


def without_addresses(value: object) -> str:
    """The value as text that is the same in every process: tests are spread over several by their names."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


PLAN = CompressionPlan(
    theory="llc",
    layers={
        "head": LayerPlan(kind="kept", cost_bytes=8, predicted_loss_change=0.0),
        "body": LayerPlan(
            kind="grid", grid=Grid(bits=3, group_size=64), cost_bytes=5, predicted_loss_change=0.25, tied=("tail",)
        ),
    },
    other_bytes=7,
    original_bytes=100,
)

LOSSES = torch.linspace(0, 1, 900)
OUTPUTS = Outputs(LOSSES, torch.ones(900), [0] * 900)
CERTIFICATE = certify(
    OUTPUTS,
    OUTPUTS,
    Provenance(data_fingerprint="ab", calibration_rows=1, selection_rows=2, theory="llc", seed=0),
    metric_name="accuracy",
)


def test_a_target_of_each_kind() -> None:
    assert LosslessCompressionConfig().tolerance == 0.01
    assert LosslessCompressionConfig(tolerance=-0.5).tolerance == -0.5
    assert LosslessCompressionConfig(ratio=1.5).tolerance is None
    assert LosslessCompressionConfig(ratio=1.5).ratio == 1.5
    assert LosslessCompressionConfig(max_bytes=10).max_bytes == 10
    assert LosslessCompressionConfig(loss_budget=0).loss_budget == 0


@pytest.mark.parametrize(
    ("given", "widths"), [((8, 2, 2), (2, 8)), ({4}, (4,)), (range(1, 4), (1, 2, 3)), (5, (5,)), (iter([16]), (16,))]
)
def test_widths(given: object, widths: tuple[int, ...]) -> None:
    assert LosslessCompressionConfig(ratio=2, bits=given).bits == widths


@pytest.mark.parametrize(
    ("given", "ranks"),
    [
        (None, None),
        ("auto", "auto"),
        ({"a": 4}, {"a": (4,)}),
        ({"a.b": (8, 2, 8), "*.query": iter([3])}, {"a.b": (2, 8), "*.query": (3,)}),
        ({"a": {5, 1}}, {"a": (1, 5)}),
        ({"a": range(1, 4)}, {"a": (1, 2, 3)}),
    ],
    ids=without_addresses,
)
def test_ranks(given: object, ranks: object) -> None:
    config = LosslessCompressionConfig(ratio=2, ranks=given)
    assert config.ranks == ranks
    settings = config.to_dict()
    assert json.loads(json.dumps(settings)) == settings
    assert copy.deepcopy(config).ranks == ranks
    if isinstance(ranks, dict):
        assert settings["ranks"] == {name: list(numbers) for name, numbers in ranks.items()}
        assert LosslessCompressionConfig(ratio=2, ranks=settings["ranks"]).ranks == ranks


def test_modules_to_leave_alone() -> None:
    for given in ("classifier", ["classifier"], ("classifier",)):
        assert LosslessCompressionConfig(ratio=2, modules_to_not_convert=given).modules_to_not_convert == (
            "classifier",
        )
    assert LosslessCompressionConfig(ratio=2, modules_to_not_convert=None).modules_to_not_convert == ()


def test_each_room_takes_its_part() -> None:
    config = LosslessCompressionConfig([], certification_dataset=[], tolerance=0.1, seed=3, bits=[8, 2], ranks={"a": 4})
    assert config.rows.dataset is config.dataset and config.rows.seed == 3
    assert config.choices == Choices(bits=(2, 8), ranks={"a": (4,)})
    assert config.target == Target(tolerance=0.1)
    parts = [field.name for part in (Rows, Choices, Target) for field in dataclasses.fields(part)]
    settings = set(inspect.signature(LosslessCompressionConfig).parameters)
    assert len(parts) == len(set(parts)) and set(parts) | {"theory", "activation_noise"} == settings


def test_a_copy_shares_the_data() -> None:
    """Auto classes copy their arguments; neither a generator nor a large data set should be."""
    rows = (row for row in ())
    config = LosslessCompressionConfig(rows, ratio=2)
    twin = copy.deepcopy({"one": config, "two": config})
    assert twin["one"] is twin["two"] is not config
    assert twin["one"].dataset is rows
    assert twin["one"].to_dict() == config.to_dict()


def test_settings_are_json_without_the_data() -> None:
    settings = LosslessCompressionConfig([{"text": "good"}], ratio=2, processor=object()).to_dict()
    assert json.loads(json.dumps(settings)) == settings
    assert settings["quant_method"] == QUANT_METHOD and settings["bits"] == [2, 3, 4, 8, 16]
    assert not {"dataset", "processor"} & settings.keys()


def test_an_entry_comes_back_from_json() -> None:
    entry = LosslessCheckpointConfig.of(PLAN)
    values = json.loads(json.dumps(entry.to_dict()))
    assert values.keys() == {"quant_method", "format_version", "plan"}
    assert values["format_version"] == FORMAT_VERSION
    again = AutoQuantizationConfig.from_dict(values)
    assert isinstance(again, LosslessCheckpointConfig)
    assert again.plan == PLAN and again.to_dict() == entry.to_dict()


@pytest.mark.parametrize("certificate", [None, CERTIFICATE], ids=["plan", "certificate"])
def test_size_bytes_are_tensors_and_text(certificate: Certificate | None) -> None:
    entry = LosslessCheckpointConfig.of(PLAN, certificate)
    others = {"architectures": ["BertModel"], "vocab_size": 5}
    with_entry, without = (
        json.dumps(values, indent=2, sort_keys=True)
        for values in (others | {"quantization_config": entry.to_dict()}, others)
    )
    assert entry.size_bytes == 8 + 5 + 7 + len(with_entry) - len(without)


def test_a_certificate_comes_back_from_json() -> None:
    entry = LosslessCheckpointConfig.of(PLAN, CERTIFICATE)
    again = AutoQuantizationConfig.from_dict(json.loads(json.dumps(entry.to_dict())))
    assert again.certificate == CERTIFICATE and again.size_bytes == entry.size_bytes


def test_unused_arguments_are_handed_back() -> None:
    entry, unused = LosslessCheckpointConfig.from_dict(
        LosslessCheckpointConfig.of(PLAN).to_dict(), return_unused_kwargs=True, device="cpu"
    )
    assert entry.plan == PLAN and unused == {"device": "cpu"}


def test_transformers_knows_the_method() -> None:
    assert AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] is LosslessCheckpointConfig


@pytest.mark.parametrize("theory", ["lod", "cet", "hawq", "curvature"])
def test_activation_noise_is_llcs(theory):
    with pytest.raises(
        ConfigurationError, match=rf"activation_noise=True, but theory='{theory}' .* take theory=\"llc\""
    ):
        LosslessCompressionConfig(ratio=2, theory=theory, activation_noise=True)


@pytest.mark.parametrize("theory", ["llc", "lod", "cet", "hawq"])
def test_quantised_activations_are_for_the_curvature(theory):
    with pytest.raises(
        ConfigurationError, match=rf"activation_bits=\(None, 8\), but theory='{theory}' .* Take theory=\"curvature\""
    ):
        LosslessCompressionConfig(ratio=2, theory=theory, activation_bits=(None, 8))
    assert LosslessCompressionConfig(ratio=2, theory=theory, activation_bits=None).activation_bits == (None,)


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        ((1,), r"activation_bits=\(1,\) cannot be used because of \[1\]\. Choose widths from 2 to 8, and None"),
        ((None, 8, 16), r"because of \[16\]"),
        ((True, 8), r"because of \[True\]"),
        ((8.0,), r"because of \[8\.0\]"),
        ("8", r"activation_bits='8' cannot be used because of \['8'\]"),
        ((), r"activation_bits=\(\) cannot be used\. Choose"),
    ],
)
def test_widths_of_activations_that_cannot_be_used(bits, message):
    with pytest.raises(ConfigurationError, match=message):
        LosslessCompressionConfig(ratio=2, theory="curvature", activation_bits=bits)


@pytest.mark.parametrize(
    ("bits", "stored", "widths"),
    [((8, None, 4, 8), (None, 4, 8), (4, 8)), ([8], (8,), (8,)), (8, (8,), (8,)), ([None], (None,), ())],
    ids=without_addresses,
)
def test_widths_of_activations(bits, stored, widths):
    config = LosslessCompressionConfig(ratio=2, theory="curvature", activation_bits=bits)
    assert (config.activation_bits, config.choices.activation_widths) == (stored, widths)
    assert json.loads(json.dumps(config.to_dict()))["activation_bits"] == list(stored)


@pytest.mark.parametrize("version", range(1, FORMAT_VERSION))
def test_earlier_formats_are_still_read(version):
    plan = {"theory": "llc", "layers": {}, "other_bytes": 1, "original_bytes": 2, "activations": "float"}
    config = LosslessCheckpointConfig.from_dict({"quant_method": QUANT_METHOD, "format_version": version, "plan": plan})
    assert config.plan.other_bytes == 1 and LosslessCheckpointConfig.of(config.plan).format_version == FORMAT_VERSION


@pytest.mark.parametrize(
    ("given", "storage"),
    [
        ("fixed", ("fixed",)),
        ("entropy", ("entropy",)),
        (["entropy", "fixed", "entropy"], ("fixed", "entropy")),
        (iter(["entropy"]), ("entropy",)),
    ],
    ids=without_addresses,
)
def test_storages(given, storage):
    config = LosslessCompressionConfig(ratio=2, storage=given)
    assert config.storage == storage and config.to_dict()["storage"] == list(storage)
    assert LosslessCompressionConfig(ratio=2).storage == ("fixed",)
    assert config.choices.storage == storage


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("zip", r"storage='zip' cannot be used because of \['zip'\]\. Choose of fixed, entropy, say storage=\("),
        ("fixed,entropy", r"because of \['fixed,entropy'\]"),
        (("fixed", 4), r"because of \[4\]"),
        ((), r"storage=\(\) cannot be used\. Choose of fixed, entropy"),
        (None, r"storage=None cannot be used because of \[None\]"),
        (True, r"because of \[True\]"),
    ],
    ids=without_addresses,
)
def test_storages_that_cannot_be_used(given, message):
    with pytest.raises(ConfigurationError, match=message):
        LosslessCompressionConfig(ratio=2, storage=given)


@pytest.mark.parametrize("theory", ["llc", "lod", "cet", "hawq"])
def test_entropy_coding_is_for_the_curvature(theory):
    message = (
        rf"storage=\('fixed', 'entropy'\), but theory='{theory}' cannot say .* Take theory=\"curvature\", or leave"
    )
    with pytest.raises(ConfigurationError, match=message):
        LosslessCompressionConfig(ratio=2, theory=theory, storage=("fixed", "entropy"))
    assert LosslessCompressionConfig(ratio=2, theory=theory, storage="fixed").storage == ("fixed",)
