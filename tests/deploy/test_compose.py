"""The compose files as they are read: valid, safe where nothing is set, and explained in .env.example."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from promprune_vllm import __version__
from promprune_vllm.commands.serve_options import variable
from promprune_vllm.config import Settings
from tests.deploy.conftest import API_KEY
from tests.deploy.docker_engine import EngineError, run
from tests.deploy.images import DEPLOY, ROOT, SETTINGS

FILES = ("compose.yaml", "compose.cpu.yaml")
STACKS = {"gpu": FILES[:1], "cpu": FILES}
BIN = Path(sys.executable).parent


def config(*arguments: str, files: tuple[str, ...], env_file: Path) -> str:
    options = [option for name in files for option in ("-f", str(DEPLOY / name))]
    try:
        run(["docker-compose", "version"])
    except (EngineError, OSError):
        pytest.skip("docker-compose is not on this machine (`make tools` fetches it on Debian)")
    return run(["docker-compose", *options, "--env-file", str(env_file), "config", *arguments])


@pytest.fixture(params=STACKS)
def resolved(request: pytest.FixtureRequest, env_file: Path) -> dict[str, Any]:
    """The stack as compose itself merges it, with nothing set but the two secrets."""
    found: dict[str, Any] = json.loads(config("--format=json", files=STACKS[request.param], env_file=env_file))
    return found


@pytest.mark.parametrize("name", FILES)
def test_files_follow_the_compose_specification(name: str, tmp_path: Path) -> None:
    # !reset is compose's own tag, which the validator's YAML does not know.
    plain = tmp_path / name
    plain.write_text((DEPLOY / name).read_text().replace("!reset ", ""))
    command = [str(BIN / "check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(plain)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("missing", "advice"), [("VLLM_API_KEY", "VLLM_API_KEY=off"), ("GRAFANA_ADMIN_PASSWORD", "")]
)
def test_nothing_starts_without_the_secrets(env_file: Path, tmp_path: Path, missing: str, advice: str) -> None:
    without = tmp_path / ".env"
    without.write_text(re.sub(rf"^{missing}=.*$", f"{missing}=", env_file.read_text(), flags=re.MULTILINE))
    with pytest.raises(EngineError, match=f"{missing} is missing a value.*{advice}"):
        config("--quiet", files=FILES, env_file=without)


def test_only_loopback_is_published(resolved: dict[str, Any]) -> None:
    ports = {name: service.get("ports", []) for name, service in resolved["services"].items()}
    assert all(port["host_ip"] == "127.0.0.1" for published in ports.values() for port in published)
    assert {name: [port["target"] for port in published] for name, published in ports.items()} == {
        "vllm": [8000],
        "prometheus": [9090],
        "grafana": [3000],
    }


def test_containers_are_hardened(resolved: dict[str, Any]) -> None:
    for name, service in resolved["services"].items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["user"].split(":")[0] not in ("0", "root"), name
        assert service["restart"] == "unless-stopped", name
        assert service["healthcheck"]["test"], name
        assert not {"privileged", "cap_add", "pid", "ipc", "network_mode"} & service.keys(), name
        assert not [volume for volume in service["volumes"] if "docker.sock" in volume["source"]], name


def test_tags_are_pinned(resolved: dict[str, Any]) -> None:
    for name, service in resolved["services"].items():
        _, _, tag = service["image"].rpartition(":")
        assert re.match(r"v?\d+\.\d+\.\d+", tag), name
    assert resolved["services"]["vllm"]["image"].startswith(f"promprune-vllm:{__version__}-")


def test_the_server_is_started_safely(resolved: dict[str, Any]) -> None:
    server = resolved["services"]["vllm"]
    command, environment = server["command"], server["environment"]
    assert environment["VLLM_API_KEY"] == API_KEY
    assert API_KEY not in command  # where every user of the machine could read it
    assert command[command.index("--allowed-media-domains") + 1] == "none.invalid"
    assert environment["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == "0"
    assert int(server["shm_size"]) >= 1 << 30
    assert {name for name in environment if name.startswith("PROMPRUNE_")} == SETTINGS
    assert {environment[name] for name in SETTINGS} == {None}  # not even empty: the plugin's own defaults hold


@pytest.mark.parametrize("stack", STACKS)
def test_every_setting_of_the_env_file_reaches_the_server(stack: str, env_file: Path, tmp_path: Path) -> None:
    written = tmp_path / ".env"
    written.write_text(env_file.read_text() + "".join(f"{name}=of {name}\n" for name in SETTINGS))
    found = json.loads(config("--format=json", files=STACKS[stack], env_file=written))
    environment = found["services"]["vllm"]["environment"]
    assert {name: environment[name] for name in SETTINGS} == {name: f"of {name}" for name in SETTINGS}


def test_the_gpu_is_asked_for_only_without_the_override(env_file: Path) -> None:
    for stack, expected in (("gpu", [["gpu"]]), ("cpu", [])):
        server = json.loads(config("--format=json", files=STACKS[stack], env_file=env_file))["services"]["vllm"]
        devices = server["deploy"]["resources"]["reservations"].get("devices", [])
        assert [device["capabilities"] for device in devices] == expected


def test_services_wait_for_what_they_need(resolved: dict[str, Any]) -> None:
    assert resolved["services"]["grafana"]["depends_on"]["prometheus"]["condition"] == "service_healthy"
    networks = {name: set(service["networks"]) for name, service in resolved["services"].items()}
    assert not networks["grafana"] & networks["vllm"]


def test_the_example_explains_every_variable() -> None:
    text = "".join((DEPLOY / name).read_text() for name in FILES)
    read = set(re.findall(r"\$\{(\w+)", text)) | {"HF_TOKEN", "COMPOSE_FILE"}
    example = (DEPLOY / ".env.example").read_text()
    shown = set(re.findall(r"^#?([A-Z_]+)=", example, re.MULTILINE))
    assert shown - SETTINGS == read
    # A few settings stand there; the table of all is where the file says.
    assert shown & SETTINGS
    assert "every PROMPRUNE_ variable of docs/server.md" in example
    page = (ROOT / "docs" / "server.md").read_text()
    assert {name for name in SETTINGS if f"| `{name}` |" not in page} == set()


def test_the_example_shows_the_defaults() -> None:
    values = dict(re.findall(r"^#([A-Z_]+)=(.*)$", (DEPLOY / ".env.example").read_text(), re.MULTILINE))
    defaults = dict(re.findall(r"\$\{(\w+):?-([^}]*)\}", (DEPLOY / FILES[1]).read_text()))
    defaults |= dict(re.findall(r"\$\{(\w+):?-([^}]*)\}", (DEPLOY / FILES[0]).read_text()))
    for name, field in Settings.model_fields.items():
        if variable(name) in values:
            defaults[variable(name)] = "full" if field.default is None else str(field.default).lower()
    assert {name: values[name] for name in defaults} == defaults
    assert "PROMPRUNE_BUDGET" in defaults


def test_prometheus_scrapes_the_service_by_its_name() -> None:
    found = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    jobs = {job["job_name"]: job["static_configs"][0]["targets"] for job in found["scrape_configs"]}
    assert jobs["promprune"] == ["vllm:8000"]
    try:
        run(["promtool", "check", "config", str(DEPLOY / "prometheus" / "prometheus.yml")])
    except FileNotFoundError:
        pytest.skip("promtool is not on this machine (`make tools` fetches it on Debian)")


def test_nginx_closes_idle_connections_before_vllm_does() -> None:
    """Otherwise a request may be sent on one that vLLM is closing, and gets HTTP 502."""
    from vllm import envs

    site = (DEPLOY / "nginx" / "promprune.conf").read_text()
    (seconds,) = re.findall(r"^    keepalive_timeout (\d+)s;", site, re.MULTILINE)
    assert int(seconds) < envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE


def test_provisioned_paths_are_mounted(resolved: dict[str, Any]) -> None:
    mounted = {volume["target"] for volume in resolved["services"]["grafana"]["volumes"]}
    assert "/etc/grafana/provisioning" in mounted
    providers = list((DEPLOY / "grafana" / "provisioning" / "dashboards").glob("*.y*ml"))
    assert providers
    for file in providers:
        for provider in yaml.safe_load(file.read_text())["providers"]:
            assert provider["options"]["path"] in mounted, file.name


@pytest.mark.parametrize("name", ["Dockerfile.cpu", "Dockerfile.cuda"])
def test_dockerfiles_are_well_made(name: str) -> None:
    file = ROOT / "docker" / name
    done = subprocess.run([str(BIN / "hadolint"), str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert not done.stdout, done.stdout
    text = file.read_text()
    assert ":latest" not in text
    assert "# syntax=" not in text  # would be pulled before anything else
    assert f"ARG VERSION={__version__}\n" in text
    assert re.findall(r"^USER (.*)$", text, re.MULTILINE)[-1] == "10001:10001"


def test_the_cuda_image_is_made_of_the_release_we_are_written_for() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    (release,) = re.findall(r'"vllm==([\d.]+)"', project)
    assert f"FROM vllm/vllm-openai:v{release}\n" in (ROOT / "docker" / "Dockerfile.cuda").read_text()


def test_secrets_stay_out_of_images_and_git() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[1] == "*"
    assert not [line for line in ignored if ".env" in line and line.startswith("!")]
    assert "deploy/.env" in (ROOT / ".gitignore").read_text().splitlines()
