"""The command line as a process, and what it prints.

`process` starts an interpreter, as a user does. `forked` starts the process that a test is to kill, to interrupt or to
wait for, without the seconds in which an interpreter loads torch.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.helpers.files import ROOT

SMALL: dict[str, Any] = {  # options with which an extraction takes little
    "backbone": "mobilenet_v2",
    "weights": "random",
    "size": 64,
    "levels": "P4-P5",
    "channels": 8,
    "device": "cpu",
}


@contextmanager
def unprivileged() -> Iterator[None]:
    """Without the powers of root, which permissions do not bind."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def process(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`fpnx ARGUMENTS` in a process of its own."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-m", "fpnx", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


COMMAND_LINE = "from fpnx.__main__ import run\nraise SystemExit(run())"


class Forked:
    """A running process with the interface of `subprocess.Popen`; its streams are pipes of text.

    Args:
        code: the program, as for `python -c`.
        arguments: of the program.
        cwd: the folder in which it runs.
        environment: variables beside those of this process.
    """

    def __init__(self, code: str, *arguments: object, cwd: Path, **environment: str) -> None:
        self.returncode: int | None = None
        inner, outer = zip(os.pipe(), os.pipe()[::-1], os.pipe()[::-1], strict=True)
        job = {
            "code": code,
            "arguments": [str(each) for each in arguments],
            "cwd": str(cwd),
            "environment": {**os.environ, **environment},
        }
        self.pid = _server().ask(job, inner)
        for descriptor in inner:
            os.close(descriptor)
        self._ended = os.pidfd_open(self.pid)
        self.stdin, self.stdout, self.stderr = (os.fdopen(each, mode) for each, mode in zip(outer, "wrr", strict=True))

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        self.stdin.close()
        self.wait()
        self.stdout.close()
        self.stderr.close()

    def poll(self) -> int | None:
        """The exit code, negative where a signal ended it; None while it runs."""
        if self.returncode is None and select.select([self._ended], [], [], 0)[0]:
            self.returncode = _server().ask({"wait": self.pid})
            os.close(self._ended)
        return self.returncode

    def wait(self, timeout: float = 240) -> int:
        """The exit code, once it has ended.

        Raises:
            subprocess.TimeoutExpired: it runs after `timeout` seconds.
        """
        if self.returncode is None and not select.select([self._ended], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        code = self.poll()
        assert code is not None
        return code

    def send_signal(self, signum: int) -> None:
        """Send a signal, where it has not ended."""
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        """Kill it, where it has not ended."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, text: str = "", timeout: float = 240) -> tuple[str, str]:
        """Give it `text`, and wait for its end: stdout and stderr."""
        errors: list[str] = []
        reading = threading.Thread(target=lambda: errors.append(self.stderr.read()))
        reading.start()
        if text:
            self.stdin.write(text)
        self.stdin.close()
        out = self.stdout.read()
        reading.join()
        self.wait(timeout)
        self.stdout.close()
        self.stderr.close()
        return out, errors[0]


class _Server:
    """`tests.helpers.fork_server`, which ends when this process does."""

    def __init__(self) -> None:
        self._socket, other = socket.socketpair()
        command = [sys.executable, "-m", "tests.helpers.fork_server", str(other.fileno())]
        with other:
            self._process = subprocess.Popen(command, cwd=ROOT, pass_fds=[other.fileno()])
        atexit.register(self.close)

    def ask(self, job: dict[str, Any], descriptors: tuple[int, ...] = ()) -> int:
        message = json.dumps(job).encode() + b"\n"
        sent = socket.send_fds(self._socket, [message], descriptors)
        self._socket.sendall(message[sent:])
        answer = b""
        while not answer.endswith(b"\n"):
            received = self._socket.recv(100)
            assert received, "the server has ended"
            answer += received
        return int(answer)

    def close(self) -> None:
        self._socket.close()
        self._process.wait()


@functools.cache
def _server() -> _Server:
    return _Server()


def forked(*arguments: object, cwd: Path, **environment: str) -> Forked:
    """`fpnx ARGUMENTS` in a process of its own, running."""
    return Forked(COMMAND_LINE, *arguments, cwd=cwd, **environment)


def document(text: str) -> dict[str, Any]:
    """The one JSON document that `text` is."""
    value = json.loads(text)
    assert isinstance(value, dict)
    return value
