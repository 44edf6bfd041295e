"""The architecture as a test: imports point one way, the core stands alone, stages declare the code they run."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import yaml

from darkroom.evaluation.code import CODE as MEASURED
from darkroom.training.fingerprint import CODE as FINGERPRINTED
from tests.loops import each

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "darkroom"
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]

# A package may import those before it and, within a line, not each other.
LAYERS = (
    ("disk",),
    ("errors", "files", "philox", "yaml_text"),
    ("params_errors",),
    ("randomness", "params", "device", "progress"),
    ("workspace", "arithmetic"),
    ("data", "nets"),
    ("diffusion",),
    ("training", "evaluation"),
    ("registry", "serving"),
    ("stages",),
    ("cli_data", "cli_registry"),
    ("cli",),
    ("__main__",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

CORE = ("data/dataset.py", "nets", "diffusion", "training", "evaluation")
FORBIDDEN_IN_CORE = {"dvc", "prefect", "mlflow", "great_expectations", "boto3", "botocore", "pandas", "sklearn"}

# No result depends on these: they find files, report errors, show progress, start ranks, copy checkpoints and log to
# MLflow. A change here must not invalidate a week of training, so stages do not declare them.
LOOK_ON = {"__init__", "errors", "files", "params", "workspace", "progress", "device", "stages.runner", "stages.launch"}
LOOK_ON |= {"params_errors", "yaml_text", "registry", "registry.mirror", "registry.runs", "registry.tracking", "stages"}
LOOK_ON |= {"stages.following", "disk"}
LOOK_ON |= {"arithmetic"}  # what is fast on a machine, like its device, is no part of what it trains
LOOK_ON |= {"stages.environment", "registry.extractor_weights"}  # what that fetches is known by its digest


@cache
def modules():
    return {
        ".".join(p.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): p for p in SOURCE.rglob("*.py")
    }


@cache
def imports(path: Path) -> frozenset[str]:
    """Full names of everything that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


@cache
def own(path: Path) -> set[str]:
    """The project's modules that a file imports, without the leading package."""
    known, found = modules(), set()
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "darkroom":
            inner = parts[1:]
            while inner and ".".join(inner) not in known:
                inner = inner[:-1]
            found.add(".".join(inner) or "__init__")
    return found


def test_every_module_has_a_place_in_the_layers():
    assert {name.split(".")[0] for name in modules()} - {"__init__"} == set(RANK)


def test_imports_point_one_way():
    for name, path in modules().items():
        package = name.split(".")[0]
        for imported in own(path) - {"__init__"}:
            other = imported.split(".")[0]
            assert other == package or RANK[other] < RANK[package], f"{name} imports {imported}"


def test_the_library_never_imports_the_flows():
    for path in SOURCE.rglob("*.py"):
        assert not any(name.split(".")[0] in ("flows", "prefect") for name in imports(path)), path


def test_the_core_does_not_know_who_runs_it():
    files = [f for part in CORE for f in ([SOURCE / part] if part.endswith(".py") else (SOURCE / part).rglob("*.py"))]
    for path in files:
        assert not {name.split(".")[0] for name in imports(path)} & FORBIDDEN_IN_CORE, path


def test_the_core_imports_on_a_machine_that_holds_nothing_else():
    core = [
        f"darkroom.{name}"
        for name in sorted(modules())
        if name == "data.dataset" or name.split(".")[0] in ("nets", "diffusion", "training", "evaluation")
    ]
    script = f"""
import importlib, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {sorted(FORBIDDEN_IN_CORE | {"pyarrow", "fastapi", "sqlalchemy"})!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
for name in {core!r}:
    importlib.import_module(name)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def closure(stage: str) -> set[str]:
    """Every module that a stage runs and that shapes what it writes."""
    known, todo, reached = modules(), [f"stages.{stage}"], set()
    while todo:
        name = todo.pop()
        if name not in reached and name not in LOOK_ON:
            reached.add(name)
            todo += own(known[name])
    return reached


def test_the_fingerprint_covers_the_code_that_trains():
    around = {"stages.train", "training.fingerprint", "training.history", "training.mirroring", "training.outputs"}
    files = {name: path.relative_to(SOURCE).as_posix() for name, path in modules().items()}
    computing = {files[name] for name in closure("train") - around if not files[name].endswith("__init__.py")}
    assert computing == set(FINGERPRINTED)


def test_the_protocol_covers_the_code_that_draws_and_measures():
    stored = {"evaluation.code", "evaluation.protocol", "evaluation.published", "evaluation.reference"}
    stored |= {"evaluation.samples", "evaluation.grid", "data.dataset"}
    # Which weights are scored is said by their digest.
    stored |= {"stages.averaging", "training.ema", "training.posthoc", "training.snapshots"}
    stored |= {"evaluation.sharing", "training.distributed"}  # what ranks have drawn is the same on any number of them
    packages = {name for name in modules() if modules()[name].name == "__init__.py"}
    shaping = (closure("sample") | closure("evaluate")) - stored - packages - {"stages.sample", "stages.evaluate"}
    covered = {name for name in modules() for part in MEASURED if modules()[name].is_relative_to(SOURCE / part)}
    assert not shaping - covered


@each("stage", sorted(STAGES))
def test_stages_declare_the_code_they_run(stage):
    known, reached = modules(), closure(stage)
    declared = [ROOT / dependency for dependency in STAGES[stage]["deps"] if dependency.startswith("src/")]
    for name in reached:
        path = known[name]
        if path.name != "__init__.py":
            assert any(path == d or d in path.parents for d in declared), f"{stage} runs {path.relative_to(ROOT)}"
    for path in declared:
        files = [path] if path.is_file() else list(path.rglob("*.py"))
        assert any(f == known[name] for f in files for name in reached), f"{stage} declares {path} and never runs it"


@each("stage", sorted(STAGES))
def test_every_stage_runs_its_own_script(stage):
    assert STAGES[stage]["cmd"] == f"python -m darkroom.stages.{stage}"
    assert len((SOURCE / "stages" / f"{stage}.py").read_text().splitlines()) <= 150
