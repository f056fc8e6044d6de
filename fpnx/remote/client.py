"""Objects in stores and on web servers: found, read and written; time limits, second tries, and reasons in words."""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import TimeoutError as NotYetError
from contextlib import contextmanager, suppress
from typing import TypeVar

from fpnx.core.errors import FpnxError
from fpnx.core.text import escape
from fpnx.remote.backends import AbandonedError, AnswerError, ObjectInfo, Service, connect, error_code, refusal
from fpnx.remote.urls import checked

__all__ = ["Ranges", "RemoteError", "about", "about_all", "below", "check_writable", "connections", "read", "send"]

SECONDS = 120  # for one question, its second tries included
SLOWEST = 100_000  # bytes a second, below which an object is given up
WAITS = (0.5, 2.0)  # seconds before the second and the third try
TOGETHER, CROWD = 32, 1024  # questions that are under way at once, and that wait for their turn
HEED = 0.1  # seconds within which a signal is heard
LEAST_AHEAD, MOST_AHEAD = 1 << 16, 1 << 23  # bytes that are read ahead: more while reads follow on each other
CHANGED = "changed after it was listed"
NO_CREDENTIALS = (
    "no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; for a public bucket "
    "FSSPEC_S3_ANON=true"
)
UNREACHED = "cannot be reached: no network, no such host, or nothing that listens there"
LATE, BROKEN = "no answer in time", "the connection broke"
REASONS = {  # by the name of an error's class, or of the nearest above it: the classes themselves may not be installed
    "NoCredentialsError": NO_CREDENTIALS,
    "PartialCredentialsError": NO_CREDENTIALS,
    "ProfileNotFound": "there is no such profile: see AWS_PROFILE",
    "CredentialRetrievalError": "the credentials cannot be had: sign in again",
    "TokenRetrievalError": "the credentials cannot be had: sign in again",
    "SSOError": "the credentials cannot be had: sign in again",
    "RefreshError": "the credentials cannot be had: sign in again",
    "DefaultCredentialsError": "no credentials: see `gcloud auth application-default login`",
    "ParamValidationError": "not a name that the store takes",
    "InvalidURL": "not an address",
    "TooManyRedirects": "too many redirects",
    "ClientSSLError": "its certificate is not trusted",
    "SSLError": "its certificate is not trusted",
    "ProxyConnectionError": "the proxy cannot be reached",
    "ClientProxyConnectionError": "the proxy cannot be reached",
    "EndpointConnectionError": UNREACHED,
    "ClientConnectorError": UNREACHED,
    "ConnectTimeoutError": LATE,
    "ReadTimeoutError": LATE,
    "TimeoutError": LATE,
    "IncompleteRead": BROKEN,
    "HTTPClientError": BROKEN,
    "ClientError": BROKEN,  # aiohttp's; those of S3 have a code
    "ConnectionError": BROKEN,
    "FileNotFoundError": "not found",
    "PermissionError": "no permission",
    "FileExistsError": "it is there already",
}
CODES = {  # of S3
    "NoSuchBucket": "no such bucket",
    "NoSuchKey": "not found",
    "404": "not found",
    "AccessDenied": "no permission (AccessDenied)",
    "403": "no permission (403)",
    "InvalidRange": CHANGED,
    "416": CHANGED,
    "PermanentRedirect": "its bucket is in another region: set AWS_REGION",
    "AuthorizationHeaderMalformed": "its bucket is in another region: set AWS_REGION",
    "301": "its bucket is in another region: set AWS_REGION",
    "EntityTooLarge": "larger than the store takes: cut the work into shards with --shard",
    "InvalidObjectState": "it is in an archive tier: restore it first",
}
REJECTED = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "InvalidClientTokenId")
PASSING = {  # errors after which another try may succeed; botocore has tried again after its own
    *("ClientPayloadError", "IncompleteRead", "ResponseStreamingError", "ConnectionResetError"),
    *("ServerDisconnectedError", "ServerTimeoutError", "ClientOSError"),
}

Answer = TypeVar("Answer")

_services: dict[tuple[int, str], Service] = {}  # by process, since no loop survives a fork, and by scheme
_users = 0
_lock = threading.Lock()


