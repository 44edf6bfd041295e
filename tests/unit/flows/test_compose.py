"""compose.yaml and `make stack` are one stack: same services, same settings; and what containers must have."""

import importlib
import os
import re
import stat
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.settings import get_current_settings
from prefect.settings.models.server.concurrency import ServerConcurrencySettings

from darkroom.errors import InputError
from flows.processes import GRACE
from flows.stack.private import with_passwords
from flows.stack.services import client_environment, services
from flows.stack.settings import StackSettings, read_env

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "compose.yaml").read_text()
SERVICES: dict[str, Any] = yaml.safe_load(TEXT)["services"]
ONCE = {"owner", "bucket", "set-up"}


@pytest.fixture
def settings(tmp_path: Path) -> StackSettings:
    """Those of stack.env, and passwords that were made."""
    settings = StackSettings(tmp_path, tmp_path / ".darkroom", read_env(ROOT / "stack.env"))
    settings.directory.mkdir(parents=True)
    return with_passwords(settings)


def test_every_variable_without_a_default_is_in_stack_env(settings: StackSettings) -> None:
    used = re.findall(r"(?<!\$)\$\{(\w+)(:[-?][^}]*)?\}", TEXT)
    assert {name for name, default in used if not default} <= set(read_env(ROOT / "stack.env"))


def test_passwords_are_made_for_compose_as_its_first_lines_say_and_it_does_not_start_without(
    settings: StackSettings, tmp_path: Path
) -> None:
    required = set(re.findall(r"\$\{(\w+):\?", TEXT))
    assert required == set(read_env(settings.directory / "passwords.env"))
    assert not [name for name in required if re.search(rf"\$\{{{name}(:-[^}}]*)?\}}", TEXT)], "always required"
    lines = [line.removeprefix("#").strip() for line in TEXT.splitlines()[:4]]
    command = " ".join(lines[1:3])
    assert command.startswith("(umask 077;")
    subprocess.run(["sh", "-c", command], cwd=tmp_path, check=True)
    made = read_env(tmp_path / "passwords.env")
    assert set(made) == required
    assert len(set(made.values())) == len(made)
    assert all(len(value) == 48 and value.isalnum() for value in made.values())
    assert stat.S_IMODE((tmp_path / "passwords.env").stat().st_mode) == 0o600
    assert lines[3] == "docker compose --env-file stack.env --env-file passwords.env up --build"
    assert "/passwords.env" in (ROOT / ".gitignore").read_text().splitlines()
    assert "passwords.env" in (ROOT / ".dockerignore").read_text().splitlines()


def test_prefects_server_is_closed_to_pages_in_both(settings: StackSettings) -> None:
    (local,) = (service for service in services(settings) if service.name == "prefect")
    composed = SERVICES["prefect"]
    assert local.command[1:3] == composed["command"][1:3] == ["-m", "flows.stack.prefect_server"]
    for name in ("API_AUTH_STRING", "CORS_ALLOWED_ORIGINS", "CSRF_PROTECTION_ENABLED", "UI_API_URL"):
        assert local.environment[f"PREFECT_SERVER_{name}"]
        assert composed["environment"][f"PREFECT_SERVER_{name}"]
    known = get_current_settings().model_copy().server
    assert known.api.cors_allowed_origins == "*", "the default, which is why it is set"
    for environment in (local.environment, composed["environment"]):
        assert "*" not in environment["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"]
        assert environment["PREFECT_SERVER_CSRF_PROTECTION_ENABLED"] == "true"
        assert environment["PREFECT_SERVER_UI_API_URL"] == "/api", "of the port that the page came from"


def test_each_password_goes_where_it_is_needed(settings: StackSettings) -> None:
    environments = {service.name: service.environment for service in services(settings)}
    clients = {name for name, values in environments.items() if "PREFECT_API_AUTH_STRING" in values}
    assert clients == {"set-up", "worker"}
    assert not [name for name, values in environments.items() if "POSTGRES_PASSWORD" in values]
    assert not [name for name in clients if settings["POSTGRES_PASSWORD"] in str(environments[name])]
    for service in services(settings):
        shown = f"{service.command} {service.shows}"
        assert not [name for name in settings.values if "PASS" in name and settings[name] in shown]


def test_both_stacks_have_the_same_services_on_the_same_ports(settings: StackSettings) -> None:
    local = {service.name: service.port for service in services(settings)}
    local["postgres"] = "POSTGRES_PORT"  # SQLite where there is none
    assert set(local) == set(SERVICES) - (ONCE - {"set-up"})
    for name, port in local.items():
        published = [re.fullmatch(r"127\.0\.0\.1:\$\{(\w+)\}:\d+", entry) for entry in SERVICES[name].get("ports", [])]
        assert [match and match[1] for match in published] == ([port] if port else []), name


def test_runs_are_told_the_same_in_both(settings: StackSettings) -> None:
    image = {"DARKROOM_PROJECT", "DARKROOM_STATE"}  # what the image settles
    assert set(client_environment(settings)) - image <= set(SERVICES["worker"]["environment"])
    assert "ENV DARKROOM_PROJECT=/app" in (ROOT / "Dockerfile").read_text()


