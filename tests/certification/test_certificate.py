"""The certificate: from outputs to a record that is stored, read and told; and the walk over plans."""

import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from hf_lossless import CalibrationError, CheckpointError, ConfigurationError, DataError
from hf_lossless.certification.certificate import Certificate, Provenance
from hf_lossless.certification.certify import certify
from hf_lossless.certification.comparison import Outputs
from hf_lossless.certification.walk import walk

PROVENANCE = Provenance(data_fingerprint="ab12", calibration_rows=128, selection_rows=300, theory="curvature", seed=0)


def outputs(n: int = 4000, shift: float = 0.0, noise: float = 0.01, wrong: int = 0) -> Outputs:
    """A model whose logits differ from those of `outputs()` by noise; its loss by `shift`, some answers by design."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(n, 2, generator=generator, dtype=torch.float64) * 3
    labels = logits.argmax(-1) ^ (torch.rand(n, generator=generator) < 0.1).long()
    logits = logits + noise * torch.randn(n, 2, generator=generator, dtype=torch.float64)
    logits[:wrong] = logits[:wrong].flip(-1)
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none") + shift
    return Outputs(losses, (logits.argmax(-1) == labels).float(), logits.argmax(-1).tolist(), logits)


ORIGINAL = outputs(noise=0.0)


def certified(compressed: Outputs | None = None, **settings: Any) -> Certificate:
    compressed = outputs() if compressed is None else compressed
    return certify(ORIGINAL, compressed, PROVENANCE, metric_name="accuracy", **settings)


def test_a_model_that_hardly_changed_is_certified() -> None:
    found = certified()
    assert found.verdict == "certified" and found.passed
    seen = found.evidence
    assert seen.original_loss.low < seen.original_loss.value < seen.original_loss.high
    assert seen.original_metric.low < seen.original_metric.value < seen.original_metric.high <= 1
    assert seen.loss_change < seen.loss_change_bound and seen.loss_test.bound < 0
    assert (seen.num_rows, seen.confidence, seen.tolerance, seen.metric_margin) == (4000, 0.95, 0.01, 0.005)
    assert seen.flips == seen.right_to_wrong + seen.wrong_to_right < 40
    assert {"hf-lossless", "torch", "scipy"} <= set(found.provenance.versions)


def test_a_loss_that_fell() -> None:
    found = certified(outputs(shift=-0.01))
    assert found.verdict == "loss decreased" and found.passed
    superior = certified(outputs(shift=-0.01), tolerance=0.0)
    assert superior.verdict == "loss decreased"


@pytest.mark.parametrize(
    ("compressed", "settings", "verdict"),
    [
        ({"shift": 0.1}, {}, r"not certified: the loss may have risen by more than 0\.01 of the original's$"),
        (
            {"shift": -0.2, "wrong": 200},
            {"tolerance": 1.0},
            r"not certified: the accuracy may have fallen by more than",
        ),
        ({}, {"tolerance": 0.0}, r"not certified: the loss is not shown to have fallen by more than 0 of the orig"),
        ({}, {"tolerance": -0.02}, r"the loss is not shown to have fallen by more than 0\.02 of the original's$"),
        ({}, {"metric_margin": 0.0}, r"not certified: the accuracy is not shown to have risen by more than 0$"),
    ],
    ids=["loss-rose", "accuracy-fell", "tolerance-0", "tolerance-below-0", "margin-0"],
)
def test_what_is_not_certified(compressed: dict[str, Any], settings: dict[str, Any], verdict: str) -> None:
    found = certified(outputs(**compressed), **settings)
    assert not found.passed
    assert re.search(verdict, found.verdict), found.verdict


def test_too_few_rows() -> None:
    one, two = (Outputs(m.losses[:150], m.scores[:150], m.predictions[:150]) for m in (ORIGINAL, outputs()))
    two = replace(two, losses=two.losses - (two.losses - one.losses).mean())  # no difference is seen, nor excluded
    found = certify(one, two, PROVENANCE, metric_name="accuracy", tolerance=0.001)
    hint = r" \(150 rows are too few to tell; about [\d,]+ may be enough\)"
    loss, accuracy = r"the loss .* 0\.001 of the original's", r"the accuracy may have fallen by more than 0\.005"
    fewer = "150 rows are fewer than the 500 that a certificate takes, for rare bad rows hide from so few"
    assert re.fullmatch(f"not certified: {fewer}; {loss}{hint}; {accuracy}{hint}", found.verdict), found.verdict


@pytest.mark.parametrize(("rows", "passes"), [(499, False), (500, True)])
def test_below_500_rows_nothing_is_certified(rows: int, passes: bool) -> None:
    """Though both tests pass: the worse tail of the losses is not in so few rows."""
    one, two = (Outputs(m.losses[:rows], m.scores[:rows], m.predictions[:rows]) for m in (ORIGINAL, ORIGINAL))
    found = certify(one, two, PROVENANCE, metric_name="accuracy", metric_margin=0.02)
    assert max(found.evidence.loss_test.p_value, found.evidence.metric_test.p_value) < 0.05
    assert found.passed == passes
    assert passes or found.verdict.endswith("for rare bad rows hide from so few")


def test_a_certificate_of_a_finished_model() -> None:
    """What it was made with is not known to whoever certifies it again."""
    unknown = Provenance(data_fingerprint="ab", calibration_rows=None, selection_rows=None, theory="llc", seed=None)
    found = certify(ORIGINAL, outputs(), unknown, metric_name="accuracy")
    assert Certificate.from_dict(found.to_dict()) == found
    assert "Judged on 4,000 rows, provided that none of them had a part in making the model." in found.paragraph()
    table = {row[0]: row[2] for row in found.table()}
    assert table["rows: calibration, selection, certification"] == "unknown, unknown, 4,000"
    assert table["theory, seed"] == "llc, unknown"


def test_a_certificate_survives_json() -> None:
    found = certified()
    stored = json.loads(json.dumps(found.to_dict()))
    assert Certificate.from_dict(stored) == found
    no_logits = certified(Outputs(ORIGINAL.losses, ORIGINAL.scores, ORIGINAL.predictions))
    assert Certificate.from_dict(no_logits.to_dict()).evidence.mean_kl is None


def altered(path: tuple[str, ...], value: Any) -> Any:
    stored = certified().to_dict()
    place = stored
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    return stored


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, r"the certificate is malformed at its top: .* \(got None\)\. Take config\.json again"),
        ({"verdict": object()}, r"the certificate is not made of JSON values"),
        (altered(("verdict",), "loss decreased"), r"verdict 'loss decreased' does not follow .* says 'certified'"),
        (altered(("evidence", "loss_test", "p_value"), 0.5), r"the verdict 'certified' does not follow"),
        (altered(("evidence", "confidence"), 1.0), r"malformed at evidence\.confidence: .*less than 1 \(got 1\.0\)"),
        (altered(("evidence", "flips"), -1), r"malformed at evidence\.flips: .*greater than or equal to 0"),
        (altered(("evidence", "loss_change"), float("nan")), r"malformed at evidence\.loss_change: .*finite number"),
        (altered(("provenance", "author"), "me"), r"malformed at provenance\.author: Extra inputs"),
    ],
    ids=["none", "no-json", "verdict", "p-value", "confidence", "flips", "nan", "unknown-field"],
)
def test_a_certificate_that_was_tampered_with(values: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Certificate.from_dict(values)


def test_what_a_model_card_says() -> None:
    found = certified()
    text = found.paragraph()
    assert text.startswith(
        "Certified. Judged on 4,000 rows that neither calibration (128 rows) nor selection (300 rows)"
    )
    assert "a rise of 0.01 of the original's loss was tolerated, and is kept with " in text and "KL divergence" in text
    superior = certified(outputs(shift=-0.1), tolerance=-0.01, metric_margin=0.0)
    assert "a fall of 0.01 of the original's loss was demanded" in superior.paragraph()
    assert "a rise of 0 was demanded" in superior.paragraph()
    table = found.table()
    assert all(len(row) == 3 and all(isinstance(cell, str) for cell in row) for row in table)
    assert table[-1] == ("verdict", "", "certified")
    assert "mean KL" not in certified(Outputs(ORIGINAL.losses, ORIGINAL.scores, ORIGINAL.predictions)).paragraph()


def test_bad_input() -> None:
    with pytest.raises(ConfigurationError, match=r"confidence=95 is not between 0 and 1"):
        certified(confidence=95)
    with pytest.raises(DataError, match=r"the original's predictions are 4000, the compressed model's 300"):
        certified(outputs(300))


# The walk

GOOD, BAD = certified(), certified(outputs(shift=0.1))


@pytest.mark.parametrize(
    ("verdicts", "plan", "tested"),
    [([GOOD, GOOD, BAD, GOOD], 1, 3), ([GOOD, GOOD], 1, 2), ([BAD, GOOD], None, 1)],
    ids=["stops", "all-pass", "none-passes"],
)
def test_a_walk_stops_at_the_first_failure(verdicts: list[Certificate], plan: int | None, tested: int) -> None:
    seen = []

    def certify_plan(number: int) -> Certificate:
        seen.append(number)
        return verdicts[number]

    found = walk(range(len(verdicts)), certify_plan)
    assert (found.plan, found.tested) == (plan, tested) and seen == list(range(tested))
    assert found.certificate is (GOOD if plan is not None else BAD)
    assert found.stopped == (BAD.verdict if BAD in verdicts else None)


def test_a_plan_that_cannot_be_judged_ends_a_walk() -> None:
    def certify_plan(number: int) -> Certificate:
        if number == 1:
            raise CalibrationError("the loss is nan on row 3")
        return GOOD

    found = walk(range(3), certify_plan)
    assert (found.plan, found.tested) == (0, 2) and found.stopped == "not certified: the loss is nan on row 3"
    with pytest.raises(CalibrationError, match="nan on row 3"):
        walk([1, 2], certify_plan)


def test_a_walk_is_wrong_as_seldom_as_one_test() -> None:
    """Six plans, from the third on at the border: whichever is tested, the walk passes it with chance alpha at most."""
    generator = np.random.default_rng(6)
    wrong = 0
    for _ in range(2000):
        p_values = np.concatenate([[1e-9, 1e-9], generator.random(4)])  # uniform at the border
        wrong += (walk(range(6), lambda plan, p=p_values: GOOD if p[plan] < 0.05 else BAD).plan or 0) >= 2
    assert stats.binomtest(wrong, 2000, 0.05, alternative="greater").pvalue > 0.01