class RemoteError(FpnxError):
    """What could not be had of a store; `reason` says why, without the address."""

    def __init__(self, url: bytes, reason: str) -> None:
        super().__init__(f"{escape(url)}: {reason}")
        self.reason = reason


@contextmanager
def connections() -> Iterator[None]:
    """Whatever connections are made inside are closed at the end, once the last of several such blocks is left; those
    that are made outside, when the process ends."""
    global _users
    with _lock:
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            last = _users == 0
        if last:
            _close_all()


def _close_all() -> None:
    with _lock:
        unused = [service for (process, _), service in _services.items() if process == os.getpid()]
        _services.clear()
    for service in unused:
        with suppress(Exception):  # nothing is lost: they are only not closed politely
            _wait(service, service.close, 5)


def about(url: bytes) -> ObjectInfo:
    """Size and time of an object.

    Raises:
        RemoteError: saying why there is nothing.
    """
    return _ask(url, lambda service: service.about(url))


def about_all(urls: Sequence[bytes]) -> list[ObjectInfo | RemoteError]:
    """`about` of many at once, in their order; what cannot be had is an error in its place."""
    turns = asyncio.Semaphore(TOGETHER)

    async def one(service: Service, url: bytes) -> ObjectInfo | RemoteError:
        async with turns:
            try:
                return await asyncio.wait_for(_tried(lambda: service.about(url)), SECONDS)
            except Exception as error:
                return RemoteError(url, _reason(error))

    async def every() -> list[ObjectInfo | RemoteError]:
        answers: list[ObjectInfo | RemoteError] = []
        for first in range(0, len(urls), CROWD):
            crowd = urls[first : first + CROWD]
            answers += await asyncio.gather(*(one(services[_scheme(url)], url) for url in crowd))
        return answers

    services = {scheme: _service(scheme) for scheme in {_scheme(url) for url in urls}}
    return _wait(next(iter(services.values())), every, None) if services else []


def below(url: bytes, prefix: bytes = b"") -> list[tuple[bytes, ObjectInfo]]:
    """Address and facts of every object below a folder of a store, whose addresses go on with `prefix`.

    Raises:
        RemoteError: saying why it cannot be listed.
    """

    async def every(service: Service) -> list[tuple[bytes, ObjectInfo]]:
        return [found async for found in service.below(url, prefix)]

    return _ask(url, every, None)  # each page has its own limits


def read(url: bytes, listed: ObjectInfo, start: int = 0, end: int | None = None, most: int = 1 << 40) -> bytes:
    """Bytes of an object from `start` to `end`, or all of it.

    Args:
        url: the object.
        listed: what it was when it was listed.
        start, end: the first byte, and the one after the last.
        most: how many bytes are too many.

    Raises:
        RemoteError: saying why; also where it is not what was listed.
    """
    if end is not None and end <= start:
        return b""
    expected = max(0, listed.bytes) if end is None else end - start
    data, facts = _ask(url, lambda service: service.read(url, start, end, most), SECONDS + expected / SLOWEST)
    other_size = listed.bytes >= 0 and facts.bytes != listed.bytes
    other_time = listed.mtime_ns != facts.mtime_ns and 0 not in (listed.mtime_ns, facts.mtime_ns)
    if other_size or other_time or (end is not None and len(data) != end - start):
        raise RemoteError(url, CHANGED)
    return data


class Ranges:
    """Reads anywhere in an object as requests for its parts, larger ones while they follow on each other."""

    def __init__(self, url: bytes, listed: ObjectInfo) -> None:
        self._url, self._listed = url, listed
        self._start, self._held, self._ahead = 0, b"", LEAST_AHEAD

    def __call__(self, start: int, count: int) -> bytes:
        """`count` bytes from `start` on; fewer at the end."""
        end = min(start + count, self._listed.bytes)
        if start >= end:
            return b""
        reach = self._start + len(self._held)
        if not self._start <= start <= end <= reach:
            near = self._start <= start < reach + self._ahead
            self._ahead = min(2 * self._ahead, MOST_AHEAD) if near else LEAST_AHEAD
            stop = min(max(end, start + self._ahead), self._listed.bytes)
            self._held, self._start = read(self._url, self._listed, start, stop), start
        return self._held[start - self._start : end - self._start]


