"""Accuracy, top-k accuracy, perplexity and token accuracy by hand."""

import math

import pytest

from hf_lossless.data.tasks.metrics import Accuracy, Perplexity, TokenAccuracy, TopAccuracy


def test_accuracy() -> None:
    assert Accuracy().of([0, 1, 2, 1], [0, 1, 1, 1]) == {"accuracy": 0.75}


def test_the_right_class_among_the_best() -> None:
    assert TopAccuracy().of([[1, 2, 3], [1, 2, 3], [9, 8, 7], [0, 1, 2]], [3, 4, 9, 2]) == {"top_3_accuracy": 0.75}


def test_perplexity_weighs_tokens() -> None:
    """A uniform choice among 10 has perplexity 10; three tokens of 10 and one of 1,000 have 10^(6/4)."""
    assert Perplexity().of([math.log(10)] * 2, [3, 8])["perplexity"] == pytest.approx(10)
    assert Perplexity().of([math.log(10), math.log(1000)], [3, 1])["perplexity"] == pytest.approx(10**1.5)
    assert Perplexity().of([800.0], [1])["perplexity"] == math.inf


def test_token_accuracy_weighs_rows() -> None:
    assert TokenAccuracy().of([[1, 2, 3, 4], [7]], [[1, 2, 3, 5], [8]]) == {"token_accuracy": 0.375}
