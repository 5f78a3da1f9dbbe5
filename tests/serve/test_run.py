"""What needs no model: TLS, whose buffers large responses pass, and addresses and files that cannot be used."""

import asyncio
import os
import socket
import ssl
from pathlib import Path

import httpx
import pytest

pytest.importorskip("starlette", reason="serving needs the extra `serve`")
from afnext import AfnextError
from afnext.serve.local import LocalBackend
from afnext.serve.run import listener, run
from afnext.serve.server import Server
from afnext.serve.settings import Settings

from .conftest import HOST


def never() -> None:
    raise AssertionError("the model was loaded")


def refused(settings: Settings, **options: tuple[str, str]) -> str:
    with pytest.raises(AfnextError) as error:
        run(settings, never, **options)  # type: ignore[arg-type]
    return str(error.value)


def test_an_address_that_is_in_use_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert refused(Settings(port=port)) == f"port {port} of 127.0.0.1 is in use; choose another one with --port."
    assert "cannot listen on port 0 of 192.0.2.1" in refused(Settings(host="192.0.2.1", port=0, no_auth=True))
    assert capsys.readouterr().err == ""


def test_files_that_cannot_be_used_are_named(tmp_path: Path, certificate: Path) -> None:
    (tmp_path / "file").write_text("no certificate")
    missing, other, good = str(tmp_path / "none"), str(tmp_path / "file"), str(certificate)
    assert f"{missing} and the key {good} cannot be read: No such file" in refused(
        Settings(port=0), tls=(missing, good)
    )
    assert f"{other} and the key {good} cannot be read" in refused(Settings(port=0), tls=(other, good))
    assert f"{other} cannot keep files" in refused(Settings(port=0, state_dir=tmp_path / "file"))


def test_files_pass_through_tls_unharmed(certificate: Path) -> None:
    content = os.urandom(3 << 20)
    trusted = ssl.create_default_context(cafile=str(certificate))

    async def serve(listening: socket.socket) -> None:
        server = Server(LocalBackend(never), Settings())  # type: ignore[arg-type]
        http = listener(server, (str(certificate), str(certificate)))
        serving = asyncio.create_task(http.serve(sockets=[listening]))
        url = f"https://127.0.0.1:{listening.getsockname()[1]}"
        async with httpx.AsyncClient(base_url=url, verify=trusted, timeout=60) as client:
            named = {"extensions": {"sni_hostname": HOST}}
            stored = (await client.post("/v1/files", files={"file": content}, **named)).json()  # type: ignore[arg-type]
            answer = await client.get(f"/v1/files/{stored['id']}/content", **named)  # type: ignore[arg-type]
            assert answer.content == content
            assert (await client.get("/health/ready", **named)).json() == {"status": "loading"}  # type: ignore[arg-type]
        http.should_exit = True
        await serving

    with socket.create_server(("127.0.0.1", 0)) as listening:
        asyncio.run(asyncio.wait_for(serve(listening), 100))