def test_a_restart_of_prefects_server_forgets_nothing_in_either(settings: StackSettings) -> None:
    (local,) = (service.environment for service in services(settings) if service.name == "prefect")
    composed = SERVICES["prefect"]["environment"]
    name = "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"
    assert importlib.import_module(composed[name]).ConcurrencyLeaseStorage
    assert local[name] == composed[name] != ServerConcurrencySettings.model_fields["lease_storage"].default
    assert f"prefect:{Path(composed['PREFECT_HOME']).parent}" in SERVICES["prefect"]["volumes"]


def test_every_service_has_a_health_check_a_user_and_a_process_1_that_passes_signals_on() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert 'ENTRYPOINT ["tini", "-g", "--", "with-secrets"]' in dockerfile
    assert re.search(r"AS train\n(?:(?!^FROM).*\n)*USER darkroom\n", dockerfile, re.MULTILINE)
    for name, service in SERVICES.items():
        if name in ONCE:
            continue
        assert service["healthcheck"]["test"], name
        if service["image"] != "darkroom-train":
            assert service["user"] in ("postgres", "1000:1000"), name
            assert service["init"], name
        else:
            assert service["build"]["target"] == "train"


def test_services_wait_until_what_they_need_is_well() -> None:
    for name, service in SERVICES.items():
        for needed, how in service.get("depends_on", {}).items():
            assert needed in SERVICES, name
            assert how["condition"] == ("service_completed_successfully" if needed in ONCE else "service_healthy"), (
                f"{name} needs {needed}"
            )


def test_the_worker_reserves_a_gpu_and_has_time_to_save() -> None:
    worker = SERVICES["worker"]
    (device,) = worker["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert int(worker["stop_grace_period"].removesuffix("s")) >= GRACE + 15
    assert {volume.split(":")[1] for volume in worker["volumes"]} == {"/app/.darkroom", "/app/.dvc/cache"}


def test_every_volume_is_declared() -> None:
    declared = set(yaml.safe_load(TEXT)["volumes"])
    used = {volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])}
    assert used == declared


def test_the_images_entrypoint_reads_secrets_from_a_file_as_they_are(tmp_path: Path) -> None:
    found = re.search(r'<<"EOF" (\S+)\n(.*?)^EOF$', (ROOT / "Dockerfile").read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None
    file = tmp_path / "secrets"
    script = tmp_path / "with-secrets"
    script.write_text(found[2].replace("/run/secrets/darkroom.env", str(file)))
    script.chmod(script.stat().st_mode | stat.S_IXUSR)

    def shown(*names: str) -> list[str]:
        command = [script, "python", "-c", f"import os; print(*[os.environ.get(n) for n in {names!r}], sep='\\n')"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()

    assert shown("LAST") == ["None"]
    file.mkdir()  # what Docker makes of a file that is not there
    refused = subprocess.run([script, "true"], capture_output=True, text=True)
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"{file}: expected a file of lines KEY=VALUE")
    file.rmdir()
    file.write_text('# keys\n\nAWS_SECRET_ACCESS_KEY=a/b $HOME `id` "c" = d\nLAST=1')
    assert shown("AWS_SECRET_ACCESS_KEY", "LAST") == ['a/b $HOME `id` "c" = d', "1"]


@pytest.mark.parametrize(
    ("text", "says"),
    [("PORT 1\n", ":1: expected KEY=VALUE, found 'PORT 1'"), ("\nA-B=1\n", ":2: expected KEY=VALUE, found 'A-B=1'")],
)
def test_a_line_of_stack_env_that_says_nothing_is_named(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "stack.env").write_text(text)
    with pytest.raises(InputError) as refused:
        read_env(tmp_path / "stack.env")
    assert str(refused.value).endswith(says)


def test_the_environment_wins_over_stack_env(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_PORT", "4321")
    settings = StackSettings.load(ROOT)
    assert settings.port("PREFECT_PORT") == 4321
    monkeypatch.setenv("PREFECT_PORT", "http")
    with pytest.raises(InputError, match=r"PREFECT_PORT = 'http': expected a port, 1 to 65535"):
        StackSettings.load(ROOT).port("PREFECT_PORT")
    assert os.environ["PREFECT_PORT"] == "http"


def test_a_shell_that_has_read_the_stacks_own_address_still_starts_its_s3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", StackSettings.load(ROOT).url("S3_PORT"))
    settings = StackSettings.load(ROOT)
    assert "AWS_ENDPOINT_URL" not in settings.values
    assert settings["AWS_ACCESS_KEY_ID"] == "darkroom"


def test_another_s3_comes_with_its_own_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://s3.example.org")
    settings = replace(StackSettings.load(ROOT), state=tmp_path)
    settings.directory.mkdir()
    settings = with_passwords(settings)
    assert "s3" not in [service.name for service in services(settings)]
    told = client_environment(settings)
    assert {name: value for name, value in told.items() if name.startswith("AWS_")} == {
        "AWS_ENDPOINT_URL": "https://s3.example.org"
    }
