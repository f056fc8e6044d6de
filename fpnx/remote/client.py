"""Blocking client for objects at URLs: list, read and write, with timeouts, retries and readable errors."""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import TimeoutError as NotDoneYetError
from contextlib import contextmanager, suppress
from typing import TypeVar

from fpnx.core.errors import FpnxError
from fpnx.core.text import escape
from fpnx.remote.backends import AbandonedError, Backend, BackendError, ObjectInfo, connect, error_code, http_error
from fpnx.remote.urls import checked

__all__ = [
    "CHANGED",
    "NOT_FOUND",
    "ReadAhead",
    "RemoteError",
    "check_writable",
    "connections",
    "list_objects",
    "object_info",
    "object_infos",
    "read",
    "send",
]

REQUEST_TIMEOUT = 120  # seconds for one request, retries included
MIN_BYTES_PER_SECOND = 100_000  # the timeout of a transfer allows this speed
RETRY_DELAYS = (0.5, 2.0)  # seconds before the second and the third attempt
CONCURRENT_REQUESTS, REQUESTS_PER_BATCH = 32, 1024  # of `object_infos`
POLL_INTERVAL = 0.1  # seconds between two checks of a running upload
MIN_READ_AHEAD, MAX_READ_AHEAD = 1 << 16, 1 << 23  # bytes; doubled for each sequential read
CHANGED, NOT_FOUND = "changed after it was listed", "not found"
NO_CREDENTIALS = (
    "no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; for a public bucket "
    "FSSPEC_S3_ANON=true"
)
UNREACHABLE = "cannot be reached: no network, no such host, or nothing that listens there"
TIMED_OUT, CONNECTION_LOST = "no answer in time", "the connection broke"
REASONS = {  # by the name of an exception class or its nearest base: the packages of the classes may not be installed
    "NoCredentialsError": NO_CREDENTIALS,
    "PartialCredentialsError": NO_CREDENTIALS,
    "ProfileNotFound": "there is no such profile: see AWS_PROFILE",
    "CredentialRetrievalError": "the credentials cannot be loaded: sign in again",
    "TokenRetrievalError": "the credentials cannot be loaded: sign in again",
    "SSOError": "the credentials cannot be loaded: sign in again",
    "RefreshError": "the credentials cannot be loaded: sign in again",
    "DefaultCredentialsError": "no credentials: see `gcloud auth application-default login`",
    "ParamValidationError": "not a name that the store takes",
    "InvalidURL": "not an address",
    "TooManyRedirects": "too many redirects",
    "ClientSSLError": "its certificate is not trusted",
    "SSLError": "its certificate is not trusted",
    "ProxyConnectionError": "the proxy cannot be reached",
    "ClientProxyConnectionError": "the proxy cannot be reached",
    "EndpointConnectionError": UNREACHABLE,
    "ClientConnectorError": UNREACHABLE,
    "ConnectTimeoutError": TIMED_OUT,
    "ReadTimeoutError": TIMED_OUT,
    "TimeoutError": TIMED_OUT,
    "IncompleteRead": CONNECTION_LOST,
    "HTTPClientError": CONNECTION_LOST,
    "ClientError": CONNECTION_LOST,  # aiohttp's; those of S3 have a code
    "ConnectionError": CONNECTION_LOST,
    "FileNotFoundError": NOT_FOUND,
    "PermissionError": "no permission",
    "FileExistsError": "it exists already",
}
CODE_REASONS = {  # by S3 error code
    "NoSuchBucket": "no such bucket",
    "NoSuchKey": NOT_FOUND,
    "404": NOT_FOUND,
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
REJECTED_CREDENTIALS = (
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "InvalidClientTokenId",
)
RETRIABLE = {  # exceptions after which another attempt may succeed; botocore retries its own by itself
    *("ClientPayloadError", "IncompleteRead", "ResponseStreamingError", "ConnectionResetError"),
    *("ServerDisconnectedError", "ServerTimeoutError", "ClientOSError"),
}

T = TypeVar("T")

_backends: dict[tuple[int, str], Backend] = {}  # by process, since event loops do not survive a fork, and scheme
_users = 0
_lock = threading.Lock()


class RemoteError(FpnxError):
    """A failed request for an object; `reason` is the message without the URL."""

    def __init__(self, url: bytes, reason: str) -> None:
        super().__init__(f"{escape(url)}: {reason}")
        self.reason = reason


@contextmanager
def connections() -> Iterator[None]:
    """Close all connections at the end of the outermost such block.

    Connections that are opened outside of such a block are closed when the process ends.
    """
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
        backends = [backend for (process, _), backend in _backends.items() if process == os.getpid()]
        _backends.clear()
    for backend in backends:
        with suppress(Exception):  # closing is only a courtesy to the server
            _wait(backend, backend.close, 5)


def object_info(url: bytes) -> ObjectInfo:
    """Size and version of an object.

    Raises:
        RemoteError: where the object does not exist or the request fails.
    """
    return _request(url, lambda backend: backend.info(url))


def object_infos(urls: Sequence[bytes]) -> list[ObjectInfo | RemoteError]:
    """`object_info` of many URLs, concurrently and in their order; an error stands in place of its result."""
    semaphore = asyncio.Semaphore(CONCURRENT_REQUESTS)

    async def one(backend: Backend, url: bytes) -> ObjectInfo | RemoteError:
        async with semaphore:
            try:
                return await asyncio.wait_for(_with_retries(lambda: backend.info(url)), REQUEST_TIMEOUT)
            except Exception as error:
                return RemoteError(url, _reason(error))

    async def every() -> list[ObjectInfo | RemoteError]:
        infos: list[ObjectInfo | RemoteError] = []
        for first in range(0, len(urls), REQUESTS_PER_BATCH):
            batch = urls[first : first + REQUESTS_PER_BATCH]
            infos += await asyncio.gather(*(one(backends[_scheme(url)], url) for url in batch))
        return infos

    backends = {scheme: _backend(scheme) for scheme in {_scheme(url) for url in urls}}
    return _wait(next(iter(backends.values())), every, None) if backends else []


def list_objects(url: bytes, prefix: bytes = b"") -> list[tuple[bytes, ObjectInfo]]:
    """URL and info of every object in a folder and its subfolders whose name there starts with `prefix`.

    Raises:
        RemoteError: where it cannot be listed.
    """

    async def every(backend: Backend) -> list[tuple[bytes, ObjectInfo]]:
        return [entry async for entry in backend.list_objects(url, prefix)]

    return _request(url, every, None)  # each page has its own timeout


def read(url: bytes, listed: ObjectInfo, start: int = 0, end: int | None = None, most: int = 1 << 40) -> bytes:
    """Bytes `start` to `end` of an object, or all of it.

    Args:
        url: the object.
        listed: its info when it was listed.
        start, end: the first byte, and the one after the last; an `end` of None reads all.
        most: the largest number of bytes to read.

    Raises:
        RemoteError: where the request fails, or the object has changed since it was listed.
    """
    if end is not None and end <= start:
        return b""
    expected = max(0, listed.bytes) if end is None else end - start
    timeout = REQUEST_TIMEOUT + expected / MIN_BYTES_PER_SECOND
    data, info = _request(url, lambda backend: backend.read(url, start, end, most), timeout)
    other_size = listed.bytes >= 0 and info.bytes != listed.bytes
    other_time = listed.mtime_ns != info.mtime_ns and 0 not in (listed.mtime_ns, info.mtime_ns)
    if other_size or other_time or (end is not None and len(data) != end - start):
        raise RemoteError(url, CHANGED)
    return data


class ReadAhead:
    """Reads byte ranges of an object, with a read-ahead that grows while the reads are sequential."""

    def __init__(self, url: bytes, listed: ObjectInfo) -> None:
        self._url, self._listed = url, listed
        self._start, self._data, self._ahead = 0, b"", MIN_READ_AHEAD

    def __call__(self, start: int, count: int) -> bytes:
        """`count` bytes from `start` on; fewer at the end of the object."""
        end = min(start + count, self._listed.bytes)
        if start >= end:
            return b""
        buffer_end = self._start + len(self._data)
        if not self._start <= start <= end <= buffer_end:
            sequential = self._start <= start < buffer_end + self._ahead
            self._ahead = min(2 * self._ahead, MAX_READ_AHEAD) if sequential else MIN_READ_AHEAD
            stop = min(max(end, start + self._ahead), self._listed.bytes)
            self._data, self._start = read(self._url, self._listed, start, stop), start
        return self._data[start - self._start : end - self._start]


def check_writable(url: bytes) -> None:
    """Check that an object of this name could be written.

    Raises:
        RemoteError: where it could not.
    """
    _request(url, lambda backend: backend.check_writable(url))


def send(file: str, url: bytes, replace: bool, sent: Callable[[int], None], wanted: Callable[[], bool]) -> bool:
    """Upload a file atomically; returns False where an object exists and may not be replaced.

    Args:
        file: the local file.
        url: the destination.
        replace: whether an existing object may be replaced.
        sent: called regularly, in the calling thread, with the number of bytes uploaded so far.
        wanted: called regularly; once it returns False, the upload is cancelled and `AbandonedError` raised.

    Raises:
        RemoteError: where the upload fails.
    """
    uploaded, cancelled = 0, threading.Event()
    # A server that stops reading gives no error: the parts in progress have this many seconds to finish.
    timeout = REQUEST_TIMEOUT + max(1 << 26, os.path.getsize(file) // 4000) / MIN_BYTES_PER_SECOND

    def count(more: int) -> None:
        nonlocal uploaded
        uploaded += more
        if cancelled.is_set():
            raise AbandonedError

    backend = _backend(_scheme(url))
    future = asyncio.run_coroutine_threadsafe(backend.put(file, url, replace, count), backend.loop)
    last_uploaded, last_time = 0, time.monotonic()
    try:
        while True:
            sent(uploaded)
            if not wanted():
                cancelled.set()
            if uploaded > last_uploaded:
                last_uploaded, last_time = uploaded, time.monotonic()
            elif time.monotonic() - last_time > timeout:
                raise BackendError(TIMED_OUT)
            with suppress(NotDoneYetError):
                if future.exception(POLL_INTERVAL) is None:
                    sent(uploaded)
                return future.result()
    except AbandonedError:
        raise
    except Exception as error:
        raise RemoteError(url, _reason(error)) from error
    finally:
        future.cancel()


def _scheme(url: bytes) -> str:
    return checked(url).partition(b"://")[0].decode()


def _backend(scheme: str) -> Backend:
    key = os.getpid(), "http" if scheme == "https" else scheme
    with _lock:
        if key not in _backends:
            _backends[key] = connect(key[1])
            atexit.register(_close_all)
        return _backends[key]


def _request(url: bytes, work: Callable[[Backend], Awaitable[T]], timeout: float | None = REQUEST_TIMEOUT) -> T:
    backend = _backend(_scheme(url))
    try:
        return _wait(backend, lambda: _with_retries(lambda: work(backend)), timeout)
    except FpnxError:
        raise
    except Exception as error:
        raise RemoteError(url, _reason(error)) from error


def _wait(backend: Backend, work: Callable[[], Awaitable[T]], timeout: float | None) -> T:
    from fsspec.asyn import sync

    result: T = sync(backend.loop, work, timeout=timeout)
    return result


async def _with_retries(work: Callable[[], Awaitable[T]]) -> T:
    """The result of `work`, after up to three attempts."""
    for delay in RETRY_DELAYS:
        try:
            return await work()
        except Exception as error:
            if not _is_retriable(error):
                raise
        await asyncio.sleep(delay)
    return await work()


def _is_retriable(error: Exception) -> bool:
    if isinstance(error, BackendError):
        return error.retry
    names = set(_names(error))
    return bool(names & RETRIABLE) and "ClientConnectorError" not in names


def _reason(error: BaseException) -> str:
    """The reason for an error in our own words: the messages of libraries may contain signed URLs."""
    if isinstance(error, BackendError):
        return str(error)
    code = error_code(error)
    if code in REJECTED_CREDENTIALS:
        return f"the credentials are not accepted ({code})"
    if code in CODE_REASONS:
        return CODE_REASONS[code]
    if "HttpError" in _names(error) and isinstance(status := getattr(error, "code", None), int):  # Google's client
        return str(http_error(status))
    if str(error).startswith("Forbidden:"):  # Google's client, without a code
        return str(http_error(403))
    known = next((REASONS[name] for name in _names(error) if name in REASONS), "")
    return f"{known or type(error).__name__}{f' ({escape(code)})' if code else ''}"


def _names(error: BaseException) -> list[str]:
    return [kind.__name__ for kind in type(error).__mro__]
