"""F1 and exact match by hand, from the definitions in the official scripts."""

import pytest

from hf_lossless.data.tasks.metrics import Squad, SquadV2, exact_match, f1, normalised


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The  Denver   Broncos", "denver broncos"),
        ("a.m.", "am"),  # punctuation goes first, and "a" is no word of its own then
        ("An apple a day", "apple day"),
        ("theatre", "theatre"),
        ("U.S.-based", "usbased"),
        ("«Été» à l’hôtel", "«été» à l’hôtel"),  # only ASCII punctuation goes
        ("the", ""),
        ("20% (of it)", "20 of it"),
        ("A\tB\n", "b"),
        ("straße ß", "straße ß"),  # lower, not casefold
    ],
)
def test_normalisation(answer: str, expected: str) -> None:
    assert normalised(answer) == expected


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "score"),
    [
        ("Denver Broncos", ["the Denver Broncos."], 1, 1),
        ("Denver Broncos", ["Carolina Panthers"], 0, 0),
        # 2 of 3 predicted words, and 2 of 2 gold: p = 2/3, r = 1, F1 = 4/5
        ("the Denver Broncos team", ["Denver Broncos"], 0, 0.8),
        # the best of several answers: p = 1, r = 1/2, F1 = 2/3 beats 0
        ("2016", ["in February", "February 2016"], 0, 2 / 3),
        ("February 2016", ["2016", "February, 2016"], 1, 1),
        # words count as often as they come: "to be or to be" and "to be" have two words in common; p = 2/5, r = 1
        ("to be or to be", ["to be"], 0, 4 / 7),
        ("über", ["Über"], 1, 1),
        ("uber", ["über"], 0, 0),
    ],
)
@pytest.mark.parametrize("unanswerable", [False, True], ids=["v1.1", "v2"])
def test_both_versions_agree(
    prediction: str, answers: list[str], exact: float, score: float, unanswerable: bool
) -> None:
    assert exact_match(prediction, answers, unanswerable) == exact
    assert f1(prediction, answers, unanswerable) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prediction", "answers", "v1", "v2"),
    [
        ("", ["Paris"], (0, 0), (0, 0)),
        ("the", ["a"], (1, 0), (1, 1)),  # v1.1: both empty, so equal, but no word in common; v2: both say "none"
        ("the", ["a", "Paris"], (1, 0), (0, 0)),  # v2 leaves "a" out, for nothing remains of it
    ],
)
def test_where_nothing_is_left_of_an_answer(
    prediction: str, answers: list[str], v1: tuple[float, float], v2: tuple[float, float]
) -> None:
    """Exact match and F1 of each version."""
    for unanswerable, expected in ((False, v1), (True, v2)):
        assert (exact_match(prediction, answers, unanswerable), f1(prediction, answers, unanswerable)) == expected


@pytest.mark.parametrize(("prediction", "score"), [("", 1), ("the", 1), ("Paris", 0)])
def test_questions_without_an_answer(prediction: str, score: float) -> None:
    assert exact_match(prediction, [], True) == f1(prediction, [], True) == score


def test_the_metrics_are_means_over_questions() -> None:
    predictions, references = ["Denver Broncos", "2016", "x"], [["the Denver Broncos"], ["May 2016", "May"], ["y"]]
    assert Squad().of(predictions, references) == pytest.approx({"f1": (1 + 2 / 3) / 3, "exact_match": 1 / 3})
    found = SquadV2().of([*predictions, ""], [*references, []])
    assert found == pytest.approx({"f1": (2 + 2 / 3) / 4, "exact_match": 2 / 4})
    assert Squad().compute(predictions=["a b"], references=[["b"]]) == {"f1": 1.0, "exact_match": 1.0}
