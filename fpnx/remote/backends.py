"""Backends for S3, Google Cloud Storage and web servers: coroutines of their clients, which are imported when used."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from importlib import import_module
from typing import Any, Protocol

from fpnx.core.errors import FpnxError
from fpnx.remote.urls import bucket_and_key

__all__ = [
    "AbandonedError",
    "Backend",
    "BackendError",
    "NO_FOLDERS",
    "ObjectInfo",
    "connect",
    "error_code",
    "http_error",
]

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}
EXTRA = 'pip install "fpnx[remote]"'
CONNECTIONS = 64
CONNECT_SECONDS, READ_SECONDS = 10, 30  # timeouts for connecting, and for each chunk of a response
PART_BYTES = 1 << 24  # of an upload, more for files of more than MAX_PARTS parts
MAX_PARTS = 9_000  # S3 accepts 10,000
UPLOAD_BYTES = 1 << 28  # of all parts that are uploaded at the same time
TOO_LARGE = "more bytes than it may have"
NO_RANGES = "this server gives whole files only, so that an archive cannot be read there: download it first"
NO_FOLDERS = "web servers do not list folders: name files, or a list of them as @list.txt"
READ_ONLY = "web servers are only read from"
NO_CONDITIONS = ("NotImplemented", "501")  # error codes of object stores without conditional writes


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """Size and version of an object.

    Attributes:
        bytes: its size; -1 where the server does not tell.
        mtime_ns: time of the last change, in whole seconds as ns since 1970. Where there is only an ETag, a negative
            number from its sha256; 0 where there is neither.
    """

    bytes: int
    mtime_ns: int


class BackendError(Exception):
    """An error response of a backend; with `retry`, another attempt may succeed."""

    def __init__(self, reason: str, retry: bool = False) -> None:
        super().__init__(reason)
        self.retry = retry


class AbandonedError(Exception):
    """An upload was cancelled."""


class Backend(Protocol):
    """Access to one kind of object store, or to web servers. All methods are coroutines of the event loop `loop`."""

    loop: asyncio.AbstractEventLoop

    async def info(self, url: bytes) -> ObjectInfo:
        """Size and version of one object."""

    def list_objects(self, url: bytes, prefix: bytes) -> AsyncIterator[tuple[bytes, ObjectInfo]]:
        """URL and info of every object in a folder and its subfolders whose name there starts with `prefix`."""

    async def read(self, url: bytes, start: int, end: int | None, most: int) -> tuple[bytes, ObjectInfo]:
        """Bytes `start` to `end` (None: all) of an object, at most `most` of them, and the object's info."""

    async def check_writable(self, url: bytes) -> None:
        """Raise an error where an object of this name could not be written."""

    async def put(self, file: str, url: bytes, replace: bool, sent: Callable[[int], None]) -> bool:
        """Upload a file atomically; returns False where an object exists and may not be replaced.

        `sent` is called with the number of bytes uploaded since its last call, and may raise `AbandonedError`.
        """

    async def close(self) -> None:
        """Close all connections."""


def connect(scheme: str) -> Backend:
    """The backend for URLs of a scheme; sends no request yet.

    Raises:
        FpnxError: where its client package is not installed.
    """
    try:
        if scheme == "s3":
            return _S3Backend()
        return _GoogleBackend() if scheme == "gs" else _WebBackend()
    except ImportError as error:
        package = PACKAGES[scheme]
        missing = f"{package} ({error.name})" if error.name and error.name != package else package
        ways = f"{EXTRA} gcsfs" if scheme == "gs" else EXTRA
        raise FpnxError(f"{scheme}:// needs {missing}, which is not installed: {ways}") from error


def version_number(modified: datetime | None, etag: str | None) -> int:
    """`mtime_ns` of `ObjectInfo`. Fractions of seconds are dropped, since most servers do not give them."""
    if modified is not None:
        aware = modified if modified.tzinfo else modified.replace(tzinfo=timezone.utc)
        return int(aware.timestamp()) * 1_000_000_000
    if etag:
        return -1 - (int.from_bytes(hashlib.sha256(etag.encode()).digest()[:8], "big") >> 1)
    return 0


