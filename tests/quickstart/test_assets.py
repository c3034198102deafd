"""Downloads from a package index on the loopback: whole and checked, or one message and no file."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import socket
import tarfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from gradpursuit.errors import DownloadError, RunError
from gradpursuit.quickstart import assets as module
from gradpursuit.quickstart.assets import Archive, bigbench_tasks, cache_folder, fetch

CONTENT = bytes(range(256)) * 4096  # 1 MiB
NAME = "a_package-1.0-py3-none-any.whl"
ARCHIVE = Archive("a-package", NAME, hashlib.sha256(CONTENT).hexdigest(), len(CONTENT))
Serve = Callable[..., list[str]]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Starts an index with one project; `PIP_INDEX_URL` points to it. Returns the list of paths asked for."""
    servers: list[ThreadingHTTPServer] = []
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)

    def start(
        content: bytes = CONTENT, *, name: str = NAME, promised: int | None = None, status: int = 200
    ) -> list[str]:
        asked: list[str] = []

        class Index(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                if self.path == "/simple/a-package/":
                    page = f'<!DOCTYPE html><html><body><a href="/files/{name}">{name}</a></body></html>'.encode()
                    self.answer(200, "text/html", page, len(page))
                elif self.path.startswith("/files/"):
                    self.answer(status, "application/zip", content, promised or len(content))
                else:
                    self.answer(404, "text/plain", b"no", 2)

            def answer(self, code: int, kind: str, body: bytes, length: int) -> None:
                self.send_response(code)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                self.wfile.write(body)
                self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Index)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple/")
        return asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_success_is_checked_and_kept(serve: Serve, tmp_path: Path) -> None:
    asked = serve()
    path = fetch(ARCHIVE, tmp_path / "cache")
    assert path == tmp_path / "cache" / NAME
    assert path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == [NAME]
    count = len(asked)
    assert fetch(ARCHIVE, tmp_path / "cache") == path
    assert len(asked) == count  # nothing is fetched twice


def test_several_processes_fetch_once(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when tests or quickstarts are started together: one fetches and unpacks, the others use what it made."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for task in ("one", "two"):
            content = json.dumps({"name": task}).encode()
            member = tarfile.TarInfo(f"a/bigbench/benchmark_tasks/{task}/task.json")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    archive = packed.getvalue()
    monkeypatch.setattr(
        module, "BIGBENCH", Archive("a-package", NAME, hashlib.sha256(archive).hexdigest(), len(archive))
    )
    asked = serve(archive)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: bigbench_tasks(tmp_path, ["one", "two"]), range(4)))
    assert found == [{"one": {"name": "one"}, "two": {"name": "two"}}] * 4
    assert len([path for path in asked if path.startswith("/files/")]) == 1


def test_damaged_file_is_fetched_again(serve: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    serve()
    (tmp_path / NAME).write_bytes(CONTENT[:-1])
    with caplog.at_level(logging.WARNING, "gradpursuit"):
        assert fetch(ARCHIVE, tmp_path).read_bytes() == CONTENT
    assert "is damaged and is fetched again" in caplog.text


def test_other_bytes_are_refused_and_removed(serve: Serve, tmp_path: Path) -> None:
    serve(CONTENT[:-1] + b"x")
    with pytest.raises(DownloadError, match=rf"{NAME}: sha256 is [0-9a-f]{{64}}, expected {ARCHIVE.sha256}"):
        fetch(ARCHIVE, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_download_larger_than_its_size_is_stopped(serve: Serve, tmp_path: Path) -> None:
    serve(CONTENT * 8)
    with pytest.raises(DownloadError, match=r"the package index sends more than the 1,048,576 bytes that the file has"):
        fetch(ARCHIVE, tmp_path)
    assert not list(tmp_path.glob("*.whl*"))


def test_connection_that_breaks_in_the_middle(serve: Serve, tmp_path: Path) -> None:
    serve(CONTENT[:300_000], promised=len(CONTENT))
    with pytest.raises(DownloadError, match=rf"{NAME} could not be fetched \(\w+\); check the network") as caught:
        fetch(ARCHIVE, tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_index_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{port}/simple/")
    with pytest.raises(DownloadError, match=r"could not be fetched .* set PIP_INDEX_URL to a package index"):
        fetch(ARCHIVE, tmp_path)
    assert not list(tmp_path.iterdir())


def test_file_that_the_index_does_not_have(serve: Serve, tmp_path: Path) -> None:
    serve(name="a_package-2.0-py3-none-any.whl")
    with pytest.raises(DownloadError, match=rf"the package index has no {NAME}; check the network, or set PIP_INDEX"):
        fetch(ARCHIVE, tmp_path)


def test_project_that_the_index_does_not_have(serve: Serve, tmp_path: Path) -> None:
    serve()
    with pytest.raises(DownloadError, match="the package index has no project 'b-package'"):
        fetch(Archive("b-package", NAME, ARCHIVE.sha256, 1), tmp_path)


@pytest.mark.parametrize("status", [403, 404, 500])
def test_file_that_is_refused(serve: Serve, tmp_path: Path, status: int) -> None:
    serve(status=status)
    with pytest.raises(DownloadError, match="could not be fetched"):
        fetch(ARCHIVE, tmp_path)
    assert not list(tmp_path.iterdir())


def test_disk_that_is_too_small(serve: Serve, tmp_path: Path) -> None:
    asked = serve()
    with pytest.raises(RunError, match=f"the download of {NAME} needs"):
        fetch(Archive("a-package", NAME, ARCHIVE.sha256, 1 << 60), tmp_path)
    assert asked == []


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("GRADPURSUIT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "gradpursuit"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_folder() == tmp_path / "x" / "gradpursuit"
    monkeypatch.setenv("GRADPURSUIT_CACHE", "~/own")
    assert cache_folder() == tmp_path / "own"
