"""What a source means: comma sets, ranges in braces, globs and text files of URLs, all to files with their sizes."""

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from typing import NamedTuple

from ldm.config import RequestError
from ldm.storage.files import read_bytes
from ldm.storage.listing import Listing, file_info, scan
from ldm.storage.transport import absolute, check_protocol

_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_ADVICE = "give an existing tar, or a glob such as 'dir/*.tar'"
_STREAMS = 16
"""Files that are asked for at once where a directory cannot be listed."""

Scan = Callable[[str], Listing]


class FoundFile(NamedTuple):
    """A file of a source: its URL (a local path is absolute), its size in bytes and ETag ("" where there is none)."""

    url: str
    bytes: int
    etag: str


def expand(source: str | Sequence[str], key: str = "source") -> list[str]:
    """The URLs of `find`."""
    return [file.url for file in find(source, key)]


def find(source: str | Sequence[str], key: str = "source") -> list[FoundFile]:
    """The files of a source, in the order of their URLs, each once.

    A source is one or more of: a file or directory, a comma set, `{00000..00007}` and `{a,b}` in braces, a glob (`*`,
    `?`, `[…]`, and `**` for any depth), and a text file of such lines, as `@list.txt` or by a name that ends in .txt.
    A directory stands for itself. Local paths become absolute, for workers may stand in another folder.

    Sizes come from one listing of each directory, never from a request for each file. Raises RequestError, for the
    config key `key`, where a file is missing or a pattern matches nothing.
    """
    texts = [source] if isinstance(source, str) else source
    patterns = itertools.chain.from_iterable(split_commas(text) for text in texts)
    scan_once = functools.cache(scan)
    plain: dict[str, str] = {}  # URL => as it was given
    found: dict[str, FoundFile] = {}
    for base, line in itertools.chain.from_iterable(_lines(pattern, key) for pattern in patterns):
        check_protocol(line)
        for text in _expand_braces(line, key):
            if not _is_glob(text):
                plain[_resolve(base, text)] = text
                continue
            matches = list(_glob(base, text, scan_once))
            if not matches:
                raise RequestError(f"{key}={text}: matches no file; {_ADVICE}")
            for file in matches:
                if file.bytes:
                    found[file.url] = file
                else:  # a listing over HTTP knows no sizes
                    plain[file.url] = file.url
    found |= {file.url: file for file in _look_up(plain, scan_once, key)}
    if not found:
        raise RequestError(f"{key}='': is empty; give at least one path or URL")
    return sorted(found.values())


def split_commas(text: str) -> list[str]:
    """Splits at commas outside braces."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "{") - (character == "}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def _lines(pattern: str, key: str) -> list[tuple[str, str]]:
    """(folder, pattern) of each line of a text file; ("", pattern) of anything else.

    A relative line is meant from the folder in which the text file lies, so that both can move together.
    """
    if not pattern.startswith("@") and not pattern.endswith(".txt"):
        return [("", pattern)]
    url = absolute(pattern.removeprefix("@"))
    advice = "give a text file with one URL a line"
    try:
        lines = [line.strip() for line in read_bytes(url).decode().splitlines()]
    except FileNotFoundError:
        raise RequestError(f"{key}={pattern}: does not exist; {advice}") from None
    except UnicodeDecodeError:
        raise RequestError(f"{key}={pattern}: is no text; {advice}") from None
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise RequestError(f"{key}={pattern}: lists nothing; {advice}")
    return [(url.rpartition("/")[0], line) for line in lines]


def _resolve(base: str, text: str) -> str:
    """The URL, or absolute path, of `text` as seen from the folder `base`; "" is where this process stands."""
    return absolute(text if not base or "://" in text or text.startswith(("/", "~")) else f"{base}/{text}")


def _expand_braces(pattern: str, key: str) -> list[str]:
    """`a-{00..02}-{x,y}` => every combination; the width of the first number is kept."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    body = match.group(1)
    numbers = _RANGE.fullmatch(body)
    if numbers:
        first, last = numbers.groups()
        if int(last) < int(first):
            raise RequestError(f"{key}={pattern}: the range {{{body}}} runs backwards")
        choices = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    else:
        choices = body.split(",")
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [url for choice in choices for url in _expand_braces(f"{head}{choice}{tail}", key)]


def _is_glob(text: str) -> bool:
    return any(mark in text for mark in "*?[")


def _glob(base: str, text: str, scan_once: Scan) -> Iterator[FoundFile]:
    """The files that match. fsspec's own glob takes a directory that cannot be listed for an empty one."""
    protocol, mark, path = text.rpartition("://")
    parts = path.split("/")
    depth = next(i for i, part in enumerate(parts) if _is_glob(part))
    # Only the pattern's own marks count, not those in the names of the folders it begins in.
    folder = "/".join(parts[:depth]) or ("/" if depth else "" if mark else ".")
    yield from _descend(_resolve(base, f"{protocol}{mark}{folder}"), parts[depth:], scan_once)


def _descend(folder: str, parts: Sequence[str], scan_once: Scan) -> Iterator[FoundFile]:
    head, *rest = parts
    if rest and not _is_glob(head):
        yield from _descend(_child(folder, head), rest, scan_once)
        return
    listing = scan_once(folder)
    if head == "**":
        yield from _descend(folder, rest or ["*"], scan_once)
        for name in listing.folders:
            yield from _descend(_child(folder, name), parts, scan_once)
    elif rest:
        for name in listing.folders:
            if fnmatchcase(name, head):
                yield from _descend(_child(folder, name), rest, scan_once)
    else:
        for name, about in listing.files.items():
            if fnmatchcase(name, head):
                yield FoundFile(_child(folder, name), *about)


def _child(folder: str, name: str) -> str:
    return f"{folder}{name}" if folder.endswith("/") else f"{folder}/{name}"


def _look_up(plain: dict[str, str], scan_once: Scan, key: str) -> Iterator[FoundFile]:
    """Plain URLs: by a listing where a directory holds several, else, and where that is no help, one by one."""
    folders: dict[str, list[str]] = {}
    for url in plain:
        folders.setdefault(url.rpartition("/")[0], []).append(url)
    alone: list[str] = []
    for folder, urls in folders.items():
        listed = _list(folder, scan_once) if len(urls) > 1 else {}
        for url in urls:
            bytes, etag = listed.get(url.rpartition("/")[2], (0, ""))
            if bytes:
                yield FoundFile(url, bytes, etag)
            else:
                alone.append(url)
    yield from _ask_each(sorted(alone), plain, key)


def _list(folder: str, scan_once: Scan) -> dict[str, tuple[int, str]]:
    try:
        return scan_once(folder or "/").files
    except PermissionError:
        return {}  # one may be allowed to read files and not to list them


def _ask_each(urls: Iterable[str], plain: dict[str, str], key: str) -> Iterator[FoundFile]:
    def ask_one(url: str) -> FoundFile:
        try:
            return FoundFile(url, *file_info(url))
        except IsADirectoryError:
            return FoundFile(url, 0, "")
        except (FileNotFoundError, NotADirectoryError):
            raise RequestError(f"{key}={plain[url]}: does not exist; {_ADVICE}") from None

    with ThreadPoolExecutor(_STREAMS) as pool:
        yield from pool.map(ask_one, urls)
