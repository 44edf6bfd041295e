"""The benchmark runs contenders fairly, cleans up after itself, and its tables say what was measured."""

import io
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import interleaved, machine, report, sampling, trainers, training, training_report
from benchmarks.contenders import MODELS, Clock, card
from darkroom.params import load_params

ROOT = Path(__file__).parents[2]


def measured(**changes: Any) -> report.Case:
    """Two rounds, the second on a machine half as fast: 2 images, 5 steps."""
    seconds = {
        "darkroom": [1.0, 2.0],
        "plain UNet": [1.2, 2.4],
        "diffusers": [1.5, 3.0],
        "denoising-diffusion-pytorch": [1.4, 4.0],
    }
    return {
        "model": "A64",
        "precision": "bf16",
        "device": "cpu",
        "batch_size": 2,
        "steps": 5,
        "seconds": seconds,
        "loop": [0.8, 1.6],
        "network": [0.792, 1.584],
    } | changes


def result(*cases: report.Case, gpu: str | None = None) -> report.Result:
    macs = dict.fromkeys(measured()["seconds"], 11_780_000_000) | {"denoising-diffusion-pytorch": 7_300_000_000}
    networks = {name: {"library": "1.0", "parameters": 63_154_051, "macs": count} for name, count in macs.items()}
    described = {"cpu": "Fast CPU", "capabilities": ["avx2"], "cores": 2, "threads": 2, "gpu": gpu, "torch": "2.13.0"}
    return {"machine": described, "models": {"A64": networks}, "cases": list(cases)}


@pytest.mark.parametrize("name", MODELS)
def test_what_is_measured_are_the_recipes(name: str) -> None:
    params = load_params(ROOT / "params" / f"{trainers.RECIPES[name]}.yaml")
    model, recipe = MODELS[name], params.train.model
    assert card(model).unet == recipe.model_copy(update={"dropout": 0.0})
    assert (model.image_size, model.image_channels) == (params.data.image_size, params.data.channels)
    assert model.schedule == params.train.schedule.name


def test_contenders_run_in_turn_after_a_run_that_does_not_count_and_each_is_first_in_every_other_round() -> None:
    calls: list[str] = []

    def contender(name: str) -> interleaved.Ask:
        def ask(*, batch_size: int, steps: int) -> dict[str, float]:
            assert (batch_size, steps) == (8, 3)
            calls.append(name)
            return {"seconds": float(len(calls)), "loop": 0.75, "network": 0.5}

        return ask

    order = ("darkroom", "diffusers", "other")
    runs = sampling.measure({name: contender(name) for name in order}, batch_size=8, steps=3, rounds=3)
    assert "".join(name[1] for name in calls) == "ait" + "ait" + "tia" + "ait"
    assert runs["seconds"] == {"darkroom": [4, 9, 10], "diffusers": [5, 8, 11], "other": [6, 7, 12]}
    assert (runs["loop"], runs["network"]) == ([0.75] * 3, [0.5] * 3)


def test_a_machine_that_slows_down_between_rounds_does_not_change_the_ratio() -> None:
    assert report.ratios(measured(), "diffusers") == [1.5, 1.5]
    assert report.best_peer(measured()) == "diffusers"  # the other one: 1.4 and 2.0
    assert report.per_step_and_image(measured(), "darkroom") == pytest.approx(0.15)


def test_overhead_is_the_part_of_the_loop_that_the_network_did_not_take() -> None:
    assert report.overhead(measured()) == pytest.approx(0.01)
    clock = Clock()
    assert clock.wrap(lambda seconds: time.sleep(seconds) or "slept")(0.01) == "slept"
    assert clock.seconds >= 0.01


def test_the_table_names_the_machine_and_holds_the_measured_figures() -> None:
    rendered = report.render([result(measured())])
    assert "Fast CPU, 2 cores" in rendered
    assert "| A64 | diffusers | 1.0 | 63.15 M | 11.8 G |" in rendered
    ratios = "**1.50** (1.50–1.50) | 1.70 (1.40–2.00) | 2.74"  # the last is 1.7 · 11.78 / 7.3
    assert f"| A64 | bf16 | 2 | 150 | 180 | 225 | 270 | {ratios} | 1.0% |" in rendered


def test_a_gpu_gets_images_per_second_and_its_share_of_a_known_peak_only() -> None:
    on_gpu = measured(device="cuda")  # 1.5 s for 5 steps of 2 images
    share = 2 * 11.78e9 * 10 / 1.5 / 790e12
    assert report.share_of_peak(on_gpu, "darkroom", 11_780_000_000, "NVIDIA H200") == pytest.approx(share)
    assert report.share_of_peak(on_gpu, "darkroom", 11_780_000_000, "Another GPU") is None
    assert report.share_of_peak(on_gpu | {"precision": "fp32"}, "darkroom", 11_780_000_000, "NVIDIA H200") is None
    rendered = report.render([result(on_gpu, gpu="NVIDIA H200")])
    assert "| A64 | bf16 | diffusers | 2 | 0.9 | 0.0% | 1.50 |" in rendered


