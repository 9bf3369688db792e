"""A real browser before the real application, for the tests of the page."""

import base64
import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx
import uvicorn

from ldm import images
from tests.pipelines.serving import pixels

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, ConsoleMessage, Locator, Page, Request


@contextlib.contextmanager
def serving(app: Any) -> Iterator[str]:
    """Runs an ASGI application in a thread; yields its URL."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server ended"
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


class Turnstile:
    """Lets an engine take as many steps as it is told, so that a drawing can be looked at on its way."""

    def __init__(self, step: Callable[[Any], bool]) -> None:
        self._step, self._steps, self._is_open = step, threading.Semaphore(0), False

    def step(self, engine: Any) -> bool:
        """Takes the place of `StepEngine.step`."""
        if engine.jobs and not self._is_open:
            self._steps.acquire()
        return self._step(engine)

    def let(self, steps: int) -> None:
        self._steps.release(steps)

    def open(self) -> None:
        self._is_open = True
        self._steps.release(1000)


@dataclass
class Visit:
    """One browser window on the page, and all that it asked for and complained about."""

    context: "BrowserContext"
    url: str
    requests: list["Request"] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.context.on("request", lambda request: self.requests.append(request))
        self.context.on("weberror", lambda error: self.complaints.append(str(error.error)))
        self.context.on("console", self._listen)

    def open(self, link: str = "") -> "Page":
        """Opens the page, in a tab of its own, and waits until it has its models or asks for a token."""
        page = self.context.new_page()
        page.goto(self.url + "/" + link)
        page.locator("#main:visible, #door:visible, #trouble:visible").first.wait_for()
        return page

    def sent(self, method: str, path: str) -> list["Request"]:
        """The requests whose path matches."""
        return [r for r in self.requests if r.method == method and re.fullmatch(self.url + path, r.url)]

    def ids(self) -> list[str]:
        """Of the requests whose events were followed, in order."""
        found = [re.search("/v1/samples/([0-9a-f]+)/events", r.url) for r in self.requests]
        return list(dict.fromkeys(match[1] for match in found if match))

    def status(self, id: str) -> str:
        """What the server says has become of a request."""
        return str(httpx.get(f"{self.url}/v1/samples/{id}", trust_env=False).json()["status"])

    def _listen(self, message: "ConsoleMessage") -> None:
        # A refused request is shown at the form; the browser complains of it in the console, whatever the page does.
        if message.type in ("error", "warning") and "the server responded with a status of 4" not in message.text:
            self.complaints.append(message.text)


def png_of(image: "Locator") -> bytes:
    """A picture on the page, as a PNG of its pixels alone: how it was asked for is in its text."""
    source = image.get_attribute("src") or ""
    return images.to_png(pixels(base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True)))


def drawn(page: "Page", columns: int = 1) -> "Locator":
    """Waits until all is drawn; the pictures of the page."""
    from playwright.sync_api import expect

    expect(page.locator("#result")).to_have_attribute("aria-busy", "false")
    expect(page.locator(".column.ended:not(.unfinished)")).to_have_count(columns)
    return page.locator(".picture img")


def ask(url: str, **body: Any) -> list[bytes]:
    """The pictures that the interface itself gives, as PNGs of their pixels alone."""
    body = {"exact": True, **body}
    answer = httpx.post(f"{url}/v1/samples", json=body, trust_env=False, timeout=60)
    assert answer.status_code == 200, answer.text
    return [images.to_png(pixels(base64.b64decode(image["png"]))) for image in answer.json()["images"]]


def name_of_focused(page: "Page") -> str:
    """The accessible name of what has the focus: as a screen reader says it."""
    tree = page.locator("*:focus").aria_snapshot()
    match = re.search(r'"((?:[^"\\]|\\.)*)"', tree.splitlines()[0])
    return match[1] if match else ""
