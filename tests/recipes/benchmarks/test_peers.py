"""The comparison's peers: bytes and figures against slow references; each tool itself only where it is installed."""

import dataclasses
import importlib.util
import json
import math
import sys

import peers
import pytest
import torch
import transformers
from peer_methods.problem import PeerModel, PeerProblem, Unavailable, inputs_of, logits_of
from peer_methods.stored_bytes import stored_bytes
from tiny_models import TINY_MODELS
from torch import Tensor, nn

from hf_lossless.candidates.grids import grid_of
from hf_lossless.candidates.uniform import quantise
from hf_lossless.data.tasks.registry import task_of
from hf_lossless.storage.grid import stored_bytes as grid_bytes
from hf_lossless.storage.layers import find_layers


def _text(rows: int, seed: int) -> dict[str, Tensor]:
    """With all the arguments that a tokenizer gives."""
    batch = TINY_MODELS["bert"].make_batch(rows, seed)
    return {**batch, "token_type_ids": torch.zeros_like(batch["input_ids"])}


# Wide enough for the tools' groups of 64 and 128.
_TEXT = dataclasses.replace(
    TINY_MODELS["bert"],
    config=transformers.BertConfig(
        vocab_size=96,
        hidden_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=16,
        pad_token_id=1,
        num_labels=3,
    ),
    make_batch=_text,
)
_IMAGE = TINY_MODELS["resnet"]
_PACKAGES = {  # a row: what it needs
    "torchao int8": "torchao",
    "torchao 4 bits": "torchao",
    "quanto 4 bits": "optimum.quanto",
    "bitsandbytes nf4": "bitsandbytes",
    "nncf int4, groups of 64, no data": "nncf",
    "modelopt auto_quantize, 6.0 bits, embeddings 4 bits": "modelopt",
    "onnxruntime dynamic int8": "onnxruntime",
    "onnxruntime 4 bits, blocks of 32": "onnxruntime",
}


def make_problem(tiny=_TEXT) -> PeerProblem:
    model = tiny.build()
    return PeerProblem(model, [tiny.batch(6, seed) for seed in (0, 1)], task_of(model))


def run(name: str, problem: PeerProblem, tiny=_TEXT, **settings: float) -> dict:
    batches = [tiny.batch(5, seed) for seed in (2, 3)]
    labels = torch.cat([batch["labels"] for batch in batches])
    return peers.run_peer(name, problem, batches, peers.scores(logits_of(problem.model), batches), labels, **settings)


class TestStoredBytes:
    def test_parameters_and_buffers(self) -> None:
        assert stored_bytes(nn.BatchNorm1d(3)) == 4 * 4 * 3 + 8

    def test_tied_tensors_count_once(self) -> None:
        model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
        model[1].weight = model[0].weight
        assert stored_bytes(model) == 5 * 4 * 4

    def test_leave_out(self) -> None:
        model = nn.Sequential(nn.Linear(4, 2))
        assert stored_bytes(model, leave_out=("bias",)) == 4 * 2 * 4

    def test_wrapped_weight(self) -> None:
        module = nn.Module()
        module.register_parameter("weight", Wrapped(torch.zeros(3, 8, dtype=torch.int8), torch.ones(3)))
        assert module.weight.nbytes == 3 * 8 * 4  # what it pretends to be
        assert stored_bytes(module) == 3 * 8 + 3 * 4

    @pytest.mark.filterwarnings("ignore:.*quant:DeprecationWarning", "ignore:.*quant:UserWarning")
    def test_quantised_tensor(self) -> None:
        module = nn.Module()
        scales, zeros = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)
        codes = torch.quantize_per_channel(torch.zeros(3, 8), scales, zeros, 0, torch.qint8)
        module.register_buffer("weight", codes)
        assert stored_bytes(module) == 3 * 8 + 3 * 8 + 3 * 8

    def test_packed_parameters_in_a_tuple(self) -> None:
        class Packed(nn.Module):
            def get_extra_state(self) -> tuple:
                return torch.zeros(7), (None, torch.zeros(2, dtype=torch.int8)), "qint8"

            def set_extra_state(self, state: tuple) -> None: ...

        assert stored_bytes(Packed()) == 28 + 2


class Wrapped(nn.Parameter):
    """Looks like float32, holds codes and scales."""

    def __new__(cls, codes: Tensor, scales: Tensor) -> "Wrapped":
        self = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)
        self.codes, self.scales = codes, scales
        return self

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scales"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):  # detach is all that a state dict asks for
        return args[0]


class TestFigures:
    def test_against_one_row_at_a_time(self) -> None:
        torch.manual_seed(0)
        before, after = torch.randn(40, 3), torch.randn(40, 3)
        labels = torch.randint(0, 3, (40,))
        found = peers.figures(before, after, labels, make_problem().task)
        changes, divergences, flips, right, losses = [], [], 0, 0, []
        for row in range(40):
            p, q = probabilities(before[row].tolist()), probabilities(after[row].tolist())
            label = int(labels[row])
            losses.append(-math.log(q[label]))
            changes.append(math.log(p[label]) - math.log(q[label]))
            divergences.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
            flips += p.index(max(p)) != q.index(max(q))
            right += q.index(max(q)) == label
        mean = sum(changes) / 40
        variance = sum((change - mean) ** 2 for change in changes) / 39
        assert found["loss"] == pytest.approx(sum(losses) / 40, rel=1e-5)
        assert found["loss_change"] == pytest.approx(mean, rel=1e-5)
        assert found["loss_change_se"] == pytest.approx(math.sqrt(variance / 40), rel=1e-5)
        assert found["kl"] == pytest.approx(sum(divergences) / 40, rel=1e-5)
        assert (found["flips"], found["metric"]) == (flips, pytest.approx(right / 40))

    def test_the_original_itself(self) -> None:
        logits = torch.randn(9, 3)
        found = peers.figures(logits, logits.clone(), torch.zeros(9, dtype=torch.long), make_problem().task)
        assert [found[name] for name in ("loss_change", "loss_change_se", "flips", "kl")] == [0, 0, 0, 0]


