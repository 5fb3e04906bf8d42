"""A Cholesky factor, or an error of this package."""

import pytest
import torch
from metrics_by_hand import second_moments

from hf_lossless.calibration.curvature import KroneckerFactors
from hf_lossless.candidates.cholesky import cholesky
from hf_lossless.candidates.feedback import Metric
from hf_lossless.candidates.low_rank import Whitening
from hf_lossless.errors import CalibrationError

INDEFINITE = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
MESSAGE = r"a matrix \[2, 2\] that is not positive definite\. Check the scale .* modules_to_not_convert"


def test_it_is_a_root():
    metric = second_moments(6, seed=0)
    root = cholesky(metric)
    torch.testing.assert_close(root @ root.mT, metric)
    assert torch.equal(root, root.tril())


@pytest.mark.parametrize(
    "rounding",
    [
        lambda: cholesky(INDEFINITE),
        lambda: Metric.of(INDEFINITE[None], 0.03),
        lambda: Whitening.of(KroneckerFactors(torch.ones(3), INDEFINITE, 1.0)),
    ],
    ids=["itself", "feedback", "low-rank"],
)
def test_what_is_not_positive_definite_is_an_error_of_this_package(rounding):
    with pytest.raises(CalibrationError, match=MESSAGE):
        rounding()
