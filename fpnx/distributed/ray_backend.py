"""Ray backend: starts a pool of Ray actors on a cluster and gives each one shard at a time.

Only shard numbers and small JSON pass through Ray; images and features never do.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import re
import secrets
import signal
import sys
import tempfile
import threading
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fpnx.core.errors import FpnxError
from fpnx.core.system import usable_cpus
from fpnx.core.text import escape
from fpnx.distributed.placement import Node, Placement
from fpnx.distributed.worker import ProgressCallback, ShardJob, ShardReport, Worker

__all__ = ["RayBackend", "RayWork", "connect", "require_ray"]

REPLY_TIMEOUT = 10.0  # seconds to wait for the progress board's reply
OBJECT_STORE_BYTES = 100 << 20  # for Ray's object store on this machine; only small objects pass through it
ENVIRONMENT_DEFAULTS = {  # for Ray; variables that the user has set are kept
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
}
LOG_LEVEL_VARIABLE = "RAY_BACKEND_LOG_LEVEL"
RAY_LOG_LINE = re.compile(rb"\[\d{4}-\d\d-\d\d [^\]]*\] (\([^)]*\) )?\w+\.cc:\d+:")
TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
TOKEN_FILE = Path(".ray", "auth_token")


def require_ray() -> None:
    """Raise unless Ray is installed and RAY_ADDRESS can be used.

    Raises:
        FpnxError: Ray is missing, or RAY_ADDRESS is a Ray Client address.
    """
    if importlib.util.find_spec("ray") is None:
        raise FpnxError('engine ray: Ray is not installed: pip install "fpnx[ray]"')
    if os.environ.get("RAY_ADDRESS", "").startswith("ray://"):
        raise FpnxError(
            f"RAY_ADDRESS {escape(os.environ['RAY_ADDRESS'])}: Ray Client cannot hand out shards: start fpnx on a "
            f"machine of the cluster with RAY_ADDRESS=auto, or by `ray job submit`"
        )


class RayBackend:
    """`Backend` on a Ray cluster; `connect` makes it.

    Args:
        ray: the imported module `ray`, connected to a cluster.
    """

    def __init__(self, ray: Any) -> None:
        self._ray = ray

    def nodes(self) -> list[Node]:
        """The machines of the cluster that are alive."""
        resources = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        return [Node(int(each.get("CPU", 0)), int(each.get("GPU", 0))) for each in resources]

    def submit(self, job: ShardJob, shards: Sequence[int], placement: Placement) -> RayWork:
        """Start the actors and give them `shards`, in this order."""
        return RayWork(self._ray, job, shards, placement)


class RayWork:
    """`RunningWork` on a pool of Ray actors, each of which has one shard at a time.

    Ray restarts an actor that died, on any node with room, and repeats its call. It does so without limit: the
    attempt log of the shard sets the limit. An actor that has no shard left is ended, which makes room for a restart.
    """

    def __init__(self, ray: Any, job: ShardJob, shards: Sequence[int], placement: Placement) -> None:
        self._ray = ray
        self._waiting = deque(shards)
        self._calls: dict[Any, Any] = {}  # the reference to the report → the actor that works on it
        affinity = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        this_node = affinity(ray.get_runtime_context().get_node_id(), soft=False)
        self._board = ray.remote(num_cpus=0, scheduling_strategy=this_node)(ProgressBoard).remote()
        actor_class = ray.remote(
            num_cpus=placement.cpus,
            num_gpus=placement.gpus,
            max_restarts=-1,
            max_task_retries=-1,
            scheduling_strategy="SPREAD",
        )(ShardActor)
        for _ in range(min(placement.actors, len(shards))):
            self._give_shard(actor_class.remote(json.dumps(asdict(job)), self._board))

    @property
    def running(self) -> bool:
        """Whether reports are still to come."""
        return bool(self._calls)

    def next_report(self, timeout: float) -> ShardReport | None:
        """The next report, or None if none comes within `timeout` seconds.

        Raises:
            FpnxError: an actor could not be started or failed.
        """
        ready, _ = self._ray.wait(list(self._calls), timeout=timeout)
        if not ready:
            return None
        actor = self._calls.pop(ready[0])
        try:
            report = ShardReport(**json.loads(self._ray.get(ready[0])))
        except self._ray.exceptions.RayError as error:
            raise FpnxError(
                f"Ray failed ({_last_line(error)}): check that the same fpnx[ray] is installed on every machine; what "
                f"was done is kept: the same command goes on"
            ) from error
        self._give_shard(actor)
        return report

    def images_finished(self) -> Mapping[int, int]:
        """Number of finished images by shard, as last reported by the workers."""
        with contextlib.suppress(self._ray.exceptions.RayError):
            finished: dict[int, int] = self._ray.get(self._board.images_finished.remote(), timeout=REPLY_TIMEOUT)
            return finished
        return {}

    def stop(self) -> None:
        """Ask the workers to commit what they have and report."""
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.get(self._board.stop.remote(), timeout=REPLY_TIMEOUT)

    def _give_shard(self, actor: Any) -> None:
        """Give the actor the next shard, or end it if there is none."""
        if self._waiting:
            self._calls[actor.run.remote(self._waiting.popleft())] = actor
        else:
            self._ray.kill(actor)


class ProgressBoard:
    """A Ray actor beside the driver: workers report progress to it and ask it whether to stop."""

    def __init__(self) -> None:
        self._finished: dict[int, int] = {}
        self._stop = False

    def update(self, shard: int, finished: int) -> bool:
        """Called by a worker: keep the number of finished images of `shard`; returns whether to stop."""
        self._finished[shard] = finished
        return self._stop

    def images_finished(self) -> dict[int, int]:
        """Called by the driver: number of finished images by shard."""
        return dict(self._finished)

    def stop(self) -> None:
        """Called by the driver: ask all workers to stop."""
        self._stop = True


class ShardActor:
    """A Ray actor around a `Worker`; job and reports pass as JSON."""

    def __init__(self, job: str, board: Any) -> None:
        self._worker = Worker(ShardJob(**json.loads(job)), _progress_callback(board))

    def run(self, shard: int) -> str:
        """Work on a shard; returns its report."""
        return json.dumps(self._worker(shard).to_json())


def _progress_callback(board: Any) -> ProgressCallback:
    import ray

    def update(shard: int, finished: int) -> bool:
        try:
            return bool(ray.get(board.update.remote(shard, finished), timeout=REPLY_TIMEOUT))
        except ray.exceptions.GetTimeoutError:
            return False
        except ray.exceptions.RayError:  # the driver is gone
            return True

    return update


@contextlib.contextmanager
def connect() -> Iterator[RayBackend]:
    """Connect to Ray: the existing connection of this process, else the cluster of RAY_ADDRESS, else a local one.

    A local cluster has this machine alone and ends with the connection. Token authentication is on and usage
    statistics are off unless the environment says otherwise.

    Raises:
        FpnxError: no connection can be made.
    """
    address = os.environ.get("RAY_ADDRESS") or "local"
    if "ray" not in sys.modules:  # once imported, Ray has read its environment and must not see other values
        _set_environment(address)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray
        import ray.util.scheduling_strategies

        connected_before = ray.is_initialized()
        with _quiet_logging(ray):
            if not connected_before:
                _initialize(ray, address)
            try:
                yield RayBackend(ray)
            finally:
                if not connected_before:
                    ray.shutdown()


def _set_environment(address: str) -> None:
    for name, value in ENVIRONMENT_DEFAULTS.items():
        os.environ.setdefault(name, value)
    has_token = any(os.environ.get(name) for name in TOKEN_VARIABLES) or Path.home().joinpath(TOKEN_FILE).is_file()
    if address == "local" and os.environ["RAY_AUTH_MODE"] == "token" and not has_token:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _initialize(ray: Any, address: str) -> None:
    options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        options |= {"num_cpus": usable_cpus(), "include_dashboard": False}
        options |= {"object_store_memory": OBJECT_STORE_BYTES}
    stderr_lines: list[bytes] = []
    try:
        with _signal_handlers_kept(), _stderr_filtered(stderr_lines):
            ray.init(**options)
    except Exception as error:
        what = "start Ray on this machine"
        if address != "local":
            what = f"connect to the cluster at RAY_ADDRESS {escape(address)}"
        reason = _first_line(error)
        if any(b"InvalidAuthToken" in line for line in stderr_lines):
            mode = os.environ.get("RAY_AUTH_MODE", "not set")
            reason = f"it does not accept this token (RAY_AUTH_MODE is {mode} here)"
        raise FpnxError(
            f"cannot {what}: {reason}: all machines need the same version of Ray, the same RAY_AUTH_MODE and the same "
            f"token"
        ) from error


@contextlib.contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """Restore the handlers of SIGINT and SIGTERM at the end: Ray sets its own when it starts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextlib.contextmanager
def _quiet_logging(ray: Any) -> Iterator[None]:
    """Keep Ray's log messages off the terminal; its log files have them."""
    handlers = [each for each in logging.getLogger("ray").handlers if isinstance(each, logging.StreamHandler)]
    levels = [(handler, handler.level) for handler in handlers]
    # Ray prints a line on stdout for each worker that dies; the flag that turns this off is the one its debugger sets.
    worker_module = ray._private.worker
    logs_enabled = getattr(worker_module, "_worker_logs_enabled", True)
    for handler, _ in levels:
        handler.setLevel(logging.CRITICAL)
    worker_module._worker_logs_enabled = False
    try:
        yield
    finally:
        worker_module._worker_logs_enabled = logs_enabled
        for handler, level in levels:
            handler.setLevel(level)


@contextlib.contextmanager
def _stderr_filtered(lines: list[bytes]) -> Iterator[None]:
    """Remove the messages of Ray's C++ part from stderr while it starts; all lines of stderr are added to `lines`.

    The log level of the C++ part is set to `fatal`, and it would print a line about that, too.
    """
    if LOG_LEVEL_VARIABLE in os.environ:
        yield
        return
    os.environ[LOG_LEVEL_VARIABLE] = "fatal"
    sys.stderr.flush()
    stderr_copy = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr_copy, 2)
            os.close(stderr_copy)
            file.seek(0)
            lines += file
            os.write(2, b"".join(line for line in lines if not RAY_LOG_LINE.match(line)))


def _last_line(error: BaseException) -> str:
    """The error on the other machine: the last line of the traceback in Ray's message, without colours."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[\d;]*m", "", str(error)).splitlines() if line.strip()]
    return escape(lines[-1] if lines else type(error).__name__)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return escape(f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__)
