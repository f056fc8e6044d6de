"""A process that has loaded torch and all of fpnx, and forks a child for each program: `python -m` this, DESCRIPTOR.

A fresh interpreter takes seconds to load torch, and a fork of one nothing. `tests.helpers.process` starts the server
and talks to it through the socket DESCRIPTOR.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import pkgutil
import signal
import socket
import sys
import threading
import traceback
from typing import Any

import torch  # noqa: F401

import fpnx


def serve(connection: socket.socket) -> None:
    """Start programs and tell their exit codes until the socket is closed."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, 1 << 16, 3)
        while message and not message.endswith(b"\n"):
            message += connection.recv(1 << 16)
        if not message:
            return
        job = json.loads(message)
        if "wait" in job:
            answer = os.waitstatus_to_exitcode(os.waitpid(job["wait"], 0)[1])
        else:
            answer = os.fork()
            if not answer:
                connection.close()
                run(job, descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        connection.sendall(b"%d\n" % answer)


def run(job: dict[str, Any], descriptors: list[int]) -> None:
    """Run a program as the interpreter does, in this process, which it ends."""
    code = 1
    try:
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)
        sys.stdin = os.fdopen(0)
        sys.stdout = os.fdopen(1, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)
        sys.stderr = os.fdopen(2, "w", 1, encoding=sys.stderr.encoding, errors=sys.stderr.errors)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(job["environment"])
        os.chdir(job["cwd"])
        sys.path.insert(0, job["cwd"])
        sys.argv = ["-c", *job["arguments"]]
        exec(compile(job["code"], "<program>", "exec"), {"__name__": "__main__"})
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as at the end of a program
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal, meant for pytest
    for module in pkgutil.walk_packages(fpnx.__path__, "fpnx."):
        if module.name != "fpnx.__main__":
            importlib.import_module(module.name)
    serve(socket.socket(fileno=int(sys.argv[1])))
