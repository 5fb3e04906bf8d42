"""The walk from the safest plan to the smallest: fixed-sequence testing of plans on the certification rows.

Plans 1, 2, .., K are tested in an order that is fixed before the certification rows are looked at (by predicted or
selected loss, never by these rows), each at the full level alpha, until one fails. The last that passed is certified.

**Why alpha is not divided.** Let j be the first plan in the order that is truly worse. To certify any bad plan the walk
has to reach j and pass it, since later plans are tested only then. So

    P(some bad plan is certified) <= P(plan j passes) <= alpha

whatever the plans after j are, however many they are, and however their tests depend on each other. The loss need not
be monotone: a poor order only stops the walk early.

**Why loss and metric do not share alpha.** A plan passes only if both tests do. A plan is bad if its loss *or* its
metric is worse by the margin; to pass, that one test has to err, with probability alpha at most. (An intersection-union
test: the hypothesis is a union, rejected only as a whole.)

Sources: W. Maurer, L. Hothorn & W. Lehmacher, "Multiple comparisons in drug clinical trials and preclinical assays:
a-priori ordered hypotheses", in Biometrie in der chemisch-pharmazeutischen Industrie 6, 1995. P. Westfall & A. Krishen,
"Optimally weighted, fixed sequence and gatekeeper multiple testing procedures", J. Statist. Plann. Inference 99, 2001.
A. Angelopoulos, S. Bates, E. Candes, M. Jordan & L. Lei, "Learn then test", arXiv 2110.01052, 2021, section 2. R.
Berger, "Multiparameter hypothesis testing and acceptance sampling", Technometrics 24, 1982 (intersection-union).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from hf_lossless.certification.certificate import Certificate
from hf_lossless.errors import CalibrationError

Plan = TypeVar("Plan")


@dataclass(frozen=True)
class Walk(Generic[Plan]):
    """The result of a walk: the plan it certified, and where it stopped.

    Attributes:
        plan: The last plan that passed; None where the first failed.
        certificate: Certificate of that plan; where no plan passed, that of the first plan, with the reason.
        tested: Number of plans tested, including the one that failed.
        stopped: Reason why the walk ended: the verdict of the failing plan, or that it could not be judged; None where
            every plan passed.
    """

    plan: Plan | None
    certificate: Certificate
    tested: int
    stopped: str | None


def walk(plans: Iterable[Plan], certify_plan: Callable[[Plan], Certificate]) -> Walk[Plan]:
    """Tests plans in order and stops at the first that fails.

    Args:
        plans: At least one plan, from the safest to the smallest, in an order that does not depend on the certification
            rows.
        certify_plan: Applies a plan, runs it on the certification rows, and judges it. Called once for each plan up to
            the first failure. A CalibrationError from it (an output that is not finite) is a failure too.

    Raises:
        CalibrationError: The first plan cannot be judged.
    """
    passed: Plan | None = None
    certificate: Certificate | None = None
    tested = 0
    for tested, plan in enumerate(plans, start=1):
        try:
            verdict = certify_plan(plan)
        except CalibrationError as error:
            if certificate is None:
                raise
            return Walk(passed, certificate, tested, f"not certified: {error}")
        if not verdict.passed:
            return Walk(passed, certificate or verdict, tested, verdict.verdict)
        passed, certificate = plan, verdict
    assert certificate is not None, "a walk needs a plan"
    return Walk(passed, certificate, tested, None)
