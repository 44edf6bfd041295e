"""The gate's statistics, simulated: what it refuses by chance, what it keeps out, and how far ties slide."""

import random

import pytest
import yaml

from benchmarks import gate as simulation
from darkroom.files import read_json
from darkroom.params import GatePolicy
from tests.integration.registry_project import score_record

MEASURED = read_json(simulation.RESULTS / "scatter.json")
POLICY = GatePolicy.model_validate(
    yaml.safe_load((simulation.ROOT / "params.yaml").read_text())["registry"]["gate"]
    | {"max_fid": 1e6, "max_seconds_per_image": 1e6}
)
DEVIATION = sum(MEASURED["deviation_of_one_set"]) / len(MEASURED["deviation_of_one_set"]) / MEASURED["mean"]
RECORD = score_record(accuracy=1.0, guided_accuracy=1.0)


@pytest.fixture(autouse=True)
def _few_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation, "TRIES", 2000)
    monkeypatch.setattr(simulation, "SLIDES", 60)


@pytest.fixture(params=[0.0, MEASURED["retraining_scatter"]], ids=["samples scatter", "trainings scatter too"])
def draw(request: pytest.FixtureRequest) -> simulation.Draw:
    return simulation.drawing(RECORD, DEVIATION, request.param, MEASURED["seeds"])


def test_an_equally_good_challenger_is_refused_in_two_percent_of_tries_at_most(draw: simulation.Draw) -> None:
    assert simulation.refused(POLICY, draw, 1.0) <= 0.02
    assert simulation.beside_many(POLICY, draw) <= 0.02


def test_one_that_is_two_deviations_worse_is_refused_in_half_of_them_at_least(draw: simulation.Draw) -> None:
    assert simulation.refused(POLICY, draw, 1 + 2 * DEVIATION) >= 0.5
    assert simulation.refused(POLICY, draw, 1 + 4 * DEVIATION) >= 0.95


def test_thirty_slides_end_near_where_they_began(draw: simulation.Draw) -> None:
    """Without the best champion as a bar they ended at 2.5 times the FID."""
    ends = [simulation.slide(POLICY, draw, random.Random(number), bar=True) for number in range(60)]
    before = [simulation.slide(POLICY, draw, random.Random(number), bar=False) for number in range(60)]
    assert sum(ends) / len(ends) <= 1.35 < sum(before) / len(before)


def test_the_policy_says_the_scatter_that_was_measured() -> None:
    assert POLICY.retraining_scatter == pytest.approx(MEASURED["retraining_scatter"], abs=0.01)
