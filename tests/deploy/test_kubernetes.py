"""The manifests, as `kubectl kustomize` builds them: against Kubernetes' own schemas, and safe.

PodMonitor is no kind of Kubernetes itself, and the operator's schema of it cannot be had here: the fields we use
are held against a transcript of that part of it, strictly, and against the pods it is to find.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from promprune_vllm import __version__
from promprune_vllm.config import PREFIX, Settings
from tests.deploy.docker_engine import run
from tests.deploy.images import DEPLOY, SETTINGS

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


# servingEngineSpec of vLLM's production-stack chart, 0.1.12: the values we use, no others.
_TEXT, _INTEGER = {"type": "string"}, {"type": "integer"}
_PROBE = {
    "type": "object",
    "additionalProperties": False,
    "properties": {"periodSeconds": _INTEGER, "failureThreshold": _INTEGER, "timeoutSeconds": _INTEGER},
}
_VLLM_CONFIG = {
    "enablePrefixCaching": {"type": "boolean"},
    "tensorParallelSize": _INTEGER,
    "extraArgs": {"type": "array", "items": _TEXT},
}
_MODEL = {
    "name": _TEXT,
    "repository": _TEXT,
    "tag": _TEXT,
    "modelURL": _TEXT,
    "replicaCount": _INTEGER,
    "requestCPU": _INTEGER,
    "requestMemory": _TEXT,
    "requestGPU": _INTEGER,
    "pvcStorage": _TEXT,
    "shmSize": _TEXT,
    "vllmConfig": {"type": "object", "additionalProperties": False, "properties": _VLLM_CONFIG},
    "env": {"type": "array", "items": {"type": "object"}},
}
ENGINE_SPEC = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "runtimeClassName": _TEXT,
        "imagePullPolicy": {"enum": ["Always", "IfNotPresent", "Never"]},
        "vllmApiKey": {"type": "object"},
        "securityContext": {"type": "object"},
        "containerSecurityContext": {"type": "object"},
        "startupProbe": _PROBE,
        "livenessProbe": _PROBE,
        "modelSpec": {
            "type": "array",
            "items": {"type": "object", "additionalProperties": False, "properties": _MODEL},
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


def validate(documents: Sequence[Any], folder: Path) -> str:
    """Hold documents against the schemas of Kubernetes, all of which must pass, and return what was said."""
    file = folder / "manifests.yaml"
    file.write_text(yaml.safe_dump_all(documents))
    command = [str(BIN / "kubernetes-validate"), "--strict", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert said.count(" passed for resource ") == len(documents)
    return said


def test_manifests_fit_the_schemas_of_kubernetes(overlay: str, tmp_path: Path) -> None:
    documents = list(yaml.safe_load_all(kustomize(KUBERNETES / overlay)))
    known = [document for document in documents if document["kind"] != "PodMonitor"]
    assert len(known) == len(documents) - 1
    assert "WARN" not in validate(known, tmp_path)


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
    assert {name for name in environment if name.startswith(PREFIX)} <= SETTINGS


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
    # Without it, kube-prometheus-stack scrapes nothing and says nothing.
    assert manifests["PodMonitor"]["metadata"]["labels"]["release"] == "kube-prometheus-stack"
    ports = {port["name"] for port in pod["spec"]["containers"][0]["ports"]}
    assert {endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]} <= ports


def test_the_config_map_holds_every_dashboard(manifests: dict[str, Any]) -> None:
    dashboards = {file.name: file.read_text() for file in (DEPLOY / "grafana" / "dashboards").glob("*.json")}
    assert dashboards
    found = manifests["ConfigMap"]
    assert found["data"] == dashboards
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert sum(map(len, dashboards.values())) < 1 << 20  # more does not fit into a ConfigMap


@pytest.fixture
def stack_values() -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((KUBERNETES / "production-stack-values.yaml").read_text())
    return values


def test_the_production_stack_gets_the_plugin(stack_values: dict[str, Any]) -> None:
    """The chart cannot be had here: names of values are held against those read in its schema and templates."""
    assert sorted(stack_values) == ["extraObjects", "servingEngineSpec"]
    engine = stack_values["servingEngineSpec"]
    jsonschema.validate(engine, ENGINE_SPEC)
    (model,) = engine["modelSpec"]
    assert f"{model['repository']}:{model['tag']}" == IMAGES["overlays/gpu"]
    assert engine["vllmApiKey"] == {"secretName": "promprune", "secretKey": "api-key"}
    assert "--allowed-media-domains=none.invalid" in model["vllmConfig"]["extraArgs"]
    names = {entry["name"] for entry in model["env"]}
    assert {name for name in names if name.startswith(PREFIX)} <= SETTINGS
    assert "VLLM_MEDIA_URL_ALLOW_REDIRECTS" in names


def test_what_the_production_stack_copies_into_a_pod_fits_the_schemas_of_kubernetes(
    stack_values: dict[str, Any], tmp_path: Path
) -> None:
    engine = stack_values["servingEngineSpec"]
    (model,) = engine["modelSpec"]
    health = {"httpGet": {"path": "/health", "port": 8000}}
    server = {
        "name": "vllm",
        "image": f"{model['repository']}:{model['tag']}",
        "imagePullPolicy": engine["imagePullPolicy"],
        "env": model["env"],
        "securityContext": engine["containerSecurityContext"],
        "startupProbe": engine["startupProbe"] | health,
        "livenessProbe": engine["livenessProbe"] | health,
        "resources": {"requests": {"cpu": str(model["requestCPU"]), "memory": model["requestMemory"]}},
    }
    spec = {"securityContext": engine["securityContext"], "containers": [server]}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "vllm"}, "spec": spec}
    assert "WARN" not in validate([pod, *stack_values["extraObjects"]], tmp_path)
    # A container's own value goes before its pod's, and the chart's default is false.
    assert server["securityContext"]["runAsNonRoot"]
    assert engine["securityContext"]["runAsNonRoot"]


def test_the_engines_of_the_production_stack_are_as_closed_as_ours(stack_values: dict[str, Any]) -> None:
    ours = yaml.safe_load((KUBERNETES / "base" / "networkpolicy.yaml").read_text())["spec"]
    (policy,) = stack_values["extraObjects"]
    (allowed,), (expected,) = policy["spec"]["ingress"], ours["ingress"]
    assert allowed["from"] == expected["from"]
    assert policy["spec"]["policyTypes"] == ours["policyTypes"] == ["Ingress"]
    # Labels that the chart gives every engine, and no router.
    labels = {"app.kubernetes.io/component": "serving-engine", "app.kubernetes.io/part-of": "vllm-stack"}
    assert policy["spec"]["podSelector"]["matchLabels"] == labels


def variables(node: Any) -> Iterator[tuple[str, str]]:
    """Yield the settings in a document: as keys of a mapping, or as names of a container's list."""
    if isinstance(node, list):
        for each in node:
            yield from variables(each)
    elif isinstance(node, dict):
        if str(node.get("name")).startswith(PREFIX):
            yield node["name"], node["value"]
        for key, value in node.items():
            if str(key).startswith(PREFIX) and value is not None:
                yield key, value
            yield from variables(value)


@pytest.mark.parametrize("file", sorted(DEPLOY.rglob("*.y*ml")), ids=lambda file: str(file.relative_to(DEPLOY)))
def test_no_file_prunes_what_nobody_asked_for(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables(list(yaml.safe_load_all(file.read_text().replace("!reset ", "")))):
        monkeypatch.setenv(name, value)
    settings = Settings.from_environment()
    assert not settings.prunes_by_default
    assert settings.allowed == ("promprune",)


def test_settings_of_every_form_are_found() -> None:
    forms = [{"env": [{"name": "PROMPRUNE_MIN", "value": "1"}]}, {"PROMPRUNE_MAX": "2", "PROMPRUNE_LOW": None}]
    assert dict(variables(forms)) == {"PROMPRUNE_MIN": "1", "PROMPRUNE_MAX": "2"}
