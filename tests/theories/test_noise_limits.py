"""What lies beyond a theory's neighbourhood is refused, and a layer is never left without a candidate."""

import math

import pytest
import torch
from torch import nn

from hf_lossless.calibration.statistics import calibrate
from hf_lossless.candidates.grids import propose_grids
from hf_lossless.data.batches import batch_loss
from hf_lossless.storage.layers import find_layers
from hf_lossless.theories import cet, hawq, llc
from hf_lossless.theories.noise_limits import SECOND_ORDER, refuse_beyond, rms
from hf_lossless.theories.problem import Prediction, Problem


def problem_of(size: float, bits: tuple[int, ...]) -> Problem:
    """One layer with weights of this size."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 5)).eval()
    with torch.no_grad():
        model[0].weight.normal_(0, size)
    batches = [(torch.randn(12, 24) * 0.1, torch.arange(12) % 5)]
    layers = find_layers(model)
    calibration = calibrate(model, batches, layers, batch_loss)
    candidates = {"0": propose_grids(layers[0], calibration.layers["0"], bits, None, True)}
    return Problem(model, batches, batch_loss, layers, calibration, candidates)


@pytest.mark.parametrize("theory", [llc, hawq, cet], ids=["llc", "hawq", "cet"])
def test_noise_beyond_the_second_order_is_refused(theory):
    problem = problem_of(1.0, (1, 2, 4, 8, 16))
    noises = [rms(one.error(problem.layers[0].matrix)) for one in problem.candidates["0"]]
    assert noises[0] > noises[1] > SECOND_ORDER > noises[2]
    assert [one.usable for one in theory.predict(problem)["0"]] == [False, False, True, True, True]
    assert all(one.usable for one in theory.predict(problem_of(0.05, (1, 2, 4, 8, 16)))["0"])


@pytest.mark.parametrize("theory", [llc, hawq, cet], ids=["llc", "hawq", "cet"])
def test_the_least_noisy_is_left_where_all_would_be_refused(theory):
    assert [one.usable for one in theory.predict(problem_of(30.0, (1, 2, 4)))["0"]] == [False, False, True]


def test_what_was_refused_before_stays_refused():
    problem = problem_of(0.05, (2, 4))
    predictions = [Prediction(math.inf), Prediction(0.1)]
    assert refuse_beyond(problem.layers[0], problem.candidates["0"], predictions) == predictions
    assert refuse_beyond(problem.layers[0], [], []) == []