def test_tables_replace_only_what_is_between_the_markers() -> None:
    page = f"before\n{report.START}\nold\n{report.END}\nafter\n"
    renewed = report.insert(page, "| new |")
    assert renewed == f"before\n{report.START}\n\n| new |\n\n{report.END}\nafter\n"
    assert report.insert(renewed, "| new |") == renewed
    with pytest.raises(ValueError, match="once each"):
        report.insert("no markers", "| new |")


def test_the_page_shows_the_results_that_are_kept_beside_it() -> None:
    kept = [json.loads(path.read_text()) for path in sorted(sampling.RESULTS.glob("*.json"))]
    page = sampling.README.read_text()
    assert report.insert(page, report.render(kept)) == page
    tables = training_report.render(training.kept())
    assert report.insert(page, tables, training_report.START, training_report.END) == page


def test_cpuinfo_gives_the_name_and_what_the_processor_can_do() -> None:
    text = (
        "processor\t: 0\ncpu family\t: 6\nmodel\t\t: 207\nmodel name\t: Intel(R) Xeon(R)\nflags\t: fpu avx2 amx_bf16\n"
    )
    parsed = machine.parse_cpuinfo(text + text.replace("207", "208"))
    assert parsed == {"cpu": "Intel(R) Xeon(R) (family 6 model 207)", "capabilities": ["avx2", "amx_bf16"]}
    assert "processor" in machine.parse_cpuinfo("")["cpu"]
    assert machine.slug({"gpu": None, "cpu": parsed["cpu"], "cores": 2}) == "intel-xeon-family-6-model-207-2-cores"


def test_a_process_answers_until_it_ends_and_then_its_last_words_are_told() -> None:
    echo = "import sys\nprint(sys.stdin.readline(), end='', flush=True)\nraise SystemExit('no memory left')"
    with interleaved.running("fake", [sys.executable, "-c", echo]) as process:
        assert process.ask(batch_size=8, steps=3) == {"batch_size": 8, "steps": 3}
        with pytest.raises(interleaved.ContenderFailed, match=r"(?s)fake ended with exit code 1.*no memory left"):
            process.ask(batch_size=8, steps=3)


def test_an_interrupted_benchmark_leaves_no_process_behind() -> None:
    forever = "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)"
    started: list[int] = []

    def interrupted() -> None:
        with interleaved.running("fake", [sys.executable, "-c", forever]) as process:
            started.append(int(str(process.answer())))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with pytest.raises(ProcessLookupError):
        os.kill(started[0], 0)


def test_peers_are_not_told_how_our_openmp_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    show = "import json, os; print(json.dumps(dict(os.environ)))"
    with interleaved.running("fake", [sys.executable, "-c", show]) as process:
        environment = process.answer()
    assert "OMP_WAIT_POLICY" not in environment
    assert environment["OMP_NUM_THREADS"] == os.environ["OMP_NUM_THREADS"]


def test_missing_peers_are_named_with_what_installs_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(interleaved, "PEERS", interleaved.ROOT / ".venv" / "not-there")
    assert sampling.main([]) == 2
    assert "denoising-diffusion-pytorch" in (message := capsys.readouterr().err)
    assert "make bench" in message


