"""What S3, Google Cloud Storage and web servers are asked, in their own clients' coroutines. Loads these when used."""

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

__all__ = ["AbandonedError", "AnswerError", "ObjectInfo", "NO_FOLDERS", "Service", "connect", "error_code", "refusal"]

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}
EXTRA = 'pip install "fpnx[remote]"'
CONNECTIONS = 64
CONNECT_SECONDS, SILENT_SECONDS = 10, 30  # until a connection stands, and between two pieces of an answer
PART = 1 << 24  # bytes of an upload that go together; S3 takes 10,000 parts
PARTS = 9_000
AT_ONCE = 1 << 28  # bytes of an upload that are in memory together
TOO_LARGE = "more bytes than it may have"
NO_RANGES = "this server gives whole files only, so that an archive cannot be read there: download it first"
NO_FOLDERS = "web servers do not list folders: name files, or a list of them as @list.txt"
READ_ONLY = "web servers are only read from"
UNCONDITIONAL = ("NotImplemented", "501")  # what a store says that cannot write on a condition


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What a store tells of an object.

    Attributes:
        bytes: its size; -1 where the store does not tell.
        mtime_ns: when it was last written, in whole seconds as ns since 1970; where only an ETag tells versions apart,
            a negative number made of its sha256; 0 where nothing does.
    """

    bytes: int
    mtime_ns: int


class AnswerError(Exception):
    """What a service said instead of what it was asked for; `again`: the next answer may be another."""

    def __init__(self, reason: str, again: bool = False) -> None:
        super().__init__(reason)
        self.again = again


class AbandonedError(Exception):
    """An upload that nobody wants any more."""


class Service(Protocol):
    """One store. All methods are coroutines of the event loop `loop`."""

    loop: asyncio.AbstractEventLoop

    async def about(self, url: bytes) -> ObjectInfo:
        """Size and time of one object."""

    def below(self, url: bytes, prefix: bytes) -> AsyncIterator[tuple[bytes, ObjectInfo]]:
        """Address and facts of every object below a folder, whose addresses go on with `prefix`."""

    async def read(self, url: bytes, start: int, end: int | None, most: int) -> tuple[bytes, ObjectInfo]:
        """Bytes from `start` to `end` (None: all), never more than `most`, and the facts of the object they are of."""

    async def check_writable(self, url: bytes) -> None:
        """Raise where an object of this name could not be written."""

    async def put(self, file: str, url: bytes, replace: bool, sent: Callable[[int], None]) -> bool:
        """Write a file as an object, whole or not at all; False where another is there and may not be replaced.

        `sent` hears of bytes that are through, and may raise `AbandonedError`.
        """

    async def close(self) -> None:
        """Close all connections."""


def connect(scheme: str) -> Service:
    """The service for addresses of a scheme; asks nothing yet.

    Raises:
        FpnxError: where its client is not installed.
    """
    try:
        if scheme == "s3":
            return _S3()
        return _Google() if scheme == "gs" else _Web()
    except ImportError as error:
        package = PACKAGES[scheme]
        missing = f"{package} ({error.name})" if error.name and error.name != package else package
        ways = f"{EXTRA} gcsfs" if scheme == "gs" else EXTRA
        raise FpnxError(f"{scheme}:// needs {missing}, which is not installed: {ways}") from error


def stamp(modified: datetime | None, etag: str | None) -> int:
    """What stands for a file's mtime in ns; see `ObjectInfo`. Fractions of seconds are dropped: few have them."""
    if modified is not None:
        moment = modified if modified.tzinfo else modified.replace(tzinfo=timezone.utc)
        return int(moment.timestamp()) * 1_000_000_000
    if etag:
        return -1 - (int.from_bytes(hashlib.sha256(etag.encode()).digest()[:8], "big") >> 1)
    return 0


