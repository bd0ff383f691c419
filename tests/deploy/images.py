"""The images of the stack where none can be pulled: what is replaced, by what, and what is built as users do.

- `python:3.11-slim` is replaced by a minimal Debian 12, whose Python is also 3.11, made from Debian's packages.
- `prom/prometheus` is replaced by Debian's prometheus, laid out as in that image. Its release is older (2.53).
- `grafana/grafana` is left out: no package of it can be had. Its service is checked by its configuration only.
- The CPU image itself is built from docker/Dockerfile.cpu by `docker compose build`, unchanged.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from promprune_vllm.commands.serve_options import variable
from promprune_vllm.config import Settings
from tests.deploy.docker_engine import Compose, Engine, environment, run

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SETTINGS = {variable(name) for name in Settings.model_fields}
"""The variables that a server reads."""
BASE_IMAGE = "python:3.11-slim"
_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
# Upstream's image declares the same user, entry point and data directory.
_PROMETHEUS = f"""\
FROM {BASE_IMAGE}
COPY prometheus promtool /bin/
RUN install -d -o 65534 -g 65534 /prometheus
USER 65534:65534
ENTRYPOINT ["/bin/prometheus"]
"""


def make_base_image(engine: Engine, workshop: Path) -> None:
    """Make the stand-in for Docker's official Python image."""
    tar = workshop / "base.tar"
    packages = "--include=python3-minimal,python3-venv,ca-certificates"
    command = ["mmdebstrap", "--mode=root", "--variant=apt", packages]
    if _BUNDLE.is_file():  # the machine may trust more than Debian does: a proxy, a registry of its own
        command.append(f"--customize-hook=upload {_BUNDLE} {_BUNDLE}")
    # LD_LIBRARY_PATH must not reach the programs that are run inside the new system.
    run(["env", "--unset=LD_LIBRARY_PATH", *command, "bookworm", str(tar)], timeout=300)
    path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    changes = [f"ENV {path} SSL_CERT_FILE={_BUNDLE}", 'CMD ["python3"]']
    engine.docker("import", *(f"--change={change}" for change in changes), str(tar), BASE_IMAGE)
    tar.unlink()


def make_prometheus_image(engine: Engine, workshop: Path, tag: str) -> None:
    """Make the stand-in for Prometheus's image, under the tag that the compose file pins."""
    context = workshop / "prometheus"
    context.mkdir()
    for name in ("prometheus", "promtool"):
        program = shutil.which(name, path=environment()["PATH"])
        assert program, name
        shutil.copy(program, context / name)
    (context / "Dockerfile").write_text(_PROMETHEUS)
    engine.docker("build", "--quiet", "--network=host", "--tag", tag, str(context))


def build_cpu_image(engine: Engine, workshop: Path, env_file: Path) -> None:
    """Build the CPU image from the project's Dockerfile, as `docker compose build` does."""
    build: dict[str, object] = {"network": "host"}
    if wheels := _wheels(workshop):  # torch's CPU wheel comes from a folder here, not from PyTorch's index
        build |= {"args": {"TORCH_INDEX": ""}, "additional_contexts": {"wheels": str(wheels)}}
    override = workshop / "build.yaml"
    override.write_text(yaml.safe_dump({"services": {"vllm": {"build": build}}}))
    files = [DEPLOY / "compose.yaml", DEPLOY / "compose.cpu.yaml", override]
    Compose(engine, files, env_file)("build", "vllm", timeout=900)


def _wheels(workshop: Path) -> Path | None:
    """Return a folder with the wheel of torch that pip is configured to find, if there is one."""
    configured = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.find-links"],
        capture_output=True,
        text=True,
        check=False,
    )
    links = os.environ.get("PIP_FIND_LINKS") or configured.stdout
    found = [wheel for link in links.split() for wheel in Path(link).glob("torch-*+cpu-cp311-*.whl")]
    if not found:
        return None
    folder = workshop / "wheels"
    folder.mkdir()
    for wheel in found:
        shutil.copy(wheel, folder)
    return folder