@pytest.mark.parametrize("main", [sampling.main, training.main])
@pytest.mark.parametrize(
    "arguments", [["--rounds", "0"], ["--rounds", "100"], ["--write", "--models", "digits"], ["--models", "A128"]]
)
def test_what_cannot_be_measured_is_refused(
    main: Callable[[list[str]], int], arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert arguments[0] in capsys.readouterr().err


def trained(**changes: Any) -> report.Case:
    """Two rounds, the second on a machine half as fast: 2 images, 5 steps."""
    seconds = {
        "darkroom fp32": [1.0, 2.0],
        "diffusers fp32": [1.5, 3.0],
        "denoising-diffusion-pytorch fp32": [1.25, 2.0],
        "darkroom bf16": [0.5, 1.0],
        "diffusers bf16": [0.8, 1.6],
        "denoising-diffusion-pytorch bf16": [1.0, 2.0],
    }
    memory = {name: [2_000_000_000, 3_000_000_000] for name in seconds}
    case = {"model": "A64", "device": "cpu", "batch_size": 2, "steps": 5, "seconds": seconds, "memory": memory}
    return case | changes


def test_training_is_compared_at_equal_precision_and_as_users_run_it() -> None:
    case = trained()
    assert training_report.images_per_second(case, "darkroom bf16") == pytest.approx(10 / 0.75)
    assert training_report.best_peer(case, "darkroom fp32", "fp32") == "denoising-diffusion-pytorch fp32"
    assert training_report.best_peer(case, "darkroom bf16", "bf16") == "diffusers bf16"
    assert training_report.as_users_run_it(case) == "darkroom bf16"
    slow_bf16 = case["seconds"] | {"darkroom bf16": [4.0, 8.0]}
    assert training_report.as_users_run_it(trained(seconds=slow_bf16)) == "darkroom fp32"
    rendered = training_report.render([result(case)])
    # 10 images in medians of 1.5, 2.25 and 1.625 s; 1.125 · 11.78 / 7.3 = 1.82
    ratios = "1.50 (1.50–1.50) | **1.12** (1.00–1.25) | 1.82"
    assert f"| A64 | fp32 | 2 | 6.67 | 4.44 | 6.15 | {ratios} | 3.0 / 3.0 / 3.0 |" in rendered
    users = "| A64 | darkroom bf16 | denoising-diffusion-pytorch fp32 | **2.25** (2.00–2.50) |"
    assert users in rendered


def test_fp32_is_what_users_run_where_bf16_is_slow_and_bf16_alone_compares_with_nobody() -> None:
    def rendered(precision: str) -> str:
        seconds = {name: times for name, times in trained()["seconds"].items() if name.endswith(precision)}
        return training_report.render([result(trained(seconds=seconds))])

    assert "| A64 | darkroom fp32 | denoising-diffusion-pytorch fp32 |" in rendered("fp32")
    assert "as users run them" not in rendered("bf16")


def test_a_limited_processor_is_a_machine_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in machine.LIMITS:  # the tests may run on one
        monkeypatch.delenv(name, raising=False)
    whole = machine.describe()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    limited = machine.describe()
    assert "limited to avx2" in machine.sentence(limited)
    assert machine.slug(limited) == f"{machine.slug(whole)}-avx2"


def test_a_gpu_trains_at_a_share_of_a_known_peak() -> None:
    names = ("darkroom compiled", "diffusers compiled")
    seconds = {f"{name} bf16": [0.01 * (1 + place)] * 2 for place, name in enumerate(names)}
    case = trained(device="cuda", batch_size=8, seconds=seconds, memory={name: [1e9] for name in seconds})
    described = result(case, gpu="NVIDIA H200")
    described["models"]["A64"] = {name: {"library": "1", "parameters": 1, "macs": 11_780_000_000} for name in names}
    share = 6 * 11.78e9 * 4000 / 790e12
    assert training_report.share_of_peak(case, "darkroom compiled bf16", 11_780_000_000, "NVIDIA H200") == share
    assert training_report.share_of_peak(case, "darkroom compiled bf16", 11_780_000_000, "Another GPU") is None
    assert training_report.share_of_peak(case, "darkroom compiled fp32", 11_780_000_000, "NVIDIA H200") is None
    row = f"| A64 | bf16 | darkroom compiled | 8 | 4000 | {share:.1%} | 1.0 | 2.00 (2.00–2.00) |"
    assert row in training_report.render([described])


def test_a_training_runs_on_for_each_request_and_ends_with_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    size, answers, steps = trainers.Size(4, 3, 1), [], []
    line = '{"batch_size": 4, "steps": 3}\n'
    monkeypatch.setattr(sys, "stdin", io.StringIO(2 * line))
    with pytest.raises(trainers.Done):
        trainers.repeat(lambda: steps.append(time.sleep(0.01)), 3, trainers.Turns(answers.append, size, "cpu"))
    assert len(steps) == 6
    assert [answer["seconds"] >= 0.03 for answer in answers] == [True, True]
    assert answers[0]["memory"] > 10_000_000
    monkeypatch.setattr(sys, "stdin", io.StringIO(line))
    with pytest.raises(ValueError, match=r"built for .*8.*, asked for .*4"):
        trainers.Turns(answers.append, trainers.Size(8, 3, 1), "cpu")()


def test_ours_is_the_training_of_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trainers.ON_CPU, "digits", trainers.Size(4, 2, 1))
    monkeypatch.setattr(sys, "stdin", io.StringIO(2 * '{"batch_size": 4, "steps": 2}\n'))
    answers: list[dict[str, Any]] = []
    trainer = trainers.ours("digits", "bf16", "cpu")
    before = [parameter.clone() for parameter in trainer.network.parameters()]
    with pytest.raises(trainers.Done):
        trainer.train(trainers.Turns(answers.append, trainers.size_of("digits", "cpu"), "cpu"))
    assert len(answers) == 2
    pairs = zip(before, trainer.network.parameters(), strict=True)
    assert any(not bool((old == new).all()) for old, new in pairs)
