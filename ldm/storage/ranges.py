"""A range of a remote object, as fast as the link gives it.

s3fs reads in one thread of its own and copies what comes several times; on a fast link that is the limit. So the range
is asked for with an URL that s3fs signs, and read straight to its place. Whatever is unusual is left to s3fs, which has
the settings for it and says what is wrong: another answer than the bytes, a proxy, a connection that cannot be made.
"""

import http.client
import socket
import ssl
import threading
import urllib.request
from urllib.parse import SplitResult, urlsplit

import fsspec

_SIGNED_FOR = 300
"""Seconds."""
_TIMEOUT = 60.0
"""Seconds without a byte."""
_connections = threading.local()
_refused: set[str] = set()
"""Hosts that could not be reached directly."""


def read_range(fs: fsspec.AbstractFileSystem, path: str, start: int, end: int) -> bytes | bytearray:
    """Bytes `start` to `end` of an object, fewer where it is shorter. Raises what the filesystem raises."""
    if _is_plain_s3(fs):
        parts = urlsplit(fs.sign(path, expiration=_SIGNED_FOR))
        if parts.netloc not in _refused and not _has_proxy(parts):
            data = _read(parts, start, end)
            if data is not None:
                return data
    return bytes(fs.cat_file(path, start=start, end=end))


def _is_plain_s3(fs: fsspec.AbstractFileSystem) -> bool:
    """Whether a signed URL is all that it takes."""
    if "s3" not in ([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol):
        return False
    others = [fs.s3_additional_kwargs, fs.req_kw, "verify" in fs.client_kwargs, "proxies" in fs.config_kwargs]
    return not fs.anon and not any(others)


def _has_proxy(parts: SplitResult) -> bool:
    return parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(parts.hostname or "")


def _read(parts: SplitResult, start: int, end: int) -> bytearray | None:
    """The range, in whole; None where anything else came."""
    known = _connections.__dict__.setdefault("of", {})
    if parts.netloc not in known:
        known[parts.netloc] = _connect(parts)
    connection = known[parts.netloc]
    try:
        headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        connection.request("GET", f"{parts.path}?{parts.query}", headers=headers)
        answer = connection.getresponse()
        data = bytearray(end - start)
        if answer.status == 206 and answer.length == len(data) and _fill(answer, data):
            return data
    except (ConnectionRefusedError, ssl.SSLError, socket.gaierror):  # it will not be otherwise the next time
        _refused.add(parts.netloc)
    except (OSError, http.client.HTTPException):
        pass
    # What is left of another answer would be taken for the next one.
    connection.close()
    del known[parts.netloc]
    return None


def _connect(parts: SplitResult) -> http.client.HTTPConnection:
    if parts.scheme == "https":
        return http.client.HTTPSConnection(parts.netloc, timeout=_TIMEOUT, context=ssl.create_default_context())
    return http.client.HTTPConnection(parts.netloc, timeout=_TIMEOUT)


def _fill(answer: http.client.HTTPResponse, data: bytearray) -> bool:
    place = memoryview(data)
    while len(place):
        count = answer.readinto(place)
        if not count:
            return False
        place = place[count:]
    return True