def check_writable(url: bytes) -> None:
    """See whether an object of this name could be written.

    Raises:
        RemoteError: saying why not.
    """
    _ask(url, lambda service: service.check_writable(url))


def send(file: str, url: bytes, replace: bool, sent: Callable[[int], None], wanted: Callable[[], bool]) -> bool:
    """Write a file as an object, whole or not at all; False where another is there that may not be replaced.

    Args:
        file: what to send.
        url: where to.
        replace: whether what is there may be replaced.
        sent: hears, from the calling thread, how many bytes are through.
        wanted: asked again and again; once it says no, the upload is given up and `AbandonedError` raised.

    Raises:
        RemoteError: saying why it was not written.
    """
    through, given_up = 0, threading.Event()
    # A peer that no longer takes anything says nothing either: parts that are under way have so long to get through.
    patience = SECONDS + max(1 << 26, os.path.getsize(file) // 4000) / SLOWEST

    def count(more: int) -> None:
        nonlocal through
        through += more
        if given_up.is_set():
            raise AbandonedError

    service = _service(_scheme(url))
    running = asyncio.run_coroutine_threadsafe(service.put(file, url, replace, count), service.loop)
    before, since = 0, time.monotonic()
    try:
        while True:
            sent(through)
            if not wanted():
                given_up.set()
            if through > before:
                before, since = through, time.monotonic()
            elif time.monotonic() - since > patience:
                raise AnswerError(LATE)
            with suppress(NotYetError):
                if running.exception(HEED) is None:
                    sent(through)
                return running.result()
    except AbandonedError:
        raise
    except Exception as error:
        raise RemoteError(url, _reason(error)) from error
    finally:
        running.cancel()


def _scheme(url: bytes) -> str:
    return checked(url).partition(b"://")[0].decode()


def _service(scheme: str) -> Service:
    key = os.getpid(), "http" if scheme == "https" else scheme
    with _lock:
        if key not in _services:
            _services[key] = connect(key[1])
            atexit.register(_close_all)
        return _services[key]


def _ask(url: bytes, work: Callable[[Service], Awaitable[Answer]], seconds: float | None = SECONDS) -> Answer:
    service = _service(_scheme(url))
    try:
        return _wait(service, lambda: _tried(lambda: work(service)), seconds)
    except FpnxError:
        raise
    except Exception as error:
        raise RemoteError(url, _reason(error)) from error


def _wait(service: Service, work: Callable[[], Awaitable[Answer]], seconds: float | None) -> Answer:
    from fsspec.asyn import sync

    answer: Answer = sync(service.loop, work, timeout=seconds)
    return answer


async def _tried(work: Callable[[], Awaitable[Answer]]) -> Answer:
    """What `work` gives, at the third try if need be."""
    for wait in WAITS:
        try:
            return await work()
        except Exception as error:
            if not _passing(error):
                raise
        await asyncio.sleep(wait)
    return await work()


def _passing(error: Exception) -> bool:
    if isinstance(error, AnswerError):
        return error.again
    names = set(_names(error))
    return bool(names & PASSING) and "ClientConnectorError" not in names


def _reason(error: BaseException) -> str:
    """Why, in our words: those of libraries may hold signed addresses."""
    if isinstance(error, AnswerError):
        return str(error)
    code = error_code(error)
    if code in REJECTED:
        return f"the credentials are not accepted ({code})"
    if code in CODES:
        return CODES[code]
    if "HttpError" in _names(error) and isinstance(status := getattr(error, "code", None), int):  # Google's client
        return str(refusal(status))
    if str(error).startswith("Forbidden:"):  # the same, without a code
        return str(refusal(403))
    known = next((REASONS[name] for name in _names(error) if name in REASONS), "")
    return f"{known or type(error).__name__}{f' ({escape(code)})' if code else ''}"


def _names(error: BaseException) -> list[str]:
    return [kind.__name__ for kind in type(error).__mro__]
