"""The files of packaging/: what they name exists, and the command line takes their options."""

import json
import re
import shlex
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.main import get_command

pytest.importorskip("starlette", reason="serving needs the extra `serve`")
from afnext.serve.cli import serve

from .conftest import Running

ROOT = Path(__file__).parents[2]
PACKAGING = ROOT / "packaging"
DOCKERFILE = (PACKAGING / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((PACKAGING / "compose.yaml").read_text())


def instructions(name: str) -> list[str]:
    """The arguments of every such instruction of the Dockerfile, continued lines joined."""
    lines = re.sub(r"\\\n\s*", "", DOCKERFILE).splitlines()
    return [line.removeprefix(name).strip() for line in lines if line.startswith(f"{name} ")]


def parsed(arguments: list[str]) -> dict[str, Any]:
    """The options of `afnext serve`; a wrong one is an error."""
    app = typer.Typer()
    app.command()(serve)
    options: dict[str, Any] = get_command(app).make_context("serve", arguments).params
    return options


def entry() -> list[str]:
    """The options that the image's entry point gives."""
    (text,) = instructions("ENTRYPOINT")
    program, command, *options = json.loads(text)
    assert (program, command) == ("afnext", "serve")
    return options


def test_the_image_copies_what_is_there_and_what_is_installed() -> None:
    copied: set[str] = set()
    for arguments in instructions("COPY"):
        if not arguments.startswith("--from="):
            *sources, target = arguments.split()
            copied |= set(sources)
            assert target in (".", "./", sources[0]), arguments
    assert [name for name in copied if not (ROOT / name).exists()] == []
    packages = set(re.findall(r'^    "afnext(?:\.\w+)?": "(\w+)",$', (ROOT / "setup.py").read_text(), re.MULTILINE))
    assert packages
    assert packages <= copied


def test_the_image_installs_an_extra_that_exists_with_the_pinned_versions() -> None:
    installing = [command for command in instructions("RUN") if "pip install" in command]
    assert all("-c constraints.txt" in command for command in installing)
    defaults = dict(argument.split("=") for argument in instructions("ARG") if "=" in argument)
    assert f"{defaults['VARIANT']}) index=" in installing[0]
    (extras,) = re.findall(r'"\.\[(.*)\]"', installing[-1])
    assert extras == "$EXTRAS"
    project = (ROOT / "pyproject.toml").read_text()
    assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in defaults["EXTRAS"].split(","))


def test_the_image_starts_a_server_that_is_reached_and_keeps_its_state() -> None:
    options = parsed(entry())
    assert options["host"] == "0.0.0.0"
    assert [str(options["port"])] == instructions("EXPOSE")
    volumes = json.loads(instructions("VOLUME")[0])
    assert str(options["state_dir"]) in volumes
    environment = dict(pair.split("=", 1) for line in instructions("ENV") for pair in line.split())
    caches = [path for name, path in environment.items() if name.endswith(("_HOME", "_DIR"))]
    assert all(any(path.startswith(volume) for volume in volumes) for path in caches)
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", instructions("USER")[0])


def test_the_health_check_succeeds_at_a_server_that_is_ready(service: Running) -> None:
    (text,) = instructions("HEALTHCHECK")
    program, option, code = json.loads(text[text.index("[") :])
    assert (program, option) == ("python", "-c")
    assert "http://127.0.0.1:8000/health/ready" in code
    exec(code.replace("http://127.0.0.1:8000", service.url), {})


def test_the_compose_file_names_what_is_there() -> None:
    service, prometheus = COMPOSE["services"]["afnext"], COMPOSE["services"]["prometheus"]
    context = (PACKAGING / service["build"]["context"]).resolve()
    assert context == ROOT
    assert (context / service["build"]["dockerfile"]).is_file()
    (argument,) = service["build"]["args"]
    assert argument in {line.partition("=")[0] for line in instructions("ARG")}
    mounted = dict(volume.split(":") for volume in service["volumes"])
    assert set(mounted.values()) == set(json.loads(instructions("VOLUME")[0]))
    named = {volume.split(":")[0] for one in (service, prometheus) for volume in one["volumes"] if volume[0] != "."}
    assert named == set(COMPOSE["volumes"])


def test_the_compose_file_gives_options_that_the_server_takes() -> None:
    service = COMPOSE["services"]["afnext"]
    given = [re.sub(r"\$\{\w+:-(.*)\}", r"\1", word) for word in service["command"]]
    options = parsed(entry() + given)
    assert "localhost" in options["allowed_host"]
    assert "AFNEXT_API_KEYS" in service["environment"]
    published = [port.rpartition(":")[2] for port in service["ports"]]
    assert published == instructions("EXPOSE")
    grace = int(service["stop_grace_period"].removesuffix("s"))
    assert grace > options["drain_seconds"] + 10  # what is left then ends with an error


def test_prometheus_reads_the_metrics_with_a_key() -> None:
    prometheus = COMPOSE["services"]["prometheus"]
    mounted = dict(reversed(volume.split(":")[:2]) for volume in prometheus["volumes"])  # type: ignore[arg-type]
    config = next(source for target, source in mounted.items() if target.endswith("prometheus.yml"))
    (job,) = yaml.safe_load((PACKAGING / config).read_text())["scrape_configs"]
    assert job["authorization"]["credentials_file"] in mounted
    ((target,),) = [static["targets"] for static in job["static_configs"]]
    host, port = target.split(":")
    assert host in COMPOSE["services"]
    assert [port] == instructions("EXPOSE")
    words = COMPOSE["services"]["afnext"]["command"]
    assert ("--allowed-host", host) in pairwise(words)


def unit() -> str:
    return (PACKAGING / "afnext.service").read_text()


def test_the_systemd_unit_gives_options_that_the_server_takes() -> None:
    (line,) = re.findall(r"^ExecStart=(.*)$", unit(), re.MULTILINE)
    program, command, *options = shlex.split(line.replace("$AFNEXT_OPTIONS", ""))
    assert (Path(program).name, command) == ("afnext", "serve")
    parsed(options)
    stopping = int(re.findall(r"^TimeoutStopSec=(\d+)$", unit(), re.MULTILINE)[0])
    assert stopping > parsed(options)["drain_seconds"] + 10


@pytest.mark.parametrize("check", [["verify"], ["security", "--offline=true", "--threshold=30"]])
def test_systemd_accepts_the_unit_and_its_sandbox(check: list[str], tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    path = tmp_path / "afnext.service"
    path.write_text(unit().replace("/opt/afnext/bin/afnext", "/bin/true"))  # it has to be there
    done = subprocess.run(["systemd-analyze", *check, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    assert not done.stderr
