"""Files under keys, in a bucket of R2 or any other S3.

As in a folder, a key is written once and whole: by a look before, and by `If-None-Match` where the server takes it. What is stored has the
size of its file, and its bytes by Content-MD5. Nothing is sent that R2 refuses: no `x-amz-checksum-*`, no aws-chunked bodies, parts of one
size, deletions one by one. A body is read from its file while it is sent: memory stays small whatever the size.
Left out: creating buckets, and Range (whoever holds an address asks the server itself).
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
"""Up to here a file is one PUT."""
PART_BYTES: Final = 16 * 1024**2
PARTS_AT_ONCE: Final = 4
CHUNK_BYTES: Final = 1024**2
REQUESTS_AT_ONCE: Final = 16
"""Of a process: uploads that were held up all come at once when the server is back."""
CONNECT_S: Final = 5.0
ANSWER_S: Final = 10.0, 30.0
"""How long a server may say nothing, to the API and to a worker."""
TRIES: Final = 2, 4
"""Of one request, with backoff, before its fault is raised: in the API, where a client waits, and in a worker, which goes on trying."""
IDLE_S: Final = 45.0
"""How long a server may take nothing of a body; more than an answer and the backoff before the next try."""
ABORT_S: Final = 10.0
USABLE_S: Final = 15.0
"""For so long one look at the bucket answers for the health checks of a process."""
LOOK_S: Final = 3.0
SIGNED_S: Final = 7 * 24 * 3600
"""The longest that a signed address can be good for."""

T = TypeVar("T")

_BROKEN: Final = (ClientError, BotoCoreError, aiohttp.ClientError, OSError)
"""What a request or its file can raise; a TimeoutError is an OSError."""
_PASSES: Final = {"BadDigest", "IncompleteBody", "OperationAborted", "RequestTimeout"}
"""Refusals with a status of 400 to 403 that mean nothing by it."""
_MOVED: Final = {"NoSuchUpload", "PreconditionFailed"}
"""The key may hold the file already: another was faster, or the answer to what did it was lost."""


class S3Storage(Storage):
    """Results in a bucket, handed out under its public address, or under addresses that are signed.

    Every method raises ValueError for a key that is none, and StorageFault, naming key and bucket, when the server or its connection fails.
    """

    def __init__(self, client: S3Client, bucket: Bucket) -> None:
        self._client = client
        self._bucket = bucket
        self._turns = asyncio.Semaphore(REQUESTS_AT_ONCE)
        self._credentials = Credentials(bucket.key_id, bucket.secret)
        self._signed = lru_cache(maxsize=4096)(self._sign)
        self._unconditional: set[str] = set()
        """What this server knows no conditions for."""
        self._usable, self._looked_s = False, -USABLE_S
        # what is public is cached by whoever serves it, what is signed by its browser alone
        self._cache_control = (
            f"public, max-age={365 * 86400}, immutable" if bucket.public_url else f"private, max-age={SIGNED_S}, immutable"
        )

    async def put(self, key: str, source: Path, content_type: str) -> int:
        """See Storage; nothing of a file that failed half way is left, unless the server has gone too."""
        with self._translated("store", key):
            size = (await asyncio.to_thread(source.stat)).st_size
            sent = await self._head(key) is None and await self._sent(key, source, size, content_type)
            stored = await self._head(key)
            if stored is None or (sent and stored != size):
                await self._delete(key)
                raise StorageFault(f"cannot store {key} in {self._place}: {stored or 0} bytes arrived of {size}")
            if not sent and not (stored == size and await self._same(key, source)):
                raise KeyTaken(f"cannot store {key} in {self._place}: the key holds other bytes already")
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
        with self._translated("look at", key):
            return await self._head(key)

    async def delete(self, key: str) -> None:
        """See Storage."""
        with self._translated("delete", key):
            await self._delete(key)

    async def delete_prefix(self, prefix: str) -> None:
        """See Storage; uploads in parts that nobody finished are gone too."""
        start = self._full(prefix.removesuffix("/")) + "/"
        with self._translated("delete", prefix):
            async for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket.name, Prefix=start):
                for each in page.get("Contents", ()):
                    await self._asked(self._client.delete_object, Key=each["Key"])
            async for part in self._client.get_paginator("list_multipart_uploads").paginate(Bucket=self._bucket.name, Prefix=start):
                for upload in part.get("Uploads", ()):
                    await self._abort(upload["Key"], upload["UploadId"])

    async def usable(self) -> bool:
        """Whether the bucket can be read with these keys, as it was known at most fifteen seconds ago."""
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
        """An address that anyone can open until `expires_at_s`, a Unix time, for seven days at most; one of a public bucket for ever.

        The same time gives the same address again, so that caches can work.
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
        """The answer, when it is this request's turn. Raises TimeoutError where the server takes nothing of the body for `IDLE_S`."""
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
                        raise TimeoutError(f"the server took nothing for {IDLE_S:g} s")
            finally:
                asking.cancel()
                await asyncio.wait({asking})
            return asking.result()

    async def _head(self, key: str) -> int | None:
        try:
            return (await self._asked(self._client.head_object, Key=self._full(key)))["ContentLength"]
        except ClientError as error:
            if _status(error) == 404:  # a bucket that is not there looks the same, until something is asked that is answered with a body
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
        """Whether the key holds the bytes of this file, which is as long."""
        with source.open("rb") as file:
            async with contextlib.aclosing(self._chunks(key)) as chunks:
                async for chunk in chunks:
                    if await asyncio.to_thread(file.read, len(chunk)) != chunk:
                        return False
        return True

    async def _sent(self, key: str, source: Path, size: int, content_type: str) -> bool:
        """The file is under the key; False where something was there already."""
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
        """Writes where there is no such key; on a server that has no such condition, whatever there is."""
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
        """What went wrong, and whether it may pass; else what the operator has to do."""
        if not isinstance(error, ClientError):
            if isinstance(error, OSError) and error.filename:  # of the file here, not of a connection
                return f"{error.strerror} ({error.filename})", False
            return f"{str(error).strip() or type(error).__name__}; if it lasts, see {variable('r2_endpoint')}", True
        code, status = _code(error), _status(error)
        told = f"{code} ({status})" if code != str(status) else code
        if code == "NoSuchBucket":
            return f"there is no such bucket: create it, or correct {variable('storage')}", False
        if status == 507 or re.search("quota|full|insufficientstorage", code, re.IGNORECASE):
            return f"{told}: it is full; make room, or raise its quota", False
        if code == "RequestTimeTooSkewed":
            return f"{told}: the clock of this machine is wrong; set it", False
        if status in (400, 401, 403) and code not in _PASSES:
            names = f"{variable('r2_access_key_id')} and {variable('r2_secret_access_key')}"
            return f"it was refused with {told}: check {names}, and that this key may read, write, list and delete there", False
        if status in (429, 503):
            return f"it is overloaded, {told}", True
        return f"the server answered {told}", True