class _S3:
    def __init__(self) -> None:
        store = import_module("s3fs").S3FileSystem(
            skip_instance_cache=True, use_listings_cache=False, config_kwargs={"max_pool_connections": CONNECTIONS}
        )
        store.retries = 1  # botocore tries again by itself, as often as AWS_MAX_ATTEMPTS or the profile says
        self._store, self.loop = store, store.loop
        self._client: Any = None

    async def _call(self, method: str, **arguments: Any) -> Any:
        self._client = await self._store.set_session()
        return await self._store._call_s3(method, **arguments)

    async def about(self, url: bytes) -> ObjectInfo:
        bucket, key = bucket_and_key(url)
        told = await self._call("head_object", Bucket=bucket, Key=key)
        return ObjectInfo(int(told["ContentLength"]), stamp(told.get("LastModified"), told.get("ETag")))

    async def below(self, url: bytes, prefix: bytes) -> AsyncIterator[tuple[bytes, ObjectInfo]]:
        bucket, key = bucket_and_key(url)
        start = f"{key}/" if key else ""
        asked: dict[str, Any] = {"Bucket": bucket, "Prefix": start + prefix.decode("utf-8", "surrogateescape")}
        while True:
            page = await self._call("list_objects_v2", **asked)
            for held in page.get("Contents", []):
                facts = ObjectInfo(int(held["Size"]), stamp(held.get("LastModified"), held.get("ETag")))
                yield b"s3://" + f"{bucket}/{held['Key']}".encode("utf-8", "surrogateescape"), facts
            if not page.get("IsTruncated"):
                return
            asked["ContinuationToken"] = page["NextContinuationToken"]

    async def read(self, url: bytes, start: int, end: int | None, most: int) -> tuple[bytes, ObjectInfo]:
        bucket, key = bucket_and_key(url)
        part = {} if end is None else {"Range": f"bytes={start}-{end - 1}"}
        told = await self._call("get_object", Bucket=bucket, Key=key, **part)
        body = told["Body"]
        try:
            if int(told["ContentLength"]) > most:
                raise AnswerError(TOO_LARGE)
            data = await body.read()
        finally:
            body.close()
        if len(data) != int(told["ContentLength"]):
            raise ConnectionResetError
        total = re.fullmatch(r"bytes \d+-\d+/(\d+)", told.get("ContentRange", ""))
        size = int(total[1]) if total else len(data)
        return data, ObjectInfo(size, stamp(told.get("LastModified"), told.get("ETag")))

    async def check_writable(self, url: bytes) -> None:
        bucket, key = bucket_and_key(url)  # begun and given up, an upload leaves nothing behind
        begun = await self._call("create_multipart_upload", Bucket=bucket, Key=key)
        await self._call("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=begun["UploadId"])

    async def put(self, file: str, url: bytes, replace: bool, sent: Callable[[int], None]) -> bool:
        bucket, key = bucket_and_key(url)
        size, token = os.path.getsize(file), secrets.token_hex(16)
        part = max(PART, -(-size // PARTS))
        self._client = await self._store.set_session()

        async def send(mode: str) -> None:
            await self._store._put_file(
                file,
                url.decode("utf-8", "surrogateescape"),
                callback=_callback(sent),
                chunksize=part,
                max_concurrency=max(1, min(4, AT_ONCE // part)),
                mode=mode,
                ContentType="application/x-hdf5",
                Metadata={"fpnx-upload": token},
            )

        try:
            await send("overwrite" if replace else "create")
        except OSError as error:
            code = error_code(error)
            if code in UNCONDITIONAL and not replace:
                try:
                    await self.about(url)
                except FileNotFoundError:
                    await send("overwrite")
                    return True
                return False
            if replace or code not in ("PreconditionFailed", "ConditionalRequestConflict", "412", "409"):
                raise
            # If the answer to our own first try got lost, what is there now is ours.
            told = await self._call("head_object", Bucket=bucket, Key=key)
            return bool(told.get("Metadata", {}).get("fpnx-upload") == token)
        return True

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()


class _Google:
    def __init__(self) -> None:
        self._store = import_module("gcsfs").GCSFileSystem(skip_instance_cache=True, use_listings_cache=False)
        self.loop = self._store.loop

    async def about(self, url: bytes) -> ObjectInfo:
        return _google_facts(await self._store._info(_text(url)))

    async def below(self, url: bytes, prefix: bytes) -> AsyncIterator[tuple[bytes, ObjectInfo]]:
        found = await self._store._find(_text(url), detail=True, prefix=_text(prefix))
        for name, told in found.items():
            yield b"gs://" + name.encode("utf-8", "surrogateescape"), _google_facts(told)

    async def read(self, url: bytes, start: int, end: int | None, most: int) -> tuple[bytes, ObjectInfo]:
        # Its answers do not tell which version they are of: asked before, a replaced object is found out.
        facts = await self.about(url)
        if (facts.bytes if end is None else end - start) > most:
            raise AnswerError(TOO_LARGE)
        data = await self._store._cat_file(_text(url), start=start, end=facts.bytes if end is None else end)
        return data, facts

    async def check_writable(self, url: bytes) -> None:
        await self._store._ls(bucket_and_key(url)[0])

    async def put(self, file: str, url: bytes, replace: bool, sent: Callable[[int], None]) -> bool:
        mode = "overwrite" if replace else "create"
        try:
            await self._store._put_file(file, _text(url), chunksize=PART, callback=_callback(sent), mode=mode)
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


class _Web:
    def __init__(self) -> None:
        aiohttp = import_module("aiohttp")
        store = import_module("fsspec.implementations.http").HTTPFileSystem(skip_instance_cache=True)
        limits = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENT_SECONDS)
        store.client_kwargs = {"trust_env": True, "timeout": limits, **store.client_kwargs}
        self._store, self.loop = store, store.loop
        self._opened: Any = None

    async def _ask(self, method: str, url: bytes, **headers: str) -> Any:
        self._opened = await self._store.set_session()
        sent = {"Accept-Encoding": "identity", **headers}  # the bytes themselves: sizes are compared
        address = self._store.encode_url(url.decode("utf-8", "surrogateescape"))
        return self._opened.request(method, address, headers=sent, **self._store.kwargs)

    async def about(self, url: bytes) -> ObjectInfo:
        async with await self._ask("HEAD", url) as answer:
            if answer.status < 400:
                return _web_facts(answer)
            if answer.status in (404, 410):
                raise refusal(answer.status)
        # HEAD may be forbidden, or signed for nothing but GET.
        async with await self._ask("GET", url, Range="bytes=0-0") as answer:
            if answer.status >= 400:
                raise refusal(answer.status)
            return _web_facts(answer)

    async def below(self, url: bytes, prefix: bytes) -> AsyncIterator[tuple[bytes, ObjectInfo]]:
        raise AnswerError(NO_FOLDERS)
        yield url, ObjectInfo(0, 0)

    async def read(self, url: bytes, start: int, end: int | None, most: int) -> tuple[bytes, ObjectInfo]:
        part = {} if end is None else {"Range": f"bytes={start}-{end - 1}"}
        async with await self._ask("GET", url, **part) as answer:
            if answer.status >= 400:
                raise refusal(answer.status)
            if end is not None and (
                answer.status != 206 or not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-")
            ):
                raise AnswerError(NO_RANGES)
            data = bytearray()
            async for piece in answer.content.iter_chunked(1 << 16):
                data += piece
                if len(data) > most:
                    raise AnswerError(TOO_LARGE)
            facts = _web_facts(answer)
            return bytes(data), ObjectInfo(len(data), facts.mtime_ns) if end is None else facts

    async def check_writable(self, url: bytes) -> None:
        raise AnswerError(READ_ONLY)

    async def put(self, file: str, url: bytes, replace: bool, sent: Callable[[int], None]) -> bool:
        raise AnswerError(READ_ONLY)

    async def close(self) -> None:
        if self._opened is not None:
            await self._opened.close()


def error_code(error: BaseException | None) -> str:
    """The code that S3 gave with an error, such as `NoSuchBucket`; empty where there is none."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        error = error.__cause__
    return ""


def refusal(status: int) -> AnswerError:
    """What an HTTP status that is no success means."""
    words = {401: "no permission", 403: "no permission", 404: "not found", 410: "not found"}
    return AnswerError(f"{words.get(status, 'refused')} ({status})", again=status in (408, 425, 429) or status >= 500)


def _web_facts(answer: Any) -> ObjectInfo:
    size, total = answer.headers.get("Content-Length", ""), answer.headers.get("Content-Range", "").rpartition("/")[2]
    number = total if answer.status == 206 else size
    try:
        modified = parsedate_to_datetime(answer.headers["Last-Modified"])
    except (KeyError, ValueError, TypeError):
        modified = None
    return ObjectInfo(int(number) if number.isdigit() else -1, stamp(modified, answer.headers.get("ETag")))


def _google_facts(told: dict[str, Any]) -> ObjectInfo:
    if told.get("type") != "file":
        raise FileNotFoundError
    modified = told.get("mtime") or told.get("updated")
    if isinstance(modified, str):
        modified = datetime.fromisoformat(modified.replace("Z", "+00:00"))
    return ObjectInfo(int(told["size"]), stamp(modified, told.get("etag")))


def _callback(sent: Callable[[int], None]) -> Any:
    """An fsspec callback that tells `sent` of further bytes."""
    base: Any = import_module("fsspec.callbacks").Callback

    class Sent(base):
        _total = 0

        def relative_update(self, inc: int = 1) -> None:
            self.absolute_update(self._total + inc)

        def absolute_update(self, value: int) -> None:
            more, self._total = value - self._total, value
            sent(more)

    return Sent()


def _text(url: bytes) -> str:
    return url.decode("utf-8", "surrogateescape")
