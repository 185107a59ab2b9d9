"""The storage in a bucket of R2 or any other S3 server.

As in a folder, a key is written once and completely: `put` first checks that the key is free, and sends `If-None-Match` where the server
supports it. Afterwards it compares the stored size with that of the file; Content-MD5 protects the bytes. Nothing is sent that R2 refuses:
there are no `x-amz-checksum-*` headers, no aws-chunked bodies and no multi-object deletes, and all parts but the last have the same size. A
body is read from its file while it is sent, so memory use is small for any file size.
Left out: creating buckets, and Range requests (clients send them to the S3 server directly).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import os
import re
import time
from base64 import b64encode
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import aiohttp
from aiobotocore.config import AioConfig
from aiobotocore.session import AioSession
from botocore.auth import S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from botocore.exceptions import BotoCoreError, ClientError

from movieq.errors import KeyTaken, StorageFault
from movieq.settings import Bucket, variable
from movieq.storage.base import Storage, checked_key

if TYPE_CHECKING:
    from types_aiobotocore_s3 import S3Client

SINGLE_BYTES: Final = 64 * 1024**2
"""Largest file that is sent in one PUT; a larger one is a multipart upload."""
PART_BYTES: Final = 16 * 1024**2
PARTS_AT_ONCE: Final = 4
CHUNK_BYTES: Final = 1024**2
REQUESTS_AT_ONCE: Final = 16
"""Most concurrent requests of a process: after an outage, all waiting uploads start at once."""
CONNECT_S: Final = 5.0
ANSWER_S: Final = 10.0, 30.0
"""Longest silence of the server, in seconds, in the API and in a worker."""
TRIES: Final = 2, 4
"""Tries of one request, with backoff: in the API, where a client waits, and in a worker, which can wait longer."""
IDLE_S: Final = 45.0
"""Longest time without progress while a body is sent, in seconds; longer than a wait for an answer and the backoff after it."""
ABORT_S: Final = 10.0
USABLE_S: Final = 15.0
"""How long the health checks of a process use the result of one check of the bucket, in seconds."""
LOOK_S: Final = 3.0
SIGNED_S: Final = 7 * 24 * 3600
"""Longest validity that S3 allows for a signed url, in seconds."""

T = TypeVar("T")

_BROKEN: Final = (ClientError, BotoCoreError, aiohttp.ClientError, OSError)
"""Every error that a request or its file can raise. A TimeoutError is an OSError."""
_PASSES: Final = {"BadDigest", "IncompleteBody", "OperationAborted", "RequestTimeout"}
"""Error codes that may pass although their status is 400 to 403."""
_MOVED: Final = {"NoSuchUpload", "PreconditionFailed"}
"""Error codes after which the key may already exist: another writer was faster, or the answer to our own write was lost."""


class S3Storage(Storage):
    """A storage in a bucket. Files have urls under the bucket's public address, or signed urls if it has none.

    Every method raises ValueError for an invalid key, and StorageFault, naming key and bucket, when the server or the connection fails.
    """

    def __init__(self, client: S3Client, bucket: Bucket) -> None:
        self._client = client
        self._bucket = bucket
        self._turns = asyncio.Semaphore(REQUESTS_AT_ONCE)
        self._credentials = Credentials(bucket.key_id, bucket.secret)
        self._signed = lru_cache(maxsize=4096)(self._sign)
        self._unconditional: set[str] = set()
        """The operations for which this server does not support `If-None-Match`."""
        self._usable, self._looked_s = False, -USABLE_S
        # any cache may store a public file; only the browser may store one with a signed url
        self._cache_control = (
            f"public, max-age={365 * 86400}, immutable" if bucket.public_url else f"private, max-age={SIGNED_S}, immutable"
        )

    async def put(self, key: str, source: Path, content_type: str) -> int:
        """See Storage. A failed upload leaves nothing behind, unless the server cannot be reached."""
        with self._translated("store", key):
            size = (await asyncio.to_thread(source.stat)).st_size
            sent = await self._head(key) is None and await self._sent(key, source, size, content_type)
            stored = await self._head(key)
            if stored is None or (sent and stored != size):
                await self._delete(key)
                raise StorageFault(f"cannot store {key} in {self._place}: the server stored {stored or 0} of {size} bytes")
            if not sent and not (stored == size and await self._same(key, source)):
                raise KeyTaken(f"cannot store {key} in {self._place}: the key already holds other bytes")
        return size

    async def open(self, key: str, dest: Path) -> int | None:
        """See Storage."""
        with self._translated("read", key):
            try:
                with dest.open("wb") as file:
                    size = 0
                    async for chunk in self._chunks(key):
                        await asyncio.to_thread(file.write, chunk)
                        size += len(chunk)
            except BaseException as error:
                dest.unlink(missing_ok=True)
                if isinstance(error, ClientError) and _code(error) == "NoSuchKey":
                    return None
                raise
        return size

    async def size(self, key: str) -> int | None:
        """See Storage."""
        with self._translated("read the size of", key):
            return await self._head(key)

    async def delete(self, key: str) -> None:
        """See Storage."""
        with self._translated("delete", key):
            await self._delete(key)

    async def delete_prefix(self, prefix: str) -> None:
        """See Storage. Unfinished multipart uploads are aborted too."""
        start = self._full(prefix.removesuffix("/")) + "/"
        with self._translated("delete", prefix):
            async for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket.name, Prefix=start):
                for each in page.get("Contents", ()):
                    await self._asked(self._client.delete_object, Key=each["Key"])
            async for part in self._client.get_paginator("list_multipart_uploads").paginate(Bucket=self._bucket.name, Prefix=start):
                for upload in part.get("Uploads", ()):
                    await self._abort(upload["Key"], upload["UploadId"])

    async def usable(self) -> bool:
        """Whether the bucket can be read with the configured keys. The answer is at most fifteen seconds old."""
        if time.monotonic() - self._looked_s > USABLE_S:
            try:
                async with asyncio.timeout(LOOK_S):
                    async for _ in self._chunks("no-such-key"):
                        pass
                    self._usable = True
            except _BROKEN as error:
                self._usable = isinstance(error, ClientError) and _code(error) == "NoSuchKey"
            self._looked_s = time.monotonic()
        return self._usable

    def url(self, key: str, expires_at_s: int) -> str:
        """Return a url that anyone can open: for ever in a public bucket, else until `expires_at_s`, a Unix time, but at most seven days.

        Calls with the same `expires_at_s` return the same url, so that browsers can cache the file.
        """
        full = self._full(key)
        return f"{self._bucket.public_url}/{full}" if self._bucket.public_url else self._signed(full, expires_at_s)

    # ── Requests ──

    @property
    def _place(self) -> str:
        return f"bucket {self._bucket.name} of {self._bucket.endpoint}"

    def _full(self, key: str) -> str:
        return self._bucket.prefix + checked_key(key)

    def _sign(self, full: str, expires_at_s: int) -> str:
        request = AWSRequest("GET", f"{self._bucket.endpoint}/{self._bucket.name}/{full}")
        seconds = max(1, min(SIGNED_S, expires_at_s - int(time.time())))
        S3SigV4QueryAuth(self._credentials, "s3", region(self._bucket.endpoint), seconds).add_auth(request)
        return str(request.url)

    async def _asked(self, ask: Callable[..., Awaitable[T]], **arguments: Any) -> T:
        """Wait for a free place, send a request and return its answer. Raises TimeoutError if the server reads no more of the body."""
        body: _Slice | None = arguments.get("Body")
        async with self._turns:
            if body:
                body.seek(0)
            asking = asyncio.ensure_future(ask(Bucket=self._bucket.name, **arguments))
            try:
                while not asking.done():
                    read = body.bytes_read if body else 0
                    await asyncio.wait({asking}, timeout=IDLE_S)
                    if not asking.done() and body and body.bytes_read == read:
                        raise TimeoutError(f"the server accepted no data for {IDLE_S:g} s")
            finally:
                asking.cancel()
                await asyncio.wait({asking})
            return asking.result()

    async def _head(self, key: str) -> int | None:
        try:
            return (await self._asked(self._client.head_object, Key=self._full(key)))["ContentLength"]
        except ClientError as error:
            if _status(error) == 404:  # a missing bucket looks the same here: the answer to HEAD has no body with a code
                return None
            raise

    async def _delete(self, key: str) -> None:
        await self._asked(self._client.delete_object, Key=self._full(key))

    async def _abort(self, full: str, upload_id: str) -> None:
        await self._asked(self._client.abort_multipart_upload, Key=full, UploadId=upload_id)

    async def _chunks(self, key: str) -> AsyncGenerator[bytes, None]:
        answer = await self._asked(self._client.get_object, Key=self._full(key))
        async with answer["Body"] as body:
            while chunk := await body.read(CHUNK_BYTES):
                yield chunk

    async def _same(self, key: str, source: Path) -> bool:
        """Whether the key holds the bytes of this file. The caller has compared the sizes."""
        with source.open("rb") as file:
            async with contextlib.aclosing(self._chunks(key)) as chunks:
                async for chunk in chunks:
                    if await asyncio.to_thread(file.read, len(chunk)) != chunk:
                        return False
        return True

    async def _sent(self, key: str, source: Path, size: int, content_type: str) -> bool:
        """Upload the file and return True, or return False if the key already exists."""
        with source.open("rb") as file:
            send = self._sent_whole if size <= SINGLE_BYTES else self._sent_in_parts
            try:
                await send(self._full(key), file.fileno(), size, {"ContentType": content_type, "CacheControl": self._cache_control})
            except ClientError as error:
                if _code(error) in _MOVED:
                    return False
                raise
        return True

    async def _sent_whole(self, full: str, fd: int, size: int, kept: dict[str, str]) -> None:
        body = _Slice(fd, 0, size)
        await self._unless_there(self._client.put_object, Key=full, Body=body, ContentMD5=await body.md5(), **kept)

    async def _sent_in_parts(self, full: str, fd: int, size: int, kept: dict[str, str]) -> None:
        upload_id = (await self._asked(self._client.create_multipart_upload, Key=full, **kept))["UploadId"]
        starts = iter(range(0, size, PART_BYTES))
        tags: dict[int, str] = {}

        async def send() -> None:
            for start in starts:
                number, body = start // PART_BYTES + 1, _Slice(fd, start, min(PART_BYTES, size - start))
                part = {"UploadId": upload_id, "PartNumber": number, "Body": body, "ContentMD5": await body.md5()}
                tags[number] = (await self._asked(self._client.upload_part, Key=full, **part))["ETag"]

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(PARTS_AT_ONCE):
                    group.create_task(send())
            parts = {"Parts": [{"PartNumber": number, "ETag": tags[number]} for number in sorted(tags)]}
            await self._unless_there(self._client.complete_multipart_upload, Key=full, UploadId=upload_id, MultipartUpload=parts)
        except BaseException as error:
            with contextlib.suppress(*_BROKEN):
                async with asyncio.timeout(ABORT_S):
                    await self._abort(full, upload_id)
            if isinstance(error, BaseExceptionGroup):
                raise error.exceptions[0] from None
            raise

    async def _unless_there(self, write: Callable[..., Awaitable[Any]], **arguments: Any) -> None:
        """Write if the key does not exist. A server that does not support the condition gets the write without it."""
        if write.__name__ not in self._unconditional:
            try:
                await self._asked(write, IfNoneMatch="*", **arguments)
                return
            except ClientError as error:
                if _status(error) != 501:
                    raise
                self._unconditional.add(write.__name__)
        await self._asked(write, **arguments)

    @contextmanager
    def _translated(self, verb: str, key: str) -> Iterator[None]:
        try:
            yield
        except _BROKEN as error:
            said, passes = self._diagnosis(error)
            raise StorageFault(f"cannot {verb} {key} in {self._place}: {said}", passes=passes) from error

    def _diagnosis(self, error: Exception) -> tuple[str, bool]:
        """Return what went wrong, with what the operator can do about it, and whether it may pass by itself."""
        if not isinstance(error, ClientError):
            if isinstance(error, OSError) and error.filename:  # an error of the local file, not of the connection
                return f"{error.strerror} ({error.filename})", False
            return f"{str(error).strip() or type(error).__name__}; if this persists, check {variable('r2_endpoint')}", True
        code, status = _code(error), _status(error)
        shown = f"{code} ({status})" if code != str(status) else code
        if code == "NoSuchBucket":
            return f"the bucket does not exist: create it, or correct {variable('storage')}", False
        if status == 507 or re.search("quota|full|insufficientstorage", code, re.IGNORECASE):
            return f"{shown}: the storage is full; make room, or raise its quota", False
        if code == "RequestTimeTooSkewed":
            return f"{shown}: the system clock of this machine is wrong; set it", False
        if status in (400, 401, 403) and code not in _PASSES:
            names = f"{variable('r2_access_key_id')} and {variable('r2_secret_access_key')}"
            return f"refused with {shown}: check {names}, and that this key may read, write, list and delete in the bucket", False
        if status in (429, 503):
            return f"the server is overloaded: {shown}", True
        return f"the server answered {shown}", True


class _Slice(io.RawIOBase):
    """A part of an open file as a request body. It is read while it is sent, from any thread, and again for a retry."""

    def __init__(self, fd: int, start: int, size: int) -> None:
        self._fd, self._start, self._size, self._at = fd, start, size, 0
        self.bytes_read = 0
        """Bytes read so far, over all tries. While this grows, the body is being sent."""

    def __len__(self) -> int:
        return self._size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = os.preadv(self._fd, [memoryview(buffer)[: max(0, self._size - self._at)]], self._start + self._at)
        self._at += count
        self.bytes_read += count
        return count

    async def md5(self) -> str:
        """Return the MD5 of the whole part in base64, as `Content-MD5` needs it."""
        return await asyncio.to_thread(self._md5)

    def _md5(self) -> str:
        digest = hashlib.md5(usedforsecurity=False)
        for at in range(0, self._size, CHUNK_BYTES):
            digest.update(os.pread(self._fd, min(CHUNK_BYTES, self._size - at), self._start + at))
        return b64encode(digest.digest()).decode()


@asynccontextmanager
async def opened(bucket: Bucket, *, patient: bool) -> AsyncIterator[S3Storage]:
    """Yield the storage in this bucket. No request is sent yet."""
    session = AioSession()
    for name in ("config_file", "credentials_file"):  # ignore the configuration of the AWS tools on this machine
        session.set_config_variable(name, os.devnull)
    session.set_config_variable("profile", None)
    config = AioConfig(
        connect_timeout=CONNECT_S,
        read_timeout=ANSWER_S[patient],
        max_pool_connections=2 * REQUESTS_AT_ONCE,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        retries={"mode": "standard", "total_max_attempts": TRIES[patient]},
        # Content-MD5, computed in a thread, protects the bytes; a signature over them would be computed in the event loop
        s3={"addressing_style": "path", "payload_signing_enabled": False},
        user_agent_extra="movieq",
    )
    async with session.create_client(
        "s3",
        region_name=region(bucket.endpoint),
        endpoint_url=bucket.endpoint,
        aws_access_key_id=bucket.key_id,
        aws_secret_access_key=bucket.secret,
        config=config,
    ) as client:
        yield S3Storage(client, bucket)


def region(endpoint: str) -> str:
    """Return the region to sign requests for: the one in the endpoint's host name, as with AWS, else `auto`, as R2 expects."""
    found = re.match(r"https?://s3[.-]([a-z]{2}(?:-[a-z]+)+-\d+)\.", endpoint)
    return found[1] if found else "auto"


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", "?"))


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
