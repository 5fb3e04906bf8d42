"""Targets and decoding against loops over all spans."""

import pytest
import torch

from hf_lossless.data.tasks.spans import (
    MAX_ANSWER_TOKENS,
    Offsets,
    Span,
    best_of_strides,
    best_spans,
    chosen_answer,
    target_tokens,
)

#           0     1     2       3       4       5         6
OFFSETS = [None, None, (10, 13), (13, 15), (16, 20), (20, 21), None]


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (10, 13, (2, 2)),
        (10, 15, (2, 3)),
        (16, 20, (4, 4)),
        (11, 14, (2, 3)),  # inside of tokens: those that hold it
        (20, 21, (5, 5)),  # the last token of the stride
        (15, 18, (3, 4)),  # begins with the blank between two tokens
        (9, 13, None),
        (16, 22, None),
        (0, 3, None),
    ],
)
def test_tokens_of_an_answer(start: int, end: int, expected: tuple[int, int] | None) -> None:
    assert target_tokens(OFFSETS, start, end) == expected


def test_a_stride_without_context_holds_no_answer() -> None:
    assert target_tokens([None, None], 0, 1) is None
    assert best_spans(torch.zeros(2), torch.zeros(2), [None, None]) == []


def test_the_best_span_is_that_of_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        starts, ends = torch.randn(2, 60, generator=generator)
        offsets: Offsets = [None] * 5 + [(index * 3, index * 3 + 2) for index in range(50)] + [None] * 5
        every = [
            Span((starts[i] + ends[j]).item(), offsets[i][0], offsets[j][1])
            for i in range(5, 55)
            for j in range(i, min(i + MAX_ANSWER_TOKENS, 55))
        ]
        expected = sorted(every, key=lambda span: -span.score)
        assert best_spans(starts, ends, offsets, n_best=50) == pytest.approx(expected[:50])
        assert best_spans(starts, ends, offsets)[0] == expected[0]


def test_what_is_outside_of_the_context_is_never_chosen() -> None:
    scores = torch.tensor([99.0, 50.0, 1.0, 0.0, 0.0, 2.0, 99.0])
    assert best_spans(scores, scores, OFFSETS)[0] == Span(4.0, 20, 21)


def test_an_answer_neither_runs_backwards_nor_is_too_long() -> None:
    offsets = [(index, index + 1) for index in range(40)]
    starts, ends = torch.zeros(40), torch.zeros(40)
    starts[0], ends[MAX_ANSWER_TOKENS] = 5.0, 5.0  # one token too long
    assert all(span.score <= 5.0 for span in best_spans(starts, ends, offsets))
    starts, ends = torch.zeros(40), torch.zeros(40)
    starts[9], ends[3] = 5.0, 5.0
    assert all(span.start < span.end and span.score <= 5.0 for span in best_spans(starts, ends, offsets))


def test_the_strides_of_a_question_compete() -> None:
    one, two, three = Span(1.0, 0, 1), Span(3.0, 5, 6), Span(2.0, 7, 8)
    assert best_of_strides([[one], [two, three]]) == [two, three, one]
    assert best_of_strides([[one], [two, three]], n_best=2) == [two, three]


@pytest.mark.parametrize(
    ("null_score", "threshold", "expected"),
    [(None, 0.0, "cd"), (4.0, 0.0, ""), (3.0, 0.0, "cd"), (4.0, 1.0, "cd"), (4.0, 0.5, ""), (2.0, -2.0, "")],
)
def test_the_null_answer_has_to_be_better_by_the_threshold(
    null_score: float | None, threshold: float, expected: str
) -> None:
    assert chosen_answer("abcdef", [Span(3.0, 2, 4), Span(1.0, 0, 1)], null_score, threshold) == expected


def test_no_span_is_no_answer() -> None:
    assert chosen_answer("abcdef", [], None, 0.0) == ""
