"""onnxruntime: the model is exported to ONNX and its graph quantised; the bytes are those of the graph's initialisers.

Dynamic int8 (weights beforehand, inputs as they come), static int8 (calibrated), and weights of 2, 4 and 8 bits in
blocks (MatMulNBits, GatherBlockQuantized for the embeddings).
"""

import math
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from peer_methods.problem import Batch, PeerModel, PeerProblem, Unavailable, inputs_of, package

_BITS = {"INT4": 4, "UINT4": 4, "INT2": 2, "UINT2": 2, "BOOL": 8}
"""Of the element types whose numbers numpy would spread over more bits than are stored."""


def _int8(problem: PeerProblem, weights: Literal["QInt8", "QUInt8"]) -> PeerModel:
    with package("onnxruntime"), package("onnx"):
        from onnxruntime.quantization import QuantType, quantize_dynamic
    with _exported(problem) as path:
        quantised = path.with_stem("quantised")
        quantize_dynamic(path, quantised, per_channel=True, weight_type=QuantType[weights])
        return _peer_model(quantised, "per channel; matrices, convolutions and embeddings; dynamic int8 inputs")


def _static_int8(problem: PeerProblem) -> PeerModel:
    with package("onnxruntime"), package("onnx"):
        from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        """The calibration rows, as onnxruntime wants to read them."""

        def __init__(self) -> None:
            self._feeds = iter([_arrays(inputs) for inputs in problem.inputs])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._feeds, None)

    with _exported(problem) as path:
        quantised = path.with_stem("quantised")
        quantize_static(path, quantised, Reader(), per_channel=True, weight_type=QuantType.QInt8)
        return _peer_model(quantised, "weights per channel and activations, calibrated; embeddings too")


def _blocks(problem: PeerProblem, bits: int, block_size: int, *, hqq: bool = False) -> PeerModel:
    with package("onnxruntime"), package("onnx"), package("onnx_ir"):
        from onnxruntime.quantization.matmul_nbits_quantizer import HQQWeightOnlyQuantConfig, MatMulNBitsQuantizer
    import onnx

    with _exported(problem) as path:
        graph = onnx.load(path)
        passes: list[dict[str, Any]] = [  # embeddings have 4 bits only, and no HQQ
            {"bits": 4, "block_size": block_size, "op_types_to_quantize": ("Gather",)},
            {
                "algo_config": HQQWeightOnlyQuantConfig(
                    block_size=block_size, bits=bits, op_types_to_quantize=("MatMul",)
                )
            }
            if hqq
            else {"bits": bits, "block_size": block_size, "op_types_to_quantize": ("MatMul",)},
        ]
        for settings in passes:
            quantizer = MatMulNBitsQuantizer(graph, **settings)
            quantizer.process()
            graph = quantizer.model.model
        if not {"MatMulNBits", "GatherBlockQuantized"} & {node.op_type for node in graph.graph.node}:
            raise Unavailable(
                "its weights in blocks are for MatMul and Gather; the model has convolutions and one Gemm"
            )
        quantised = path.with_stem("quantised")
        onnx.save(graph, quantised)
        return _peer_model(
            quantised,
            f"weights only: matrices {bits} bits, embeddings 4 bits, blocks of {block_size}; "
            "convolutions, pooler and head (Gemm) stay in float32",
        )


@contextmanager
def _exported(problem: PeerProblem) -> Iterator[Path]:
    """The model as an ONNX file, for any number of rows and any length of text."""
    inputs = problem.inputs[0]
    names = list(inputs)

    class Scores(nn.Module):
        """The model with its inputs in a fixed order, and only scores as output."""

        def __init__(self) -> None:
            super().__init__()
            self.model = problem.model

        def forward(self, *tensors: Tensor) -> Tensor:
            return self.model(**dict(zip(names, tensors, strict=True))).logits

    axes = {
        name: {0: "rows"} if tensor.is_floating_point() else {0: "rows", 1: "length"} for name, tensor in inputs.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the older exporter: several times as fast, and the same graph
            torch.onnx.export(
                Scores().eval(),
                tuple(inputs.values()),
                str(path),
                input_names=names,
                output_names=["logits"],
                dynamic_axes=axes,
                dynamo=False,
            )
        yield path


def _peer_model(path: Path, note: str) -> PeerModel:
    """The model in an ONNX file; the file may go away afterwards."""
    import onnx

    serialised = path.read_bytes()
    return PeerModel(_logits(serialised), _initialiser_bytes(onnx.load_from_string(serialised)), note)


def _logits(serialised: bytes) -> Callable[[Batch], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(serialised, options, providers=["CPUExecutionProvider"])
    taken = {given.name for given in session.get_inputs()}

    def logits(batch: Batch) -> Tensor:
        feeds = {name: array for name, array in _arrays(inputs_of(batch)).items() if name in taken}
        return torch.from_numpy(session.run(["logits"], feeds)[0])

    return logits


def _arrays(inputs: Batch) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in inputs.items()}


def _initialiser_bytes(graph: Any) -> int:
    """Bytes of an ONNX graph's constants, as their element types are stored."""
    import onnx

    return sum(
        math.ceil(math.prod(constant.dims) * _bits(onnx.TensorProto.DataType.Name(constant.data_type)) / 8)
        for constant in graph.graph.initializer
    )


def _bits(element_type: str) -> int:
    import onnx

    if element_type in _BITS:
        return _BITS[element_type]
    return 8 * onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.DataType.Value(element_type)).itemsize


METHODS = {
    "onnxruntime dynamic int8": partial(_int8, weights="QInt8"),
    "onnxruntime dynamic uint8": partial(_int8, weights="QUInt8"),
    "onnxruntime static int8": _static_int8,
    "onnxruntime 8 bits, blocks of 32": partial(_blocks, bits=8, block_size=32),
    "onnxruntime 4 bits, blocks of 32": partial(_blocks, bits=4, block_size=32),
    "onnxruntime 4 bits, blocks of 64": partial(_blocks, bits=4, block_size=64),
    "onnxruntime 4 bits, blocks of 128": partial(_blocks, bits=4, block_size=128),
    "onnxruntime 4 bits, blocks of 64, HQQ": partial(_blocks, bits=4, block_size=64, hqq=True),
    "onnxruntime 2 bits, blocks of 32": partial(_blocks, bits=2, block_size=32),
}
