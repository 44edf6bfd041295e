"""What a run says while a stage is silent."""

from pathlib import Path

import pytest

from flows import dvc_stage


def test_a_silent_stage_gives_a_sign_of_life_within_ten_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, said = 100.0, []
    monkeypatch.setattr(dvc_stage.time, "monotonic", lambda: now)
    patience = dvc_stage._Patience(tmp_path, said.append)
    patience.hear("Running stage 'train':")
    for _ in range(200):
        now += 0.1
        patience.watch(1)
    patience.hear("training: starting")
    patience.watch(1)
    silent = [f"still running, silent for {seconds} s" for seconds in (8, 16)]
    assert said == ["Running stage 'train':", *silent, "training: starting"]
