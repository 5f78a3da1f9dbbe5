"""packaging/kuberay.yaml as Ray Serve reads it."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="Ray is not installed; `make test-ray` sets it up")
yaml = pytest.importorskip("yaml")
pytestmark = pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")  # Ray's
MANIFEST = Path(__file__).parents[2] / "packaging/kuberay.yaml"


@pytest.fixture
def config() -> dict[str, Any]:
    """The configuration of Ray Serve in the manifest."""
    service = next(each for each in yaml.safe_load_all(MANIFEST.read_text()) if each["kind"] == "RayService")
    loaded: dict[str, Any] = yaml.safe_load(service["spec"]["serveConfigV2"])
    return loaded


def test_it_fits_the_schema(config: dict[str, Any]) -> None:
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(config)
    assert schema.http_options.port == 8000
    assert [application.import_path for application in schema.applications] == ["afnext.serve.ray.deployment:build"]


def test_the_application_is_built_from_its_arguments(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve import Application

    from afnext.kernels.errors import AfnextError
    from afnext.serve.ray.deployment import build

    monkeypatch.setenv("AFNEXT_API_KEYS", "me:secret")
    arguments = config["applications"][0]["args"]
    assert isinstance(build(arguments), Application)
    with pytest.raises(AfnextError, match="give state-dir"):
        build({name: value for name, value in arguments.items() if name != "state-dir"})
