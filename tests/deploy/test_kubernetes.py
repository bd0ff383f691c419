"""The manifests, as `kubectl kustomize` builds them: against Kubernetes' own schemas, and safe.

PodMonitor is no kind of Kubernetes itself, and the operator's schema of it cannot be had here: the fields we use
are held against a transcript of that part of it, strictly, and against the pods it is to find.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from promprune_vllm import __version__
from promprune_vllm.commands.serve_options import variable
from promprune_vllm.config import Settings
from tests.deploy.docker_engine import run
from tests.deploy.images import DEPLOY

BIN = Path(sys.executable).parent
KUBERNETES = DEPLOY / "kubernetes"
IMAGES = {"base": f"promprune-vllm:{__version__}-cpu", "overlays/gpu": f"promprune-vllm:{__version__}-cuda"}
_DURATION = {"type": "string", "pattern": "^[0-9]+(ms|s|m|h)$"}
# monitoring.coreos.com/v1, PodMonitor.spec: the fields we use, no others.
_LABELS = {"type": "object", "additionalProperties": {"type": "string"}, "minProperties": 1}
_ENDPOINT = {
    "port": {"type": "string"},
    "path": {"type": "string"},
    "interval": _DURATION,
    "scrapeTimeout": _DURATION,
}
POD_MONITOR_SPEC = {
    "type": "object",
    "required": ["selector", "podMetricsEndpoints"],
    "additionalProperties": False,
    "properties": {
        "selector": {
            "type": "object",
            "required": ["matchLabels"],
            "additionalProperties": False,
            "properties": {"matchLabels": _LABELS},
        },
        "podMetricsEndpoints": {
            "type": "array",
            "minItems": 1,
            "items": {"type": "object", "additionalProperties": False, "properties": _ENDPOINT},
        },
    },
}


def kustomize(folder: Path) -> str:
    try:
        return run(["kubectl", "kustomize", str(folder)])
    except FileNotFoundError:
        pytest.skip("kubectl is not on this machine (`make tools` fetches it on Debian)")


@pytest.fixture(params=IMAGES)
def overlay(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def manifests(overlay: str) -> dict[str, Any]:
    documents = yaml.safe_load_all(kustomize(KUBERNETES / overlay))
    return {document["kind"]: document for document in documents}


def test_manifests_fit_the_schemas_of_kubernetes(overlay: str, tmp_path: Path) -> None:
    documents = list(yaml.safe_load_all(kustomize(KUBERNETES / overlay)))
    file = tmp_path / "manifests.yaml"
    file.write_text(yaml.safe_dump_all(document for document in documents if document["kind"] != "PodMonitor"))
    command = [str(BIN / "kubernetes-validate"), "--strict", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert said.count(" passed for resource ") == len(documents) - 1
    assert "WARN" not in said


def test_pods_run_with_no_rights(manifests: dict[str, Any], overlay: str) -> None:
    pod = manifests["Deployment"]["spec"]["template"]["spec"]
    (server,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not pod["automountServiceAccountToken"]
    assert server["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert server["image"] == IMAGES[overlay]
    assert "--allowed-media-domains=none.invalid" in server["args"]
    assert {"startupProbe", "readinessProbe", "livenessProbe", "resources"} <= server.keys()
    written = {mount["mountPath"] for mount in server["volumeMounts"]}
    assert written == {"/cache", "/tmp", "/dev/shm"}
    gpus = server["resources"]["limits"].get("nvidia.com/gpu")
    assert gpus == (None if overlay == "base" else "1")


def test_secrets_are_named_and_not_written(manifests: dict[str, Any]) -> None:
    assert "Secret" not in manifests
    (server,) = manifests["Deployment"]["spec"]["template"]["spec"]["containers"]
    environment = {entry["name"]: entry for entry in server["env"]}
    assert environment["VLLM_API_KEY"]["valueFrom"]["secretKeyRef"] == {"name": "promprune", "key": "api-key"}
    assert environment["VLLM_MEDIA_URL_ALLOW_REDIRECTS"]["value"] == "0"
    known = {variable(name) for name in Settings.model_fields}
    assert {name for name in environment if name.startswith("PROMPRUNE_")} <= known


def test_everything_selects_the_pods(manifests: dict[str, Any]) -> None:
    labels = {"app.kubernetes.io/name": "promprune-vllm"}
    pod = manifests["Deployment"]["spec"]["template"]
    assert pod["metadata"]["labels"] == labels
    assert manifests["Service"]["spec"]["selector"] == labels
    assert manifests["Service"]["spec"]["type"] == "ClusterIP"
    assert manifests["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    monitor = manifests["PodMonitor"]["spec"]
    jsonschema.validate(monitor, POD_MONITOR_SPEC)
    assert monitor["selector"]["matchLabels"] == labels
    ports = {port["name"] for port in pod["spec"]["containers"][0]["ports"]}
    assert {endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]} <= ports


def test_the_config_map_holds_every_dashboard(manifests: dict[str, Any]) -> None:
    dashboards = {file.name: file.read_text() for file in (DEPLOY / "grafana" / "dashboards").glob("*.json")}
    assert dashboards
    found = manifests["ConfigMap"]
    assert found["data"] == dashboards
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert sum(map(len, dashboards.values())) < 1 << 20  # more does not fit into a ConfigMap


def test_the_production_stack_gets_the_plugin() -> None:
    """Names of the chart's values cannot be checked without helm; they were read in its values and templates."""
    engine = yaml.safe_load((KUBERNETES / "production-stack-values.yaml").read_text())["servingEngineSpec"]
    (model,) = engine["modelSpec"]
    assert f"{model['repository']}:{model['tag']}" == IMAGES["overlays/gpu"]
    assert engine["vllmApiKey"] == {"secretName": "promprune", "secretKey": "api-key"}
    assert engine["securityContext"]["runAsNonRoot"]
    assert "--allowed-media-domains=none.invalid" in model["vllmConfig"]["extraArgs"]
    names = {entry["name"] for entry in model["env"]}
    assert {name for name in names if name.startswith("PROMPRUNE_")} <= {
        variable(s) for s in Settings.model_fields
    }
    assert "VLLM_MEDIA_URL_ALLOW_REDIRECTS" in names