def probabilities(scores: list[float]) -> list[float]:
    powers = [math.exp(score) for score in scores]
    return [power / sum(powers) for power in powers]


class TestRunPeer:
    @pytest.mark.parametrize("tiny", [_TEXT, _IMAGE], ids=["bert", "resnet"])
    @pytest.mark.parametrize("bits", [2, 8])
    def test_round_to_nearest(self, tiny, bits: int) -> None:
        problem = make_problem(tiny)
        row = run(f"round to nearest, {bits} bits", problem, tiny, pass_seconds=0.5)
        layers = find_layers(problem.model)
        expected = problem.original_bytes - sum(layer.weight.nbytes for layer in layers)
        for layer in layers:
            grid = quantise(layer.matrix, grid_of(bits, layer.matrix.shape[1], 64, symmetric=True)).grid
            expected += grid_bytes(*layer.matrix.shape, grid, rows=layer.packed_rows)
        assert row["size_bytes"] == expected
        assert row["ratio"] == pytest.approx(problem.original_bytes / expected, abs=1e-3)
        assert row["passes"] == pytest.approx(row["seconds"] / 0.5, abs=0.2)
        assert json.loads(json.dumps(row)) == row

    def test_more_bits_are_nearer_to_the_original(self) -> None:
        problem = make_problem()
        divergences = [run(f"round to nearest, {bits} bits", problem)["kl"] for bits in (8, 4, 2)]
        assert divergences == sorted(divergences)

    def test_the_original_is_left_alone(self) -> None:
        problem = make_problem()
        before = {name: tensor.clone() for name, tensor in problem.model.state_dict().items()}
        run("round to nearest, 2 bits", problem)
        assert all(torch.equal(before[name], tensor) for name, tensor in problem.model.state_dict().items())

    def test_without_the_time_of_a_pass(self) -> None:
        assert "passes" not in run("round to nearest, 8 bits", make_problem())

    def test_all_rows_of_a_model(self) -> None:
        problem = make_problem()
        names = ["round to nearest, 8 bits", "round to nearest, 4 bits"]
        report = peers.compare_peers(problem, [_TEXT.batch(5)], 0.5, names)
        assert [row["peer"] for row in report["peers"]] == names
        assert (report["test_rows"], report["original"]["flips"]) == (5, 0)
        assert json.loads(json.dumps(report)) == report

    @pytest.mark.parametrize(("name", "package"), _PACKAGES.items(), ids=list(_PACKAGES))
    def test_a_missing_package(self, name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
        root = package.split(".")[0]
        for module in [root, *(module for module in sys.modules if module.startswith(f"{root}."))]:
            monkeypatch.setitem(sys.modules, module, None)
        row = run(name, make_problem())
        assert row == {"peer": name, "unavailable": f"{package} is not installed: pip install 'hf-lossless[peers]'"}

    @pytest.mark.parametrize(
        ("error", "said"),
        [(Unavailable("no convolutions"), "no convolutions"), (ValueError("odd\n  size"), "ValueError: odd size")],
        ids=["refused", "threw"],
    )
    def test_a_peer_that_cannot(self, error: Exception, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
        def method(problem: PeerProblem) -> PeerModel:
            raise error

        monkeypatch.setitem(peers.PEERS, "broken", method)
        assert run("broken", make_problem()) == {"peer": "broken", "unavailable": said}

    def test_scores_that_are_not_finite(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(
            peers.PEERS, "nan", lambda problem: PeerModel(lambda batch: torch.full((5, 3), torch.nan), 1, "")
        )
        assert run("nan", make_problem())["unavailable"] == "its scores are not finite"

    def test_peers_see_no_labels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert "labels" not in inputs_of(_TEXT.batch())
        assert all("labels" not in inputs for inputs in make_problem().inputs)


@pytest.mark.filterwarnings("ignore")
class TestTools:
    def test_torch_dynamic(self) -> None:
        row = run("torch dynamic int8", make_problem())
        assert row["ratio"] > 2.5 and row["kl"] < 0.01

    @pytest.mark.parametrize(("name", "package"), _PACKAGES.items(), ids=list(_PACKAGES))
    def test_a_tool(self, name: str, package: str) -> None:
        root = package.split(".")[0]
        if importlib.util.find_spec(root) is None:
            pytest.skip(f"{root} is not installed: pip install -e '.[peers]'")
        row = run(name, make_problem())
        assert row.get("unavailable") is None
        assert row["ratio"] > 1.5 and row["kl"] < 0.1
        assert json.loads(json.dumps(row)) == row
