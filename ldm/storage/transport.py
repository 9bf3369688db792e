"""URLs, their filesystems, and how these are asked: again after what may pass, and every failure is an OSError."""

import errno
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import fsspec

from ldm.config import RequestError

T = TypeVar("T")

TRIES = 6
PATIENCE = 120.0
"""Seconds after which nothing is tried again: a store that hangs has by then used up the time-outs of s3fs."""
FIRST_PAUSE = 0.5
"""Seconds, at most; each further pause may last twice as long."""

_REFUSED = ("pipe:", "sh:", "exec:")
_CODES = {
    FileNotFoundError: errno.ENOENT,
    PermissionError: errno.EACCES,
    FileExistsError: errno.EEXIST,
    IsADirectoryError: errno.EISDIR,
    NotADirectoryError: errno.ENOTDIR,
    TimeoutError: errno.ETIMEDOUT,
    ConnectionError: errno.ECONNRESET,
}
"""s3fs raises these without a number."""
_MAY_PASS = {
    errno.EIO,  # s3fs: what it does not know, such as 502 and 429
    getattr(errno, "EREMOTEIO", errno.EIO),  # s3fs: 500
    errno.EBUSY,  # s3fs: 503, 409, and an object that changed while it was read
    errno.ETIMEDOUT,
    errno.ECONNRESET,
    errno.ECONNREFUSED,
    errno.EPIPE,
}


def is_local(url: str) -> bool:
    return "://" not in url or url.startswith("file://")


def local_path(url: str) -> Path:
    """The path of a local URL."""
    assert is_local(url), url
    return Path(url.removeprefix("file://")).expanduser()


def absolute(url: str) -> str:
    """A relative local path made absolute, also that of a list (`@list.txt`); an URL as it stands."""
    if url.startswith("@"):
        return f"@{absolute(url[1:])}"
    return os.path.abspath(local_path(url)) if is_local(url) else url


def join(url: str, *parts: str) -> str:
    return "/".join([url.rstrip("/"), *parts])


def name(url: str) -> str:
    """The last part of a path or URL."""
    return url.rstrip("/").rsplit("/", 1)[-1]


def check_protocol(url: str) -> None:
    """Raises RequestError for an URL that would run a shell command."""
    if url.startswith(_REFUSED):
        raise RequestError(f"{url}: runs a shell command, which is refused; give a path or a URL such as s3://")


def open_fs(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of a URL and the path inside it.

    Call it in the process that uses it: an s3fs made before a fork hangs. Raises RequestError for an unknown
    protocol, or one whose package is missing.
    """
    check_protocol(url)
    # A remembered listing would hide what other machines have written since.
    options = {} if is_local(url) else {"use_listings_cache": False}
    try:
        fs, path = fsspec.core.url_to_fs(url if "://" in url else os.path.expanduser(url), **options)
    except (ValueError, ImportError) as error:
        raise RequestError(f"{url}: {error}; give a path or a URL such as s3://bucket/key") from None
    return fs, path


def ask(url: str, work: Callable[[fsspec.AbstractFileSystem, str], T]) -> T:
    """What `work` answers, given the filesystem of `url` and the path in it. Raises as `insist` does."""
    fs, path = open_fs(url)
    return insist(url, lambda: work(fs, path))


def insist(url: str, work: Callable[[], T]) -> T:
    """What `work`, which can be repeated, answers in the end. A failure is an OSError of one line that names `url`.

    botocore and s3fs repeat single requests. What they leave: a body that breaks off in a parallel transfer, a
    connection reset before the answer's first byte (s3fs), and an outage longer than their few seconds.
    """
    began, tries = time.monotonic(), 0
    while True:
        try:
            return work()
        except Exception as error:
            code = _code(error)
            if code is None or (isinstance(error, OSError) and error.filename):
                raise
            tries += 1
            passing = code in _MAY_PASS or _is_lost_upload(error)
            if not passing or tries == TRIES or time.monotonic() - began > PATIENCE:
                raise OSError(code, _text(error, code, url), url) from error
        # Full jitter: many workers that failed together do not come back together.
        time.sleep(random.uniform(0, FIRST_PAUSE * 2 ** (tries - 1)))


def _code(error: Exception) -> int | None:
    """The errno of what a filesystem raised; None for what is no failure of storage."""
    if isinstance(error, OSError):
        return error.errno or next((code for kind, code in _CODES.items() if isinstance(error, kind)), errno.EIO)
    # Only now: both take long to import, and a local run needs neither.
    import aiohttp
    import botocore.exceptions as boto
    from botocore.parsers import ResponseParserError

    if isinstance(error, aiohttp.ClientResponseError):
        passing = error.status == 429 or error.status >= 500
        return errno.EBUSY if passing else errno.EACCES if error.status in (401, 403) else errno.EINVAL
    broken = (boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError, boto.FlexibleChecksumError)
    if isinstance(error, (*broken, aiohttp.ClientError, ResponseParserError)):
        return errno.EIO
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError | boto.CredentialRetrievalError):
        return errno.EACCES
    return errno.EINVAL if isinstance(error, boto.BotoCoreError | boto.ClientError) else None


def _is_lost_upload(error: Exception) -> bool:
    """Whether the store has forgotten a multipart upload, as it does when it has done it and the answer got lost."""
    return s3_code(error) == "NoSuchUpload"


def s3_code(error: BaseException) -> str:
    """The code of S3's answer behind an OSError: `NoSuchKey`; "" where there is none."""
    response = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def _text(error: Exception, code: int, url: str) -> str:
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    if text == "Forbidden":  # the answer to HEAD, which has no body that says why
        return "Forbidden, or the credentials have expired"
    # The filesystems often have no more to say than the path.
    return os.strerror(code) if not text or text.strip("/") in url else text
