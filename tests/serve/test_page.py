"""The page's files: what is sent with them, that they need no other host, and that nothing else can be read."""

import http.client
import re
from urllib.parse import urlsplit

import pytest

from afnext.serve import page

from .conftest import Running

CSP = "default-src 'self'; media-src blob:; frame-ancestors 'none'"
MOST_BYTES = 80_000


def test_the_page_and_its_files_have_fixed_types_and_strict_headers(keyed_service: Running) -> None:
    types = {"css": "text/css", "html": "text/html", "js": "text/javascript", "svg": "image/svg+xml"}
    with keyed_service.http() as client:
        paths = ["/", *(f"/static/{name}" for name in page.pages())]
        assert len(paths) > 5
        for path in paths:
            response = client.get(path)
            assert response.status_code == 200, path
            assert (
                response.headers["content-type"].split(";")[0]
                == types[path.rpartition(".")[2] if path != "/" else "html"]
            )
            assert response.headers["content-security-policy"] == CSP
            assert response.headers["x-content-type-options"] == "nosniff"
            assert response.headers["cache-control"] == "no-cache"
            again = client.get(path, headers={"If-None-Match": response.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
            assert client.get(path, headers={"If-None-Match": '"other"'}).content == response.content
            assert client.head(path).status_code == 200
        assert client.post("/").status_code == 405


def test_every_file_that_the_page_names_is_served(service: Running) -> None:
    with service.http() as client:
        for name in page.pages():
            text = client.get(f"/static/{name}").text
            named = re.findall(r'(?:src|href)="([^"]+)"|from "([^"]+)"|new URL\("([^"/]+\.js)"|url\("([^"]+)"\)', text)
            for target in ["".join(groups) for groups in named]:
                if target.startswith("#"):
                    continue
                path = f"/{target}" if name == "index.html" else f"/static/{target.removeprefix('./')}"
                assert client.get(path).status_code == 200, (name, target)


def test_the_page_is_small_and_refers_to_no_other_host() -> None:
    files = page.pages()
    assert sum(len(file.content) for file in files.values()) < MOST_BYTES
    for name, file in files.items():
        text = file.content.decode()
        assert re.findall(r"(?:https?:)?//[\w-]+\.[\w.-]+", text) in ([], ["http://www.w3.org"]), (
            name
        )  # svg's namespace
        assert "innerHTML" not in text
        assert "insertAdjacentHTML" not in text


@pytest.mark.parametrize(
    "path",
    [
        "/static/../page.py",
        "/static/..%2fpage.py",
        "/static/%2e%2e/page.py",
        "/static/..\\page.py",
        "/static//etc/passwd",
        "/static/%2fetc%2fpasswd",
        "/static/index.html%00.js",
        "/static/",
        "/static/nothing.js",
    ],
)
def test_nothing_but_the_pages_files_is_served(service: Running, path: str) -> None:
    address = urlsplit(service.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=60)
    try:
        connection.putrequest("GET", path)  # as it stands: other clients would tidy the path
        connection.endheaders()
        response = connection.getresponse()
        assert response.status == 404
        assert b"def " not in response.read()
    finally:
        connection.close()
