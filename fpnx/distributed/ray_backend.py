"""Ray: the machines that it offers, and shards handed out to actors there; only names and small JSON go through it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import queue
import re
import secrets
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fpnx.core.errors import FpnxError
from fpnx.core.system import usable_cpus
from fpnx.core.text import escape
from fpnx.distributed.placement import Node, Placement
from fpnx.distributed.worker import ShardJob, ShardReport, Worker

__all__ = ["RayBackend", "RayWork", "connect", "require_ray"]

SILENCE = 10.0  # seconds for a word from another machine
STORE_BYTES = 100 << 20  # of Ray's object store on this machine: all that travels is small
DEFAULTS = {  # of Ray's environment; what the user has set stands
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
}
LOG_LEVEL = "RAY_BACKEND_LOG_LEVEL"
RAYS_OWN = re.compile(rb"\[\d{4}-\d\d-\d\d [^\]]*\] (\([^)]*\) )?\w+\.cc:\d+:")
TOKENS = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
TOKEN_FILE = Path(".ray", "auth_token")


def require_ray() -> None:
    """Raise unless Ray Data is installed.

    Raises:
        FpnxError: saying how to install it.
    """
    if any(importlib.util.find_spec(name) is None for name in ("ray", "pyarrow", "pandas")):
        raise FpnxError('engine ray: Ray Data is not installed: pip install "fpnx[ray]"')
    if os.environ.get("RAY_ADDRESS", "").startswith("ray://"):
        raise FpnxError(
            f"RAY_ADDRESS {escape(os.environ['RAY_ADDRESS'])}: Ray Client cannot hand out shards: start fpnx on a "
            f"machine of the cluster with RAY_ADDRESS=auto, or by `ray job submit`"
        )


class RayBackend:
    """A connection to Ray, made by `connect`."""

    def __init__(self, ray: Any, address: str) -> None:
        self._ray, self.address = ray, address

    def nodes(self) -> list[Node]:
        """The machines that are alive."""
        found = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        return [Node(int(each.get("CPU", 0)), int(each.get("GPU", 0))) for each in found]

    def hand_out(self, job: ShardJob, shards: Sequence[int], seats: Placement) -> RayWork:
        """Start on `shards`, in their order."""
        return RayWork(self._ray, job, shards, seats)


class RayWork:
    """Shards that are being worked on."""

    def __init__(self, ray: Any, job: ShardJob, shards: Sequence[int], seats: Placement) -> None:
        self._ray = ray
        home = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        here = home(ray.get_runtime_context().get_node_id(), soft=False)  # it lives as long as whom it informs
        self._board = ray.remote(num_cpus=0, scheduling_strategy=here)(ProgressBoard).remote()
        self._events: queue.SimpleQueue[ShardReport | BaseException | None] = queue.SimpleQueue()
        arguments = (job, shards, seats)
        self._thread = threading.Thread(target=self._run, args=arguments, name="fpnx-ray", daemon=True)
        self._thread.start()

    def next(self, seconds: float) -> ShardReport | bool:
        """The next report; True where none came in time, False where none will come any more.

        Raises:
            FpnxError: where Ray gave up.
        """
        try:
            event = self._events.get(timeout=seconds)
        except queue.Empty:
            return True
        if event is None:
            return False
        if isinstance(event, BaseException):
            raise FpnxError(
                f"Ray gave up ({_cause(event)}): see to it that the same fpnx[ray] is installed on every machine; what "
                f"was done is kept: the same command goes on"
            )
        return event

    def finished(self) -> Mapping[int, int]:
        """Images that are finished, by shard, as workers last told."""
        with contextlib.suppress(self._ray.exceptions.RayError):
            told: dict[int, int] = self._ray.get(self._board.finished.remote(), timeout=SILENCE)
            return told
        return {}

    def stop(self) -> None:
        """Have workers commit what they have and come back; shards that wait are not begun."""
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.get(self._board.stop.remote(), timeout=SILENCE)

    def _run(self, job: ShardJob, shards: Sequence[int], seats: Placement) -> None:
        try:
            for report in _reports(self._ray, self._board, job, shards, seats):
                self._events.put(report)
            self._events.put(None)
        except BaseException as error:  # the calling thread raises it
            self._events.put(error)


def _reports(ray: Any, board: Any, job: ShardJob, shards: Sequence[int], seats: Placement) -> Iterator[ShardReport]:
    """One row a shard, through a pool of actors, each of which has one in hand.

    Ray Data starts actors again that died, and gives them their row once more, without end: the ledger sets the limit.
    """
    data = ray.data
    context = data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_errored_blocks = -1  # of Ray's own: workers catch theirs
    rows = data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
    made = rows.map_batches(
        Actor,
        fn_constructor_args=(json.dumps(asdict(job)), board),
        batch_size=1,
        compute=data.ActorPoolStrategy(size=min(seats.actors, len(shards)), max_tasks_in_flight_per_actor=1),
        num_cpus=seats.cpus,
        num_gpus=seats.gpus,
    )
    for row in made.iter_rows():
        yield ShardReport(**json.loads(row["report"]))


class ProgressBoard:
    """Where workers write how far they are, and read whether to stop; a Ray actor beside the driver."""

    def __init__(self) -> None:
        self._finished: dict[int, int] = {}
        self._stop = False

    def tell(self, shard: int, finished: int) -> bool:
        """From a worker: gives back whether to stop."""
        self._finished[shard] = finished
        return self._stop

    def finished(self) -> dict[int, int]:
        """To the driver: images that are finished, by shard."""
        return dict(self._finished)

    def stop(self) -> None:
        """From the driver: all are to stop."""
        self._stop = True


class Actor:
    """A `Worker` as Ray Data calls it: rows of shards → rows of reports, in JSON."""

    def __init__(self, job: str, board: Any) -> None:
        self._worker = Worker(ShardJob(**json.loads(job)), _teller(board))

    def __call__(self, rows: Mapping[str, Any]) -> dict[str, list[str]]:
        return {"report": [json.dumps(self._worker(int(shard)).to_json()) for shard in rows["shard"]]}


def _teller(board: Any) -> Callable[[int, int], bool]:
    import ray

    def tell(shard: int, finished: int) -> bool:
        try:
            return bool(ray.get(board.tell.remote(shard, finished), timeout=SILENCE))
        except ray.exceptions.GetTimeoutError:
            return False
        except ray.exceptions.RayError:  # nobody is left who waits for this work
            return True

    return tell


@contextlib.contextmanager
def connect() -> Iterator[RayBackend]:
    """A connection to the cluster of RAY_ADDRESS, to the one that this process is connected to, or to a new one of
    this machine alone, which ends with it.

    Tokens are asked for and nothing is reported to Ray's makers, unless the environment says otherwise.

    Raises:
        FpnxError: where it cannot be had.
    """
    address = os.environ.get("RAY_ADDRESS") or "local"
    if "ray" not in sys.modules:  # else it has read its environment, and would disagree with what it starts
        _set_environment(address)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray
        import ray.data
        import ray.util.scheduling_strategies

        theirs = ray.is_initialized()
        with _quiet(ray):
            if not theirs:
                _connect(ray, address)
            try:
                yield RayBackend(ray, address)
            finally:
                if not theirs:
                    ray.shutdown()


def _set_environment(address: str) -> None:
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    known = any(os.environ.get(name) for name in TOKENS) or Path.home().joinpath(TOKEN_FILE).is_file()
    if address == "local" and os.environ["RAY_AUTH_MODE"] == "token" and not known:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _connect(ray: Any, address: str) -> None:
    options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        options |= {"num_cpus": usable_cpus(), "include_dashboard": False, "object_store_memory": STORE_BYTES}
    said: list[bytes] = []
    try:
        with _signals_kept(), _quiet_start(said):
            ray.init(**options)
    except Exception as error:
        where = "a cluster on this machine" if address == "local" else f"the cluster at RAY_ADDRESS {escape(address)}"
        why = _first_line(error)
        if any(b"InvalidAuthToken" in line for line in said):
            why = f"it does not take this token (RAY_AUTH_MODE is {os.environ.get('RAY_AUTH_MODE', 'not set')} here)"
        raise FpnxError(
            f"{where} cannot be had: {why}: see to it that it runs the same Ray, with the same RAY_AUTH_MODE and token"
        ) from error


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray sets handlers of its own when it starts."""
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
def _quiet(ray: Any) -> Iterator[None]:
    """Ray's remarks on its own doings are kept off the terminal; its log files have them."""
    handlers = [handler for name in ("ray", "ray.data") for handler in logging.getLogger(name).handlers]
    levels = [(each, each.level) for each in handlers if isinstance(each, logging.StreamHandler)]
    printer = ray._private.worker  # prints of dead workers to stdout; what silences it is what Ray's debugger sets
    printed = getattr(printer, "_worker_logs_enabled", True)
    for handler, _ in levels:
        handler.setLevel(logging.CRITICAL)
    printer._worker_logs_enabled = False
    try:
        yield
    finally:
        printer._worker_logs_enabled = printed
        for handler, level in levels:
            handler.setLevel(level)


@contextlib.contextmanager
def _quiet_start(said: list[bytes]) -> Iterator[None]:
    """The same for what is not Python in Ray: it is told to be quiet, would tell that it was, and goes to `said`."""
    if LOG_LEVEL in os.environ:
        yield
        return
    os.environ[LOG_LEVEL] = "fatal"
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
            held.seek(0)
            said += held
            os.write(2, b"".join(line for line in said if not RAYS_OWN.match(line)))


def _cause(error: BaseException) -> str:
    """What happened on the other machine: the last line of the trace that Ray hands on."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[\d;]*m", "", str(error)).splitlines() if line.strip()]
    return escape(lines[-1] if lines else type(error).__name__)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return escape(f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__)
