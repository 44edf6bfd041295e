"""`make gpu` is rehearsed from its first to its last line, and whatever goes wrong on the day costs one part alone."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks import gpu, gpu_parts, gpu_recipes, gpu_report

ROOT = Path(__file__).parents[2]
# All that a GPU machine may hold (pydantic travels), and the peer.
HELD = (
    "torch",
    "numpy",
    "safetensors",
    "pydantic",
    "PyYAML",
    "torchmetrics",
    "rich",
    "pytest",
    "diffusers",
    "darkroom",
    "matplotlib",  # torchmetrics looks for their metadata, which cannot be hidden
    "scipy",
)
BARE = """
import importlib.machinery, sys
class Bare(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in BLOCKED else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Bare
"""
FACTS: dict[str, Any] = {
    "missing": [],
    "peers_missing": [],
    "driver": "580.1",
    "cuda": "13.0",
    "gpu": "NVIDIA H100",
    "capability": [9, 0],
    "free": 79 * 2**30,
    "memory": 80 * 2**30,
    "machine": {"cpu": "CPU", "capabilities": [], "cores": 2, "threads": 2, "gpu": "NVIDIA H100", "torch": "2.13.0"},
}


def held(names: tuple[str, ...]) -> set[str]:
    """These distributions and all that they need."""
    found, todo = {"setuptools", "pip", "darkroom"}, [canonicalize_name(name) for name in names]
    while todo:
        name = todo.pop()
        if name in found:
            continue
        found.add(name)
        try:
            needs = [Requirement(line) for line in requires(name) or []]
        except PackageNotFoundError:
            continue
        needs = [need for need in needs if not need.marker or need.marker.evaluate({"extra": ""})]
        todo += [canonicalize_name(need.name) for need in needs]
    return found


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which Python finds nothing that a GPU machine lacks."""
    there = held(HELD)
    blocked = {
        module
        for module, distributions in packages_distributions().items()
        if not {canonicalize_name(name) for name in distributions} & there
    }
    assert {"dvc", "mlflow", "prefect", "sklearn", "pyarrow", "psutil", "boto3", "pandas"} <= blocked
    directory = tmp_path_factory.mktemp("bare")
    (directory / "sitecustomize.py").write_text(f"BLOCKED = {blocked!r}\n{BARE}")
    return os.environ | {"PYTHONPATH": str(directory), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "images", [["digits"], pytest.param(["digits", "photos"], marks=pytest.mark.soak)], ids="-".join
)
def test_a_rehearsal_measures_every_part_with_no_more_than_a_gpu_machine_holds(
    images: list[str], tmp_path: Path, bare: dict[str, str]
) -> None:
    names = [name for name in gpu.SHARES if name != "photos" or name in images]
    gpu_recipes.pack(tmp_path / "packed", "3.12", packages=())
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--out", str(tmp_path), "--minutes", "60"]
    command += ["--packed", str(tmp_path / "packed"), "--parts", *names]
    done = subprocess.run(command, cwd=ROOT, env=bare, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert set(names) == {name for name, part in result["parts"].items() if part["failure"] is None}
    parts = {name: part["result"] for name, part in result["parts"].items()}

    cases = parts["tests"]["cases"]
    assert set(cases.values()) == {"passed"}
    for name in ("two_ranks", "repeats", "uint8", "graph", "alone_and_in_a_batch", "interrupted"):
        assert any(name in case for case in cases), name
    assert parts["peak"]["matrix_flops"] > 1e7
    assert parts["peak"]["copy_bytes"] > 1e6
    trained = {name: one["batches"]["4"] for name, one in parts["training"]["contenders"].items()}
    assert set(trained) == {"darkroom fp32", "darkroom compiled, channels last bf16", "diffusers compiled bf16"}
    assert all(one["images_per_second"] > 0 and one["memory"] > 1e6 for one in trained.values())
    bf16 = gpu_report.distance(*(trained[name]["losses"] for name in (list(trained)[1], "darkroom fp32")))
    assert 0 <= bf16 < 0.05  # a toy's first steps, from an output of zero: they may well agree to the last bit
    assert all(math.isfinite(loss) and loss > 0 for one in trained.values() for loss in one.get("losses", []))
    drawn = parts["sampling"]["contenders"]
    assert all(list(one["batches"]) == ["1", "2"] for one in drawn.values())
    assert set(drawn) == {"darkroom bf16", "diffusers compiled bf16"}
    assert parts["saving"]["bytes"] > 1e6
    assert parts["saving"]["step"] > 0
    for name in images:
        found = parts[name]
        assert found["images"] == name
        assert all(
            found[key] > 0 and math.isfinite(found[key]) for key in ("fid", "floor", "loss", "images_per_second")
        )
        assert set(found["seconds"]) == {"train", "sample", "reference", "evaluate"}
        assert (tmp_path / found["grid"]).read_bytes().startswith(b"\x89PNG")
    assert images[-1] in done.stdout
    assert "Rehearsal" in (tmp_path / "gpu.md").read_text()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"missing": ["pydantic"]}, "not installed: pydantic; --pack"),
        ({"gpu": None}, "no GPU that torch can use (NVIDIA driver 580.1, torch 2.13.0); --rehearse"),
        ({"gpu": "Tesla T4", "capability": [7, 5]}, "Tesla T4 (compute capability 7.5) computes no bf16"),
        ({"free": 3 * 2**30}, "NVIDIA H100 is full: 3.0 of 80.0 GiB are free"),
    ],
)
def test_a_gpu_that_cannot_be_measured_is_named_in_one_line(
    changes: dict[str, Any],
    said: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ran: list[str] = []

    def fake(name: str, *_: Any) -> dict[str, Any]:
        ran.append(name)
        return {"seconds": 1.0, "failure": None, "result": FACTS | changes if name == "found" else {}}

    monkeypatch.setattr(gpu, "run_part", fake)
    code = gpu.main(["--out", str(tmp_path)])
    if said is None:
        assert (code, ran) == (0, ["found", *gpu.SHARES])
        return
    assert (code, ran) == (2, ["found"])
    assert len(lines := capsys.readouterr().err.splitlines()) == 1
    assert said in lines[0]


def test_here_is_no_gpu_and_that_is_exit_code_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path)]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=hidden, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "no GPU that torch can use" in done.stderr


