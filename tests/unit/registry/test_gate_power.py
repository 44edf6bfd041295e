"""The gate's statistics, simulated: what it refuses by chance, what it keeps out, and how far ties slide."""

import random
import statistics

import pytest
import yaml

from benchmarks import gate as simulation
from darkroom.evaluation.protocol import Estimate
from darkroom.files import read_json
from darkroom.params import GatePolicy
from tests.integration.registry_project import score_record

PARAMS = yaml.safe_load((simulation.ROOT / "params.yaml").read_text())
POLICY = GatePolicy.model_validate(PARAMS["registry"]["gate"])
MEASURED = read_json(simulation.RESULTS / "scatter.json")


@pytest.fixture(scope="module")
def found() -> dict:  # type: ignore[type-arg]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulation, "TRIES", 1500)
        patch.setattr(simulation, "SLIDES", 60)
        record = score_record(accuracy=1.0, guided_accuracy=1.0)
        return simulation.power(MEASURED, POLICY, record, len(PARAMS["sample"]["seeds"]))


def test_where_only_samples_scatter_a_verdict_is_right(found: dict) -> None:  # type: ignore[type-arg]
    """Before, with errors that were too large by half, a model two deviations worse passed more often than not."""
    world = found["samples"]
    assert world["refused"]["0.0"] <= 0.02
    assert world["false_refusals"] <= 0.02, "beside the best of up to thirty others"
    assert world["refused"]["2.0"] >= 0.5
    assert world["refused"]["4.0"] >= 0.99


def test_where_only_samples_scatter_thirty_slides_end_near_where_they_began(found: dict) -> None:  # type: ignore[type-arg]
    slides = found["samples"]["slides"]
    assert slides["mean"] <= 1.35
    assert slides["without_bar"] > 2.5


def test_where_trainings_scatter_a_retrained_model_is_not_refused_for_its_luck(found: dict) -> None:  # type: ignore[type-arg]
    """The price is that less is told apart: what is within the scatter of trainings passes."""
    world = found["trainings"]
    assert world["refused"]["0.0"] <= 0.02
    assert world["slides"]["mean"] < 0.55 * world["slides"]["without_bar"]


def test_the_policy_says_the_scatter_that_was_measured() -> None:
    assert POLICY.retraining_scatter == pytest.approx(MEASURED["retraining_scatter"], abs=0.01)


def test_the_scatter_of_trainings_is_what_samples_do_not_explain() -> None:
    """Simulated: trainings by 0.1, what a seed draws for all of them by 0.2, samples of each by 0.1, six seeds."""
    generator = random.Random(0)
    found = []
    for _ in range(300):
        common = [0.2 * generator.gauss() for _ in range(6)]
        records = []
        for _ in range(5):
            trained = 1 + 0.1 * generator.gauss()
            values = [trained + shared + 0.1 * generator.gauss() for shared in common]
            fid = Estimate(value=statistics.mean(values), spread=None, low=None, high=None, seeds=values)
            scored = score_record()
            unguided = scored.unguided.model_copy(update={"fid": fid})
            records.append(scored.model_copy(update={"unguided": unguided}))
        found.append((simulation.summary(records)["retraining_scatter"] * simulation.summary(records)["mean"]) ** 2)
    assert statistics.mean(found) ** 0.5 == pytest.approx(0.1, rel=0.1)
