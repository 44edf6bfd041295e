import pytest

from darkroom.errors import InputError
from darkroom.stages import environment

NAME = "DARKROOM_TEST_NUMBER"


@pytest.mark.parametrize(("text", "value"), [(None, 30.0), ("", 30.0), ("0", 0.0), ("1.5", 1.5), ("1e9", 1e9)])
def test_seconds(monkeypatch, text, value):
    monkeypatch.delenv(NAME, raising=False) if text is None else monkeypatch.setenv(NAME, text)
    assert environment.seconds(NAME, 30.0) == value


@pytest.mark.parametrize("text", ["-1", "soon", "nan", "inf", "1,5"])
def test_seconds_that_are_none(monkeypatch, text):
    monkeypatch.setenv(NAME, text)
    with pytest.raises(InputError, match=f"{NAME} = '{text}': expected a number of seconds, 0 or more"):
        environment.seconds(NAME, 30.0)


@pytest.mark.parametrize(("text", "value"), [(None, None), ("", None), ("1", 1), ("128", 128)])
def test_counts(monkeypatch, text, value):
    monkeypatch.delenv(NAME, raising=False) if text is None else monkeypatch.setenv(NAME, text)
    assert environment.count(NAME) == value


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "many", "²"])
def test_counts_that_are_none(monkeypatch, text):
    monkeypatch.setenv(NAME, text)
    with pytest.raises(InputError, match=f"{NAME} = '{text}': expected a whole number, 1 or more"):
        environment.count(NAME)
