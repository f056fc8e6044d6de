"""Servers on loopback for tests: a web server that misbehaves as it is told, S3 by moto, and a line that breaks."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

KEYS = {
    "AWS_ACCESS_KEY_ID": "AKIATESTTESTTESTTEST",
    "AWS_SECRET_ACCESS_KEY": "not/a/secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_MAX_ATTEMPTS": "2",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "NO_PROXY": "127.0.0.1,localhost",
    "no_proxy": "127.0.0.1,localhost",
}


@dataclass
class Manners:
    """How a web server answers for one path.

    Attributes:
        content: the bytes of the file.
        status: of every answer.
        head: status of answers to HEAD, where it is another.
        ranges, length: whether it knows Range and Content-Length.
        modified, etag: its Last-Modified and ETag; empty: none.
        breaks: so many first answers end in the middle.
        waits: seconds before the body.
        leads: where a redirect leads.
    """

    content: bytes = b""
    status: int = 200
    head: int | None = None
    ranges: bool = True
    length: bool = True
    modified: str = "Wed, 21 Oct 2015 07:28:00 GMT"
    etag: str = ""
    breaks: int = 0
    waits: float = 0.0
    leads: str = ""


@dataclass
class Web:
    """A web server: `files` by path without the query, and method, path with query and Range of every request."""

    files: dict[str, Manners] = field(default_factory=dict)
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def put(self, path: str, content: bytes, **manners: Any) -> str:
        """Serve a file; its address."""
        self.files[path] = Manners(content, **manners)
        return self.url + path


@contextlib.contextmanager
def web_server() -> Iterator[Web]:
    """A web server in a thread."""
    web = Web()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(False)

        def do_GET(self) -> None:
            self._answer(True)

        def _answer(self, with_body: bool) -> None:
            asked = self.headers.get("Range", "")
            web.requests.append((self.command, self.path, asked))
            file = web.files.get(self.path.partition("?")[0], Manners(b"<html>404", status=404, modified=""))
            status = file.head if not with_body and file.head is not None else file.status
            body = file.content
            if status == 200 and asked and file.ranges and with_body:
                first, last = asked.removeprefix("bytes=").split("-")
                end = min(int(last) + 1 if last else len(body), len(body))
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{end - 1}/{len(body)}")
                body = body[int(first) : end]
            else:
                self.send_response(status)
            if file.modified:
                self.send_header("Last-Modified", file.modified)
            if file.etag:
                self.send_header("ETag", file.etag)
            if file.leads:
                self.send_header("Location", file.leads)
            if file.length:
                self.send_header("Content-Length", str(len(body)))
            elif with_body:
                self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            if not with_body:
                return
            self.wfile.flush()
            time.sleep(file.waits)
            if file.breaks > 0 and status == 200:
                file.breaks -= 1
                self.wfile.write((b"" if file.length else b"%x\r\n" % len(body)) + body[: len(body) // 2])
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
            elif file.length:
                self.wfile.write(body)
            else:
                self.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if body else b"0\r\n\r\n")

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """Clients that go away are part of the game."""

    with Server(("127.0.0.1", 0), Handler) as server:
        web.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield web
        finally:
            server.shutdown()
            thread.join()


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[int]:
    """S3 by moto, in a process of its own; the port."""
    port = free_port()
    with open(folder / "moto.log", "wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=log,
            stderr=log,
            env={**os.environ, **KEYS},
        )
    try:
        for _ in range(600):
            assert server.poll() is None, (folder / "moto.log").read_text()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.05)
        yield port
    finally:
        server.terminate()
        server.wait(20)


class Line:
    """A line to a server on loopback, by way of `port`, that breaks where it is told.

    Attributes:
        cut_after: bytes from a client after which its connection ends; None: never.
        deaf: whether it then only stops to listen, and never says so.
        breaks: how many answers of more than 100,000 bytes end there.
        silent: whether it takes connections and never answers.
    """

    def __init__(self, server: int) -> None:
        self._server, self.silent, self.deaf, self.breaks = server, False, False, 0
        self.cut_after: int | None = None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.port = int(self._listener.getsockname()[1])
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(client)
            if self.silent:
                continue
            server = socket.create_connection(("127.0.0.1", self._server))
            self._open.append(server)
            for source, target in ((client, server), (server, client)):
                threading.Thread(target=self._pass, args=(source, target, source is client), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, from_client: bool) -> None:
        through = 0
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                through += len(data)
                if from_client and self.cut_after is not None and through > self.cut_after:
                    if not self.deaf:  # a reset, as of a line that is cut
                        source.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        source.close()
                    break
                if not from_client and self.breaks and through > 100_000:
                    self.breaks -= 1
                    break
                target.sendall(data)
        for end in () if self.deaf else (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
        for end in self._open:
            end.close()
