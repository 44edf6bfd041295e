"""The bounds of one request."""

import pytest

from darkroom.errors import InputError
from darkroom.serving.limits import Limits


def test_images_up_to_the_bound_pass() -> None:
    Limits(max_images=3).check_images(3)
    with pytest.raises(InputError, match="4 rows: expected at most 3 in one request"):
        Limits(max_images=3).check_images(4)


def test_work_counts_what_passes_through_the_network() -> None:
    limits = Limits(max_work=100)
    limits.check_work(10, 10, guided=False)
    limits.check_work(5, 10, guided=True)
    limits.check_work(0, 1000, guided=True)
    with pytest.raises(InputError, match="10 images x 11 network evaluations = 110: expected at most 100"):
        limits.check_work(10, 11, guided=False)
    with pytest.raises(InputError, match="6 images x 10 network evaluations x 2 for guidance = 120"):
        limits.check_work(6, 10, guided=True)


def test_a_full_request_and_a_thousand_steps_are_possible_by_default() -> None:
    limits = Limits()
    limits.check_images(256)
    limits.check_work(256, 125, guided=True)
    limits.check_work(32, 1000, guided=True)


def test_the_environment_sets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DARKROOM_MAX_IMAGES", "7")
    monkeypatch.setenv("DARKROOM_MAX_WORK", "")
    assert Limits.from_environment() == Limits(max_images=7)
    monkeypatch.setenv("DARKROOM_MAX_WORK", "1000000")
    assert Limits.from_environment() == Limits(max_images=7, max_work=1_000_000)


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", "1e3", "٣"])
def test_what_is_no_bound_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("DARKROOM_MAX_IMAGES", text)
    with pytest.raises(InputError, match=f"DARKROOM_MAX_IMAGES = '{text}': expected a whole number, at least 1"):
        Limits.from_environment()