@pytest.mark.parametrize(
    "arguments", [["--minutes", "0"], ["--packed", "not-there"], ["--write", "--rehearse"], ["--parts", "cooking"]]
)
def test_what_cannot_be_asked_for_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu.main(arguments)
    assert arguments[0] in capsys.readouterr().err


def fake_part(monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Parts that write {"so": "far"} and a process of their own, and then do `body`."""
    script = (
        "import json, pathlib, subprocess, sys, time\nname, setting = sys.argv[1], json.loads(sys.argv[2])\n"
        "child = subprocess.Popen(['sleep', '600'], process_group=0)\n"
        "pathlib.Path(setting['out'], f'{name}.json').write_text(json.dumps({'pid': child.pid}))\n"
    )
    monkeypatch.setattr(gpu, "PART", [sys.executable, "-c", script + body])


@pytest.mark.parametrize(
    ("body", "failure"),
    [("time.sleep(600)", "timed out after 3 s"), ("sys.exit('no memory left')", "failed: no memory left"), ("", None)],
)
def test_a_part_that_hangs_or_fails_leaves_its_figures_and_no_process(
    body: str, failure: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_part(monkeypatch, body)
    part = gpu.run_part("saving", {"out": str(tmp_path)}, dict(os.environ), 3.0)
    assert part["failure"] == failure
    state = Path(f"/proc/{part['result']['pid']}/stat")
    deadline = time.monotonic() + 10
    while state.is_file() and state.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_ctrl_c_ends_the_part_and_writes_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = gpu.run_part

    def run(name: str, *rest: Any) -> dict[str, Any]:
        if name == "found":
            return {"seconds": 1.0, "failure": None, "result": FACTS}
        if name == "peak":
            signal.setitimer(signal.ITIMER_REAL, 2.0)
        return real(name, *rest)

    monkeypatch.setattr(gpu, "run_part", run)
    monkeypatch.setattr(gpu_report, "ROWS", dict.fromkeys(gpu.SHARES, lambda found, result: iter(())))
    fake_part(monkeypatch, "time.sleep(600 if name == 'peak' else 0)")
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        assert gpu.main(["--out", str(tmp_path)]) == 130
    finally:
        signal.signal(signal.SIGALRM, before)
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert {name: part["failure"] for name, part in parts.items()} == {"tests": None, "peak": "interrupted"}
    assert "interrupted" in (tmp_path / "gpu.md").read_text()
    assert "interrupted" in capsys.readouterr().out


def test_the_table_shares_out_the_measured_peak_and_compares_losses() -> None:
    def one(seconds: float, losses: list[float]) -> dict[str, Any]:
        measured = {"seconds": [seconds], "images_per_second": 1280 / seconds, "memory": 2e9, "losses": losses}
        return {"network": {"macs": 10**10}, "batches": {"128": measured}}

    contenders = {"darkroom fp32": one(2.0, [1.0, 0.5]), "darkroom bf16": one(0.5, [1.01, 0.5])}
    contenders["diffusers compiled bf16"] = {"failure": "no compiler"}
    parts = {
        "peak": {"seconds": 9.0, "failure": None, "result": {"matrix_flops": 6e14, "side": 8192, "copy_bytes": 3e12}},
        "training": {
            "seconds": 60.0,
            "failure": "timed out after 60 s",
            "result": {"model": "A64", "batch_size": 128, "contenders": contenders},
        },
    }
    result = {"rehearsal": False, "found": FACTS | {"peers_missing": ["diffusers"]}, "parts": parts}
    page = gpu_report.page(result, markdown=True)
    assert "H100; CPU" in page
    assert "driver 580.1, 80 GiB" in page
    row = "| training | A64, batch 128, darkroom bf16 | 2560 images/s | 25.6% of peak (MFU), 2.0 GB, losses within 0.01"
    assert row in page
    assert "| training | diffusers compiled bf16 | - | failed: no compiler |" in page
    assert "| training | diffusers | - | left out: not installed |" in page
    assert "| training | time | 60 s | timed out after 60 s |" in page


def test_results_are_kept_under_the_name_of_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = lambda name, *_: {"seconds": 1.0, "failure": None, "result": FACTS if name == "found" else {}}  # noqa: E731
    monkeypatch.setattr(gpu, "run_part", fake)
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    assert gpu.main(["--out", str(tmp_path), "--write"]) == 0
    assert json.loads((tmp_path / "results" / "nvidia-h100.json").read_text())["minutes"] == 8


def test_without_scikit_learn_random_pictures_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> Path:
        raise ModuleNotFoundError("No module named 'sklearn'")

    monkeypatch.setattr(gpu_recipes, "prepare", missing)
    images = gpu_recipes.images_of("photos", None, tmp_path, every=10)
    assert images.what == "random pictures"
    assert images.train.images.shape == (150, 3, 64, 64)
    assert images.info.splits == {"train": 150, "test": 30}


def test_every_part_has_a_share_and_a_row() -> None:
    assert {"found", *gpu.SHARES} == set(gpu_parts.PARTS)
    assert set(gpu.SHARES) == set(gpu_report.ROWS)
    assert sum(gpu.SHARES.values()) == pytest.approx(1.0)
