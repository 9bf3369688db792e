"""What every request passes before it is looked at: where it comes from, the token where there is one, its size.

Plain ASGI. A browser runs the pages of strangers on the user's own machine, where they reach what listens on loopback:
so a page of another origin is refused (it says its `Origin`), and without a token so is any name of this machine but
its own, for a stranger's name can be made to lead here (DNS rebinding).
"""

import contextlib
import hashlib
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.requests import ClientDisconnect

from pipelines.serve.config import LOOPBACK

MAX_BODY = 16 * 2**20
"""Bytes of a request's body; a picture is the largest part of one."""
OPEN_PATHS = ("/", "/healthz", "/readyz", "/docs", "/openapi.json")
"""For all, where a token is asked for; and the files of the page."""

Scope = dict[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Gate:
    """Refuses with 403 a foreign page or name, with 401 a missing token, with 413 a body above MAX_BODY bytes.

    token_sha256: of the token that requests must bear; None: only this machine may ask, by its own names.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], token_sha256: str | None) -> None:
        self.app, self.token_sha256 = app, token_sha256

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        if refusal := self._refusal(scope["path"], headers):
            return await _refuse(send, *refusal)
        taken, too_large = 0, False

        async def bounded() -> Message:
            nonlocal taken, too_large
            message = await receive()
            taken += len(message.get("body", b""))
            too_large = taken > MAX_BODY
            return {"type": "http.disconnect"} if too_large else message

        async def unless_too_large(message: Message) -> None:
            if not too_large:
                await send(message)

        with contextlib.suppress(ClientDisconnect):  # what the application makes of it
            await self.app(scope, bounded, unless_too_large)
        if too_large:
            await _refuse(send, *_TOO_LARGE)

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> tuple[int, str] | None:
        """(status, why) of a request whose headers tell that it is refused."""
        host = headers.get(b"host", b"").lower()
        if self.token_sha256 is None and host.partition(b":")[0].decode("latin-1") not in LOOPBACK:
            names = " or ".join(LOOPBACK)
            return 403, f"host: is not {names}, which is all that may be asked without a token; serve with token_file"
        if b"origin" in headers and headers[b"origin"].lower().partition(b"://")[2] != host:
            return 403, "origin: is another site's page; only this server's own page, and programs, may ask"
        if self.token_sha256 and not _is_open(path) and not self._has_token(headers):
            return 401, "authorization: is not 'Bearer TOKEN' with the token of this server"
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > MAX_BODY:
            return _TOO_LARGE
        return None

    def _has_token(self, headers: dict[bytes, bytes]) -> bool:
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        digest = hashlib.sha256(token.strip()).hexdigest()
        return scheme.lower() == b"bearer" and hmac.compare_digest(digest, self.token_sha256 or "")


_TOO_LARGE = 413, f"body: the most is {MAX_BODY} bytes"


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith("/page/")


async def _refuse(send: Send, status: int, detail: str) -> None:
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"detail": detail}).encode()})
