"""packaging/kuberay.yaml: its options, ports, paths and names agree with the command line and with each other."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import typer

from afnext.kernels.errors import AfnextError
from afnext.serve.cli import Plan, command_line, parsed

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[3]
MANIFEST = ROOT / "packaging/kuberay.yaml"
GROUP_FIELDS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}


@pytest.fixture(scope="module")
def service() -> dict[str, Any]:
    """The RayService."""
    return next(each for each in documents() if each["kind"] == "RayService")


@pytest.fixture(scope="module")
def config(service: dict[str, Any]) -> dict[str, Any]:
    """The configuration of Ray Serve in it."""
    loaded: dict[str, Any] = yaml.safe_load(service["spec"]["serveConfigV2"])
    return loaded


@pytest.fixture
def plan(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Plan:
    """What its arguments ask for."""
    monkeypatch.setenv("AFNEXT_API_KEYS", "me:secret")
    return parsed(["--ray", *command_line(config["applications"][0]["args"])])


def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(MANIFEST.read_text()))


def groups(service: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = service["spec"]["rayClusterConfig"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def test_it_has_the_fields_of_a_ray_service(service: dict[str, Any]) -> None:
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    assert set(service["spec"]) == {"serveConfigV2", "rayClusterConfig"}
    cluster = service["spec"]["rayClusterConfig"]
    assert set(cluster) == {"rayVersion", "enableInTreeAutoscaling", "headGroupSpec", "workerGroupSpecs"}
    assert set(cluster["headGroupSpec"]) == {"rayStartParams", "template"}
    for group in cluster["workerGroupSpecs"]:
        assert set(group) == GROUP_FIELDS
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in groups(service):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        for container in group["template"]["spec"]["containers"]:
            assert {"name", "image", "env", "ports", "resources", "volumeMounts"} == set(container)
            for values in container["resources"].values():
                assert all(isinstance(value, str) for value in values.values())


def test_the_version_of_ray_is_the_tested_one(service: dict[str, Any]) -> None:
    pinned = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned
    assert service["spec"]["rayClusterConfig"]["rayVersion"] == pinned[1]


def test_the_application_is_there(config: dict[str, Any]) -> None:
    module, _, name = config["applications"][0]["import_path"].partition(":")
    path = ROOT / Path(*module.removeprefix("afnext.").split(".")).with_suffix(".py")
    functions = {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
    assert name in functions


def test_addresses_and_ports_agree(service: dict[str, Any], config: dict[str, Any], plan: Plan) -> None:
    http = config["http_options"]
    assert (plan.settings.host, plan.settings.port) == (http["host"], http["port"])
    for group in groups(service):
        ports = {port["name"]: port["containerPort"] for port in group["template"]["spec"]["containers"][0]["ports"]}
        assert ports["serve"] == http["port"]


def test_replicas_fit_the_nodes(service: dict[str, Any], plan: Plan) -> None:
    [group] = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    resources = group["template"]["spec"]["containers"][0]["resources"]
    assert plan.fleet.gpus_per_replica == int(resources["limits"]["nvidia.com/gpu"])
    assert plan.fleet.replicas <= group["minReplicas"]
    assert plan.fleet.max_replicas == group["maxReplicas"]


def test_files_and_contexts_lie_on_a_volume_that_all_share(service: dict[str, Any], plan: Plan) -> None:
    claims = {each["metadata"]["name"]: each["spec"] for each in documents() if each["kind"] == "PersistentVolumeClaim"}
    for group in groups(service):
        spec = group["template"]["spec"]
        volumes = {each["name"]: each["persistentVolumeClaim"]["claimName"] for each in spec["volumes"]}
        mounts = {each["mountPath"]: each["name"] for each in spec["containers"][0]["volumeMounts"]}
        claim = claims[volumes[mounts[str(plan.settings.state_dir)]]]
        assert claim["accessModes"] == ["ReadWriteMany"]
        assert set(volumes.values()) == set(claims)


def test_the_image_s_user_and_paths_are_those_of_the_dockerfile(service: dict[str, Any], plan: Plan) -> None:
    dockerfile = (ROOT / "packaging/Dockerfile").read_text()
    user = re.search(r"^USER (\d+):(\d+)$", dockerfile, re.MULTILINE)
    assert user
    for group in groups(service):
        spec = group["template"]["spec"]
        assert (spec["securityContext"]["runAsUser"], spec["securityContext"]["runAsGroup"]) == (
            int(user[1]),
            int(user[2]),
        )
        for mount in spec["containers"][0]["volumeMounts"]:
            assert f'"{mount["mountPath"]}"' in dockerfile  # VOLUME
        assert "AFNEXT_API_KEYS" in {each["name"] for each in spec["containers"][0]["env"]}


def test_keys_are_needed(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AFNEXT_API_KEYS", raising=False)
    with pytest.raises(AfnextError, match="without API keys"):
        parsed(["--ray", *command_line(config["applications"][0]["args"])])


def test_options_are_spelled_as_on_a_command_line() -> None:
    given = {"model": "m", "port": 80, "share-cache": True, "no-auth": False, "alias": ["a", "b"]}
    assert command_line(given) == ["--model", "m", "--port", "80", "--share-cache", "--alias", "a", "--alias", "b"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--replicas", "2"], "belongs to --ray"),
        (["--ray-address", "auto"], "belongs to --ray"),
        (["--ray", "--replicas", "3", "--max-replicas", "2"], "less than --replicas 3"),
    ],
)
def test_options_that_make_no_sense_are_refused(arguments: list[str], problem: str) -> None:
    with pytest.raises(typer.BadParameter, match=problem):
        parsed(arguments)