class _S3Backend:
    def __init__(self) -> None:
        store = import_module("s3fs").S3FileSystem(
            skip_instance_cache=True, use_listings_cache=False, config_kwargs={"max_pool_connections": CONNECTIONS}
        )
        store.retries = 1  # botocore retries by itself, as often as AWS_MAX_ATTEMPTS or the profile says
        self._store, self.loop = store, store.loop
        self._client: Any = None

    async def _call(self, method: str, **arguments: Any) -> Any:
        self._client = await self._store.set_session()
        return await self._store._call_s3(method, **arguments)

    async def info(self, url: bytes) -> ObjectInfo:
        bucket, key = bucket_and_key(url)
        response = await self._call("head_object", Bucket=bucket, Key=key)
        return ObjectInfo(
            int(response["ContentLength"]), version_number(response.get("LastModified"), response.get("ETag"))
        )

    async def list_objects(self, url: bytes, prefix: bytes) -> AsyncIterator[tuple[bytes, ObjectInfo]]:
        bucket, key = bucket_and_key(url)
        start = f"{key}/" if key else ""
        query: dict[str, Any] = {"Bucket": bucket, "Prefix": start + prefix.decode("utf-8", "surrogateescape")}
        while True:
            page = await self._call("list_objects_v2", **query)
            for entry in page.get("Contents", []):
                info = ObjectInfo(int(entry["Size"]), version_number(entry.get("LastModified"), entry.get("ETag")))
                yield b"s3://" + f"{bucket}/{entry['Key']}".encode("utf-8", "surrogateescape"), info
            if not page.get("IsTruncated"):
                return
            query["ContinuationToken"] = page["NextContinuationToken"]

    async def read(self, url: bytes, start: int, end: int | None, most: int) -> tuple[bytes, ObjectInfo]:
        bucket, key = bucket_and_key(url)
        headers = {} if end is None else {"Range": f"bytes={start}-{end - 1}"}
        response = await self._call("get_object", Bucket=bucket, Key=key, **headers)
        body = response["Body"]
        try:
            if int(response["ContentLength"]) > most:
                raise BackendError(TOO_LARGE)
            data = await body.read()
        finally:
            body.close()
        if len(data) != int(response["ContentLength"]):
            raise ConnectionResetError
        total = re.fullmatch(r"bytes \d+-\d+/(\d+)", response.get("ContentRange", ""))
        size = int(total[1]) if total else len(data)
        return data, ObjectInfo(size, version_number(response.get("LastModified"), response.get("ETag")))

    async def check_writable(self, url: bytes) -> None:
        bucket, key = bucket_and_key(url)  # an upload that is started and aborted leaves nothing behind
        upload = await self._call("create_multipart_upload", Bucket=bucket, Key=key)
        await self._call("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload["UploadId"])

    async def put(self, file: str, url: bytes, replace: bool, sent: Callable[[int], None]) -> bool:
        bucket, key = bucket_and_key(url)
        size, token = os.path.getsize(file), secrets.token_hex(16)
        part = max(PART_BYTES, -(-size // MAX_PARTS))
        self._client = await self._store.set_session()

        async def upload(mode: str) -> None:
            await self._store._put_file(
                file,
                url.decode("utf-8", "surrogateescape"),
                callback=_callback(sent),
                chunksize=part,
                max_concurrency=max(1, min(4, UPLOAD_BYTES // part)),
                mode=mode,
                ContentType="application/x-hdf5",
                Metadata={"fpnx-upload": token},
            )

        try:
            await upload("overwrite" if replace else "create")
        except OSError as error:
            code = error_code(error)
            if code in NO_CONDITIONS and not replace:
                try:
                    await self.info(url)
                except FileNotFoundError:
                    await upload("overwrite")
                    return True
                return False
            if replace or code not in ("PreconditionFailed", "ConditionalRequestConflict", "412", "409"):
                raise
            # If the response to our first attempt was not received, the object may be our own.
            response = await self._call("head_object", Bucket=bucket, Key=key)
            return bool(response.get("Metadata", {}).get("fpnx-upload") == token)
        return True

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()


class _GoogleBackend:
    def __init__(self) -> None:
        self._store = import_module("gcsfs").GCSFileSystem(skip_instance_cache=True, use_listings_cache=False)
        self.loop = self._store.loop

    async def info(self, url: bytes) -> ObjectInfo:
        return _google_info(await self._store._info(_text(url)))

    async def list_objects(self, url: bytes, prefix: bytes) -> AsyncIterator[tuple[bytes, ObjectInfo]]:
        entries = await self._store._find(_text(url), detail=True, prefix=_text(prefix))
        for name, entry in entries.items():
            yield b"gs://" + name.encode("utf-8", "surrogateescape"), _google_info(entry)

    async def read(self, url: bytes, start: int, end: int | None, most: int) -> tuple[bytes, ObjectInfo]:
        # The response does not give the object's version: a request for it before detects a replaced object.
        info = await self.info(url)
        if (info.bytes if end is None else end - start) > most:
            raise BackendError(TOO_LARGE)
        data = await self._store._cat_file(_text(url), start=start, end=info.bytes if end is None else end)
        return data, info

    async def check_writable(self, url: bytes) -> None:
        await self._store._ls(bucket_and_key(url)[0])

    async def put(self, file: str, url: bytes, replace: bool, sent: Callable[[int], None]) -> bool:
        mode = "overwrite" if replace else "create"
        try:
            await self._store._put_file(file, _text(url), chunksize=PART_BYTES, callback=_callback(sent), mode=mode)
        except FileExistsError:
            return False
        except Exception as error:
            if getattr(error, "code", None) == 412:
                return False
            raise
        return True

    async def close(self) -> None:
        session = getattr(self._store, "_session", None)
        if session is not None:
            await session.close()


class _WebBackend:
    def __init__(self) -> None:
        aiohttp = import_module("aiohttp")
        store = import_module("fsspec.implementations.http").HTTPFileSystem(skip_instance_cache=True)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
        store.client_kwargs = {"trust_env": True, "timeout": timeout, **store.client_kwargs}
        self._store, self.loop = store, store.loop
        self._session: Any = None

    async def _request(self, method: str, url: bytes, **headers: str) -> Any:
        self._session = await self._store.set_session()
        headers = {"Accept-Encoding": "identity", **headers}  # not compressed: sizes are compared
        encoded = self._store.encode_url(url.decode("utf-8", "surrogateescape"))
        return self._session.request(method, encoded, headers=headers, **self._store.kwargs)

    async def info(self, url: bytes) -> ObjectInfo:
        async with await self._request("HEAD", url) as response:
            if response.status < 400:
                return _web_info(response)
            if response.status in (404, 410):
                raise http_error(response.status)
        # HEAD may be forbidden, or the URL signed for GET only.
        async with await self._request("GET", url, Range="bytes=0-0") as response:
            if response.status >= 400:
                raise http_error(response.status)
            return _web_info(response)

    async def list_objects(self, url: bytes, prefix: bytes) -> AsyncIterator[tuple[bytes, ObjectInfo]]:
        raise BackendError(NO_FOLDERS)
        yield url, ObjectInfo(0, 0)

    async def read(self, url: bytes, start: int, end: int | None, most: int) -> tuple[bytes, ObjectInfo]:
        headers = {} if end is None else {"Range": f"bytes={start}-{end - 1}"}
        async with await self._request("GET", url, **headers) as response:
            if response.status >= 400:
                raise http_error(response.status)
            if end is not None and (
                response.status != 206 or not response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
            ):
                raise BackendError(NO_RANGES)
            data = bytearray()
            async for chunk in response.content.iter_chunked(1 << 16):
                data += chunk
                if len(data) > most:
                    raise BackendError(TOO_LARGE)
            info = _web_info(response)
            return bytes(data), ObjectInfo(len(data), info.mtime_ns) if end is None else info

    async def check_writable(self, url: bytes) -> None:
        raise BackendError(READ_ONLY)

    async def put(self, file: str, url: bytes, replace: bool, sent: Callable[[int], None]) -> bool:
        raise BackendError(READ_ONLY)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()


def error_code(error: BaseException | None) -> str:
    """The code of an S3 error, such as `NoSuchBucket`; empty where there is none."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        error = error.__cause__
    return ""


def http_error(status: int) -> BackendError:
    """The error for an HTTP status."""
    meanings = {401: "no permission", 403: "no permission", 404: "not found", 410: "not found"}
    return BackendError(
        f"{meanings.get(status, 'refused')} ({status})", retry=status in (408, 425, 429) or status >= 500
    )


def _web_info(response: Any) -> ObjectInfo:
    size, total = (
        response.headers.get("Content-Length", ""),
        response.headers.get("Content-Range", "").rpartition("/")[2],
    )
    number = total if response.status == 206 else size
    try:
        modified = parsedate_to_datetime(response.headers["Last-Modified"])
    except (KeyError, ValueError, TypeError):
        modified = None
    return ObjectInfo(int(number) if number.isdigit() else -1, version_number(modified, response.headers.get("ETag")))


def _google_info(entry: dict[str, Any]) -> ObjectInfo:
    if entry.get("type") != "file":
        raise FileNotFoundError
    modified = entry.get("mtime") or entry.get("updated")
    if isinstance(modified, str):
        modified = datetime.fromisoformat(modified.replace("Z", "+00:00"))
    return ObjectInfo(int(entry["size"]), version_number(modified, entry.get("etag")))


def _callback(sent: Callable[[int], None]) -> Any:
    """An fsspec callback that calls `sent` with the number of further bytes."""
    base: Any = import_module("fsspec.callbacks").Callback

    class UploadCallback(base):
        _total = 0

        def relative_update(self, inc: int = 1) -> None:
            self.absolute_update(self._total + inc)

        def absolute_update(self, value: int) -> None:
            more, self._total = value - self._total, value
            sent(more)

    return UploadCallback()


def _text(url: bytes) -> str:
    return url.decode("utf-8", "surrogateescape")
