"""Many readers of event streams in one process: `python -m tests.bench.sse_reader`, told by lines of JSON what to do, answering with such.

Raw sockets and one epoll. An event arrives when its socket is readable: the time is taken once for all that one wait has found, so that
what this process takes to read them is not counted. Events of the bench carry the time of their making, `bench-` and nanoseconds of the
clock that all processes of a machine share; nothing else in the streams is looked at.
"""

from __future__ import annotations

import json
import re
import select
import socket
import sys
import time
from typing import Any, Final

from movieq.api.server import allow_open_files

IN_FLIGHT: Final = 128
MARK: Final = re.compile(rb"bench-(\d+)")


class Readers:
    """Open streams."""

    def __init__(self) -> None:
        allow_open_files()
        self._epoll = select.epoll()
        self._streams: dict[int, socket.socket] = {}

    def open(self, port: int, paths: list[str], head: str, timeout_s: float) -> dict[str, Any]:
        """Opens a stream of each path, `IN_FLIGHT` at a time; one is open once its first event is there."""
        waiting, asked, end_s = list(reversed(paths)), set[int](), time.monotonic() + timeout_s
        begun_s = time.monotonic()
        while waiting or asked:
            while waiting and len(asked) < IN_FLIGHT:
                asked.add(self._ask(port, waiting.pop(), head))
            for fd, _ in self._epoll.poll(max(0.0, end_s - time.monotonic())):
                data = self._streams[fd].recv(65536)
                if not data or (data.startswith(b"HTTP/1.1 ") and not data.startswith(b"HTTP/1.1 200")):
                    raise RuntimeError(f"a stream did not open: {data[:200]!r}")
                if b"data: " in data:
                    asked.discard(fd)
            if time.monotonic() > end_s:
                raise TimeoutError(f"{len(asked) + len(waiting)} streams did not open within {timeout_s} s")
        return {"seconds": time.monotonic() - begun_s}

    def _ask(self, port: int, path: str, head: str) -> int:
        stream = socket.create_connection(("127.0.0.1", port), timeout=30)
        stream.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{head}\r\n".encode())
        stream.setblocking(False)
        self._streams[stream.fileno()] = stream
        self._epoll.register(stream.fileno(), select.EPOLLIN)
        return stream.fileno()

    def collect(self, count: int, timeout_s: float) -> dict[str, Any]:
        """Reads until so many events have come, or the time is over: how late each was, and when the last one came."""
        late_ns: list[int] = []
        last_ns, end_s = 0, time.monotonic() + timeout_s
        streams, poll = self._streams, self._epoll.poll
        while len(late_ns) < count and (left_s := end_s - time.monotonic()) > 0:
            ready = poll(left_s, len(streams) or 1)
            now_ns = time.perf_counter_ns()
            for fd, _ in ready:
                data = streams[fd].recv(65536)
                if not data:
                    self._forget(fd)
                for mark in MARK.findall(data):
                    late_ns.append(now_ns - int(mark))
                    last_ns = now_ns
        late_ns.sort()
        return {
            "count": len(late_ns),
            "last_ns": last_ns,
            "late_ms": [ns / 1e6 for ns in late_ns[:: max(1, len(late_ns) // 2000)]],
        }

    def close(self) -> dict[str, Any]:
        """Hangs up everywhere."""
        for fd in list(self._streams):
            self._forget(fd)
        return {}

    def ended(self, timeout_s: float) -> dict[str, Any]:
        """Reads until every stream was ended from the other side: how many, and how many of them said goodbye."""
        end_s, count, goodbyes = time.monotonic() + timeout_s, 0, 0
        while self._streams and (left_s := end_s - time.monotonic()) > 0:
            for fd, _ in self._epoll.poll(left_s):
                try:
                    data = self._streams[fd].recv(65536)
                except OSError:
                    data = b""
                goodbyes += data.count(b"event: goodbye")
                if not data:
                    count += 1
                    self._forget(fd)
        return {"count": count, "goodbyes": goodbyes, "left": len(self._streams)}

    def _forget(self, fd: int) -> None:
        self._epoll.unregister(fd)
        self._streams.pop(fd).close()


def main() -> None:
    """Does what it is told, to the end of its input."""
    readers = Readers()
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(getattr(readers, order.pop("do"))(**order)), flush=True)


if __name__ == "__main__":
    main()
