"""Which arithmetic a device computes in: measured, logged once, and kept by a training that is resumed elsewhere."""

import logging
import os
import subprocess
import sys

import pytest
import torch

from darkroom import arithmetic
from darkroom.arithmetic import Speed, precision_on, speed
from darkroom.errors import Interrupted
from darkroom.nets.inference import InferenceUNet
from tests.unit.nets.networks import SMALL, network
from tests.unit.training.small import small_training
from tests.unit.training.test_loop import assert_bitwise_equal, stop_by_signal, weights

CPU = torch.device("cpu")
EMULATED = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}  # set before torch is imported
FAST, SLOW = Speed("this processor", fp32=2.0, bf16=1.0), Speed("this processor", fp32=1.0, bf16=20.0)


@pytest.fixture
def found(monkeypatch, caplog):
    """`found(FAST)`: what the probe finds from now on."""
    caplog.set_level(logging.INFO, logger="darkroom")

    def set_speed(result):
        arithmetic._log_once.cache_clear()
        caplog.clear()
        for module in (arithmetic, sys.modules["darkroom.training.loop"]):
            monkeypatch.setattr(module, "speed", lambda device: result)

    return set_speed


def test_a_processor_without_bf16_instructions_computes_in_fp32():
    """The slow processor, emulated on any x86 one; where there is no oneDNN to be told so, bf16 is as slow anyway."""
    command = [sys.executable, "-m", "darkroom.arithmetic"]
    said = subprocess.run(command, env=os.environ | EMULATED, check=True, capture_output=True, text=True).stdout
    assert said.endswith("a bf16 recipe computes in fp32\n")


def test_the_probe_leaves_threads_and_random_numbers_as_they_were():
    before, state = torch.get_num_threads(), torch.get_rng_state()
    measured = speed.__wrapped__(CPU)
    assert 0 < measured.fp32 < 1
    assert 0 < measured.bf16 < 10
    assert torch.get_num_threads() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_bf16_becomes_fp32_where_it_is_no_faster_and_one_line_says_so(found, caplog):
    found(SLOW)
    assert [precision_on(CPU, asked) for asked in ("bf16", "fp32", "tf32", "bf16")] == ["fp32", "fp32", "tf32", "fp32"]
    assert [record.getMessage() for record in caplog.records] == [
        "this processor has no fast bf16: computing in fp32 (the same work takes 2e+04 ms in bf16, 1e+03 ms in fp32)"
    ]
    found(FAST)
    assert precision_on(CPU, "bf16") == "bf16"
    assert not caplog.records


def test_noise_does_not_decide():
    assert not Speed("", fp32=1.05, bf16=1.0).bf16_is_faster


def test_drawing_follows_the_probe(found):
    unet = network(SMALL)
    for result, dtype in ((SLOW, torch.float32), (FAST, torch.bfloat16)):
        found(result)
        assert InferenceUNet(unet, "bf16")._dtype == dtype


@pytest.mark.parametrize(("first", "then", "kept"), [(SLOW, FAST, "fp32"), (FAST, SLOW, "bf16")])
def test_a_training_resumed_on_another_processor_keeps_its_arithmetic(tmp_path, found, caplog, first, then, kept):
    found(first)
    whole = small_training(tmp_path / "a", precision="bf16")
    with pytest.raises(Interrupted):
        small_training(tmp_path / "b", precision="bf16", on_tick=stop_by_signal(7))
    found(then)
    resumed = small_training(tmp_path / "b", precision="bf16")
    assert resumed.precision == whole.precision == kept
    assert_bitwise_equal(weights(whole), weights(resumed))
    other = "bf16" if kept == "fp32" else "fp32"
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"this training began in {kept} and goes on in it; on this processor {other} is faster"]


def test_a_bf16_recipe_on_a_slow_processor_is_the_fp32_recipe(tmp_path, found):
    found(SLOW)
    assert_bitwise_equal(
        weights(small_training(tmp_path / "a", precision="bf16")),
        weights(small_training(tmp_path / "b", precision="fp32")),
    )


@pytest.mark.gpu
def test_a_gpu_measures_itself(gpu):
    measured = speed(gpu)
    assert 0 < measured.bf16 < 10
    if gpu.type == "cuda":
        assert measured.name == torch.cuda.get_device_name()
        assert measured.bf16_is_faster == torch.cuda.is_bf16_supported(including_emulation=False)
