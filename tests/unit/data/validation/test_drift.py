"""Drift: the distances by their definitions, and what cannot be compared."""

from pathlib import Path

import numpy as np
import pytest

from darkroom.data.statistics import DataStatistics
from darkroom.data.validation.drift import measure, read_accepted, write_accepted
from darkroom.errors import InputError


def statistics(
    classes: dict[str, int], seed: int = 0, low: int = 0, high: int = 256, channels: int = 3, size: int = 8
) -> tuple[DataStatistics, np.ndarray]:
    images = sum(classes.values()) or 10
    pixels = np.random.default_rng(seed).integers(low, high, (images, channels, size, size), dtype=np.uint8)
    made = DataStatistics(
        name="pets",
        digest=f"{seed:064x}",
        image_size=size,
        channels=channels,
        classes=classes,
        images=images,
        sums=pixels.sum(axis=(0, 2, 3), dtype=np.int64).tolist(),
        squares=(pixels.astype(np.int64) ** 2).sum(axis=(0, 2, 3)).tolist(),
    )
    return made, pixels


def test_class_drift_is_the_total_variation_distance_of_the_shares() -> None:
    before, now = {"ant": 10, "bee": 30, "cow": 60}, {"bee": 5, "cow": 10, "dog": 5}
    drift = measure(statistics(before)[0], statistics(now, seed=1)[0])
    p = np.array([0.1, 0.3, 0.6, 0.0])
    q = np.array([0.0, 0.25, 0.5, 0.25])
    assert drift.class_drift == pytest.approx(np.abs(p - q).sum() / 2)
    assert drift.class_drift == pytest.approx(np.maximum(p - q, 0).sum())  # the largest difference over all events
    assert (drift.new, drift.vanished) == (["dog"], ["ant"])
    assert [change.name for change in drift.classes] == ["dog", "ant", "cow", "bee"]
    assert not drift.same
    assert drift.comparable


def test_channel_drift_is_measured_in_accepted_deviations() -> None:
    (accepted, old), (current, new) = (
        statistics({"ant": 20}),
        statistics({"ant": 9}, seed=1, low=100, high=220),
    )
    axes = (0, 2, 3)
    means = np.abs(new.mean(axes) - old.mean(axes)) / old.std(axes)
    deviations = np.abs(new.std(axes) - old.std(axes)) / old.std(axes)
    drift = measure(accepted, current)
    assert [channel.name for channel in drift.channels] == ["red", "green", "blue"]
    assert [channel.drift for channel in drift.channels] == pytest.approx(np.maximum(means, deviations).tolist())
    assert drift.channel_drift == pytest.approx(max(means.max(), deviations.max()))


def test_same_data_has_not_drifted() -> None:
    data, _ = statistics({"ant": 4, "bee": 2})
    drift = measure(data, data)
    assert (drift.same, drift.class_drift, drift.channel_drift) == (True, 0, 0)
    assert (drift.new, drift.vanished, drift.reasons) == ([], [], [])


def test_constant_accepted_images_give_a_finite_drift() -> None:
    drift = measure(statistics({"ant": 4}, low=7, high=8)[0], statistics({"ant": 4}, low=10, high=11)[0])
    assert drift.channel_drift == 3


def test_other_sizes_and_channels_are_not_compared_but_classes_are() -> None:
    data = statistics({"ant": 4})[0]
    for other in (statistics({"ant": 4}, size=16)[0], statistics({"ant": 4}, channels=1)[0]):
        drift = measure(other, data)
        assert not drift.comparable
        assert (drift.class_drift, drift.channel_drift) == (0, None)
        assert "these are 3x8x8" in drift.channel_sentence()


def test_labelled_and_unlabelled_data_are_compared_by_their_channels_alone() -> None:
    labelled, unlabelled = statistics({"ant": 10})[0], statistics({})[0]
    drift = measure(labelled, unlabelled)
    assert (drift.class_drift, drift.channel_drift) == (None, 0)
    assert "has labels, this one has none" in drift.class_sentence()
    assert "has no labels, this one has" in measure(unlabelled, labelled).class_sentence()
    assert measure(unlabelled, unlabelled).class_drift == 0


def test_class_names_in_a_sentence_are_few_and_harmless() -> None:
    now = statistics({f"a\x1b{i}": 1 for i in range(10)})[0]
    sentence = measure(statistics({"ant": 10})[0], now).class_sentence()
    assert "10 new: " in sentence
    assert "…" in sentence
    assert sentence.isprintable()


def test_accepted_file_gives_back_whose_decision_it_was(tmp_path: Path) -> None:
    path = tmp_path / "accepted.json"
    assert read_accepted(path) is None
    data, _ = statistics({"ant": 4})
    write_accepted(path, data, "ann", "2026-01-02T03:04:05+00:00", "first")
    accepted = read_accepted(path)
    assert accepted is not None
    assert (accepted.who, accepted.when, accepted.reason) == ("ann", "2026-01-02T03:04:05+00:00", "first")
    assert measure(accepted, data) == measure(data, data)
    path.write_text(path.read_text().replace('"who"', '"whom"'))
    with pytest.raises(InputError, match=r"accepted\.json: who.*take it back from git"):
        read_accepted(path)
    path.write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        read_accepted(path)