class _Slice(io.RawIOBase):
    """A part of an open file as a body: what is asked for is read when it is sent, from whichever thread, and again for a retry."""

    def __init__(self, fd: int, start: int, size: int) -> None:
        self._fd, self._start, self._size, self._at = fd, start, size, 0
        self.bytes_read = 0
        """In all: who watches this sees whether it is being sent."""

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
        """Of all of it, as the header has it."""
        return await asyncio.to_thread(self._md5)

    def _md5(self) -> str:
        digest = hashlib.md5(usedforsecurity=False)
        for at in range(0, self._size, CHUNK_BYTES):
            digest.update(os.pread(self._fd, min(CHUNK_BYTES, self._size - at), self._start + at))
        return b64encode(digest.digest()).decode()


@asynccontextmanager
async def opened(bucket: Bucket, *, patient: bool) -> AsyncIterator[S3Storage]:
    """The storage in this bucket, for the length of a block. Nothing is asked of the server yet."""
    session = AioSession()
    for name in ("config_file", "credentials_file"):  # what the AWS tools of this machine are set to is not ours
        session.set_config_variable(name, os.devnull)
    session.set_config_variable("profile", None)
    config = AioConfig(
        connect_timeout=CONNECT_S,
        read_timeout=ANSWER_S[patient],
        max_pool_connections=2 * REQUESTS_AT_ONCE,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        retries={"mode": "standard", "total_max_attempts": TRIES[patient]},
        # the bytes are vouched for by Content-MD5, reckoned in a thread: a signature over them would be reckoned in the event loop
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
    """The region that requests are signed for: that in the name of the endpoint, as AWS and others have it, else `auto`, as R2 has it."""
    found = re.match(r"https?://s3[.-]([a-z]{2}(?:-[a-z]+)+-\d+)\.", endpoint)
    return found[1] if found else "auto"


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", "?"))


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
