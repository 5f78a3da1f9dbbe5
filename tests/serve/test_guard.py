"""Who may call: keys, Host and Origin headers, and bodies that are refused before they are sent."""

import hashlib
import json
import socket
from pathlib import Path

import pytest

from afnext import AfnextError
from afnext.serve.guard import read_keys
from afnext.serve.run import check
from afnext.serve.settings import Settings

from .conftest import Running


def raw(service: Running, request: str, seconds: float = 100.0) -> str:
    """Send bytes as they are, and return what comes back."""
    host, port = service.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=seconds) as connection:
        connection.sendall(request.encode())
        pieces = []
        try:
            while piece := connection.recv(1 << 16):
                pieces.append(piece)
                if b"\r\n\r\n" in b"".join(pieces) and b'"error"' in b"".join(pieces):
                    break
        except TimeoutError:
            pass
        return b"".join(pieces).decode()


def test_everything_but_health_needs_a_key(keyed_service: Running) -> None:
    with keyed_service.http() as client:
        for path in ("/v1/models", "/v1/status", "/metrics", "/v1/files", "/v1/contexts"):
            response = client.get(path)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["x-request-id"]
        assert client.get("/health").status_code == 200
    with keyed_service.http("wrong") as client:
        assert client.get("/v1/models").status_code == 401
    with keyed_service.http("one") as client:
        assert client.get("/v1/models").status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", ""])
def test_a_foreign_host_name_is_refused(service: Running, host: str) -> None:
    answer = raw(service, f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\n\r\n")
    assert answer.startswith("HTTP/1.1 403")
    assert "forbidden_host" in answer


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1"])
def test_pages_of_other_sites_may_not_call(service: Running, origin: str) -> None:
    with service.http() as client:
        response = client.get("/v1/models", headers={"Origin": origin})
    assert response.json()["error"]["code"] == "forbidden_origin"


def test_the_servers_own_page_may_call(service: Running) -> None:
    with service.http() as client:
        assert client.get("/v1/models", headers={"Origin": service.url}).status_code == 200


def test_a_body_that_claims_too_much_is_refused_unsent(service: Running) -> None:
    for path, kind in (("/v1/chat/completions", "application/json"), ("/v1/files", "multipart/form-data; boundary=x")):
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {kind}\r\nContent-Length: {10 << 30}\r\n\r\n"
        answer = raw(service, head)
        assert answer.startswith("HTTP/1.1 413"), answer
        assert "payload_too_large" in answer  # a server that waits for the body ends with 408


def test_unknown_routes_and_methods_are_errors_of_the_same_shape(service: Running) -> None:
    with service.http() as client:
        assert client.get("/v1/nothing").status_code == 404
        assert client.get("/v1/chat/completions").status_code == 405
        assert set(client.get("/v1/nothing").json()["error"]) == {"message", "type", "param", "code"}


def test_metrics_hold_no_keys(keyed_service: Running) -> None:
    with keyed_service.http("one") as client:
        client.get("/v1/models")
        text = client.get("/metrics").text
    assert 'afnext_requests_total{finish="",route="/v1/models",status="200"}' in text
    assert "client-one" not in text


def test_status_counts_pages(service: Running) -> None:
    with service.http() as client:
        status = client.get("/v1/status").json()
    assert status["engine"]["alive"]
    assert status["engine"]["max_batch"] == service.model.options.max_batch


def test_keys_are_read_from_a_file_and_a_variable(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"secret").hexdigest()
    path = tmp_path / "keys"
    path.write_text(f"# comment\nteam:{digest}\n")
    keys = read_keys(path, "other,named:third")
    assert keys[digest] == "team"
    assert set(keys.values()) == {"team", "key1", "named"}
    path.write_text("team:secret\n")
    with pytest.raises(AfnextError, match="line 1"):
        read_keys(path, None)


def test_a_public_address_needs_keys_or_a_word() -> None:
    with pytest.raises(AfnextError, match="--no-auth"):
        check(Settings(host="0.0.0.0"))
    check(Settings(host="0.0.0.0", no_auth=True))
    check(Settings(host="127.0.0.1"))


def test_errors_are_json(service: Running) -> None:
    answer = raw(service, "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1\r\n\r\n{")
    assert json.loads(answer.partition("\r\n\r\n")[2])["error"]["code"] == "invalid_json"
