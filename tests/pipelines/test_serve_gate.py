"""Who is refused before a request is looked at: pages of strangers, names of strangers, those without the token."""

import asyncio
import hashlib

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from pipelines.serve.gate import Gate

TOKEN = "correct horse"
PATHS = (
    ("POST", "/v1/samples"),
    ("POST", "/v1/bulk"),
    ("GET", "/v1/models"),
    ("DELETE", "/v1/samples/x"),
    ("GET", "/"),
)


def answers(host: str, headers: dict[str, str], token: str | None = None) -> set[tuple[int, str]]:
    """(status, body) of every path, with an application behind the gate that answers all."""

    async def ask() -> set[tuple[int, str]]:
        here = Route("/{any:path}", lambda request: PlainTextResponse("here"), methods=["GET", "POST", "DELETE"])
        digest = None if token is None else hashlib.sha256(token.encode()).hexdigest()
        transport = httpx.ASGITransport(Gate(Starlette(routes=[here]), digest))
        async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}", headers=headers) as client:
            found = [await client.request(*path) for path in PATHS]
            return {(answer.status_code, answer.text) for answer in found}

    return asyncio.run(ask())


LET_IN = {(200, "here")}
BEARING = {"authorization": f"Bearer {TOKEN}"}


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:8000", "localhost", "LOCALHOST:1"])
def test_programs_and_its_own_page_are_let_in(host: str) -> None:
    assert answers(host, {}) == answers(host, {"origin": f"http://{host}"}) == LET_IN
    assert answers(host, {"origin": f"https://{host}", **BEARING}, TOKEN) == LET_IN  # TLS ends before it


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "http://localhost:9000",
        "http://localhost",
        "http://127.0.0.1:8000",
        "http://localhost:8000.evil.example",
        "http://evil@localhost:8000",
        "localhost:8000",
        "null",
        "",
    ],
)
@pytest.mark.parametrize("token", [None, TOKEN])
def test_a_foreign_origin_is_refused_also_with_the_token(origin: str, token: str | None) -> None:
    ((status, text),) = answers("localhost:8000", {"origin": origin, **BEARING}, token)
    assert (status, "origin: is another site's page" in text) == (403, True)


@pytest.mark.parametrize("host", ["evil.example:8000", "localhost.evil.example", "10.0.0.1:8000", "127.0.0.1.evil"])
def test_without_a_token_a_name_that_was_made_to_lead_here_is_refused(host: str) -> None:
    for headers in ({}, {"origin": f"http://{host}"}):
        ((status, text),) = answers(host, headers)
        assert (status, "host: is not 127.0.0.1 or localhost" in text) == (403, True)
    assert answers(host, BEARING, TOKEN) == LET_IN  # the token is what others are known by


@pytest.mark.parametrize(
    "given", [None, "Bearer wrong", "Bearer ", "Bearer", TOKEN, f"Basic {TOKEN}", f"Bearer {TOKEN}x"]
)
def test_without_the_token_only_the_page_answers(given: str | None) -> None:
    found = answers("localhost", {} if given is None else {"authorization": given}, TOKEN)
    assert {status for status, _ in found} == {200, 401}
    assert len(found) == 2
