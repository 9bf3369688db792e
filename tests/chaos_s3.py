"""A bad road to a good S3 or MLflow server: a reverse proxy that harms a share of the requests, the same each run."""

import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

KINDS = ("error", "busy", "reset", "lost", "broken", "truncated", "slow")
"""What can befall a request:

error      500 InternalError, although the server did what was asked
busy       503 SlowDown; the server never hears of it
reset      the connection is reset before the server hears of it
lost       the server does what was asked, then the connection is reset without an answer
broken     the answer's body ends half way in a reset
truncated  the answer's body ends half way in an orderly close, short of its Content-Length
slow       the answer comes `delay` seconds late
"""
_ANSWERS = {
    "error": (500, "<Error><Code>InternalError</Code><Message>We encountered an internal error.</Message></Error>"),
    "busy": (503, "<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"),
    # For tests of their own, by name:
    "denied": (403, "<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"),
    "expired": (403, "<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"),
    "gone": (404, "<Error><Code>NoSuchUpload</Code><Message>The upload does not exist.</Message></Error>"),
    "undeleted": (200, "<DeleteResult><Error><Key>x</Key><Code>InternalError</Code></Error></DeleteResult>"),
}
_NOT_DONE = ("busy", "denied", "expired", "undeleted")
"""Answers to requests that the server never hears of."""
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "upgrade", "proxy-connection", "expect"}


class ChaosProxy:
    """Stands in front of `upstream` (http://host:port). Request n meets a fault drawn from (seed, n) alone.

    `counts` holds what was done: the requests by method, the faults by kind, `bytes_in` and `bytes_out` of the bodies.
    """

    def __init__(self, upstream: str) -> None:
        parts = urlsplit(upstream)
        assert parts.hostname and parts.port
        self.upstream = (parts.hostname, parts.port)
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self.calm()
        self._listen(0)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @contextmanager
    def down(self) -> Iterator[None]:
        """Within the block nobody listens: connections are refused, and those that stand are reset."""
        port = self._server.server_address[1]
        self.rage(1.0, kinds=("reset",))
        self.stop()
        try:
            yield
        finally:
            self.calm()
            self._listen(port)

    def _listen(self, port: int) -> None:
        self._server = _Server(("127.0.0.1", port), type("Handler", (_Handler,), {"chaos": self}))
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def calm(self) -> None:
        """Every request passes; the counts begin anew."""
        self.rage(0.0)

    def rage(
        self,
        share: float,
        *,
        seed: int = 0,
        kinds: tuple[str, ...] = KINDS,
        first: int | None = None,
        delay: float = 0.05,
        only: Callable[[str, str], bool] = lambda method, path: True,
    ) -> None:
        """From now on harms `share` of the requests for which only(method, path) holds; of those the `first` ones."""
        with self._lock:
            self.share, self.seed, self.kinds, self.first, self.delay = share, seed, kinds, first, delay
            self.only, self._seen = only, 0
            self.counts.clear()

    @property
    def faults(self) -> int:
        return sum(self.counts[kind] for kind in KINDS)

    def fault(self, method: str, path: str) -> str:
        """The fault of the next request; "" for none."""
        with self._lock:
            self.counts[method] += 1
            if not self.only(method, path):
                return ""
            self._seen += 1
            draw = random.Random(f"{self.seed}-{self._seen}")
            if draw.random() >= self.share or (self.first is not None and self._seen > self.first):
                return ""
            kind = draw.choice(self.kinds)
            self.counts[kind] += 1
            return kind

    def count_bytes(self, **counts: int) -> None:
        with self._lock:
            self.counts.update(counts)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that hangs up after a timeout is what is tested here


class _Handler(BaseHTTPRequestHandler):
    """Passes requests on as they are, the Host header too: the signature covers it. Answers `Expect: 100-continue`."""

    protocol_version = "HTTP/1.1"
    chaos: ChaosProxy

    def handle_any(self) -> None:
        body = self._read_body()
        fault = self.chaos.fault(self.command, self.path)
        if fault == "reset":
            return self._reset()
        if fault in _NOT_DONE:
            return self._answer_with(fault)
        status, headers, answer = self._ask(body)
        self.chaos.count_bytes(bytes_in=len(body), bytes_out=len(answer))
        if fault == "lost" or (fault in ("broken", "truncated") and not answer):
            return self._reset()
        if fault in _ANSWERS:
            return self._answer_with(fault)
        if fault == "slow":
            time.sleep(self.chaos.delay)
        self._send(status, headers, answer[: len(answer) // 2] if fault in ("broken", "truncated") else answer)
        if fault == "broken":
            self._reset()
        elif fault == "truncated":
            self._close()

    do_GET = do_HEAD = do_PUT = do_POST = do_PATCH = do_DELETE = handle_any

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", "").lower():
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass  # trailers of the transfer; those of aws-chunked are a part of the body
        return body

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        """Status, headers and body of the real server; the length is set anew, for the body has been read whole."""
        connection = http.client.HTTPConnection(*self.chaos.upstream, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in _HOP_BY_HOP | {"content-length"}:
                    connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            response = connection.getresponse()
            answer = response.read()
            dropped = _HOP_BY_HOP if self.command == "HEAD" else _HOP_BY_HOP | {"content-length"}
            headers = [(name, value) for name, value in response.getheaders() if name.lower() not in dropped]
            if self.command != "HEAD" and response.status not in (204, 304):
                headers.append(("Content-Length", str(len(answer))))
            return response.status, headers, answer
        finally:
            connection.close()

    def _answer_with(self, kind: str) -> None:
        status, xml = _ANSWERS[kind]
        body = b"" if self.command == "HEAD" else f'<?xml version="1.0" encoding="UTF-8"?>\n{xml}'.encode()
        self._send(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))], body)

    def _send(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _reset(self) -> None:
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # The two files of the handler hold the socket as well: without them gone there is no RST.
        self.rfile.close()
        self.connection.close()
        self.close_connection = True

    def _close(self) -> None:
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def chaos_in_front_of(server: str) -> Iterator[ChaosProxy]:
    """A calm proxy in front of the S3 server at the URL `server`."""
    proxy = ChaosProxy(server)
    try:
        yield proxy
    finally:
        proxy.stop()
