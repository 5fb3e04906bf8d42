"""The decoder that numba compiles: without the lock, in several threads, and without a cache where none can be kept."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from hf_lossless.storage.entropy.coder import SegmentDecoder, encode_segments
from hf_lossless.storage.entropy.frequencies import Frequencies

compiled = pytest.importorskip("hf_lossless.storage.entropy.compiled")


def test_threads_do_not_disturb_each_other():
    symbols = np.random.default_rng(0).integers(0, 9, 100_000).astype(np.int32) ** 2
    model = Frequencies.of(0, np.bincount(symbols))
    stream = encode_segments([(symbols, model)])
    together = threading.Barrier(4)

    def decode() -> np.ndarray:
        together.wait()
        return SegmentDecoder(stream, compiled.decode_lanes).decode(len(symbols), model)

    with ThreadPoolExecutor(4) as threads:
        for found in [threads.submit(decode) for _ in range(4)]:
            assert np.array_equal(found.result(), symbols)


def test_the_lock_is_released():
    assert compiled._decode.targetoptions["nogil"]


def test_without_a_directory_for_the_cache(monkeypatch):
    def njit(signature: str, *, cache: bool = False, **options: bool) -> Callable[..., Callable[..., int]]:
        if cache:
            raise RuntimeError("cannot cache function '_loop': no locator available")  # as numba does
        return numba_njit(signature, **options)

    numba_njit = compiled.numba.njit
    monkeypatch.setattr(compiled.numba, "njit", njit)
    monkeypatch.setattr(compiled, "_decode", compiled._compile())
    model = Frequencies.of(7, np.array([1, 1]))
    states, symbols = np.array([2**18 + 1], np.uint32), np.zeros(1, np.uint8)
    assert compiled.decode_lanes(np.zeros(0, np.uint16), 0, states, 0, model, symbols) == 0
    assert symbols.tolist() == [7] and states.tolist() == [2**17 + 1]
