"""The HTTP interface, plain ASGI without Ray: requests => a `Backend` => pictures. docs/serving.md shows it in use."""

import asyncio
import base64
import json
import math
from collections.abc import AsyncIterator
from importlib.resources import files
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import StringConstraints

import ldm
from ldm.config import RequestError
from pipelines.serve import bulk
from pipelines.serve.gate import Gate
from pipelines.serve.requests import BulkRequest, Problem, SamplesRequest, SamplesResponse, one_line
from pipelines.serve.table import Backend, Record, Table, Unserved

if TYPE_CHECKING:
    from fastapi import FastAPI

PAGE_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
PAGE_POLICY = "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; frame-ancestors 'none'"

RequestId = Annotated[str, StringConstraints(max_length=64)]
Responses = dict[int | str, dict[str, Any]]


def create_app(backend: Backend, *, token_sha256: str | None = None, in_flight: int = 4) -> "FastAPI":
    """The application. OpenAPI stands at /openapi.json, a page to try it at /docs, the page for people at /.

    in_flight: parts of a bulk request that are at the replicas at a time.
    """
    from fastapi import FastAPI, Path, Request, Response
    from fastapi.responses import StreamingResponse

    app = FastAPI(title="ldm", summary="Pictures from a latent diffusion model", version=ldm.__version__)
    _explain_errors(app)
    app.add_middleware(Gate, token_sha256=token_sha256)
    table = Table(backend)
    responses: Responses = {status: {"model": Problem} for status in (401, 403, 413, 422, 429, 500, 503, 504)}
    of_id: Responses = {status: {"model": Problem} for status in (401, 403, 404, 422)}

    @app.post(
        "/v1/samples",
        response_model=SamplesResponse,
        response_model_exclude_none=True,
        responses={**responses, 200: {"content": {"image/png": {}}}, 202: {"model": SamplesResponse}},
    )
    async def draw(body: SamplesRequest, http: Request) -> Any:
        """Draws pictures. What a picture shows depends on its seed, its label and the settings alone.

        Hanging up cancels it, but in the background.
        """
        record = await table.start(body)
        if body.background:
            return Response(_json(record.answer([])), 202, media_type="application/json")
        try:
            await _finished_or_gone(record, http)
        finally:
            table.cancel(record)
        if record.status == "failed":
            raise Unserved(record.http_status, record.detail or "", record.retry_after)
        if body.response_format == "png":
            about = {"X-Request-Id": record.id, "X-Model-Step": str(record.taken["step"])}
            return Response(record.pngs[0], media_type="image/png", headers=about)
        link = body.response_format == "urls"
        pictures = [
            record.picture(i, png=None if link else base64.b64encode(record.pngs[i]).decode(), link=link)
            for i in sorted(record.pngs)
        ]
        return Response(_json(record.answer(pictures)), media_type="application/json")

    @app.get("/v1/samples/{id}", response_model=SamplesResponse, response_model_exclude_none=True, responses=of_id)
    async def state(id: RequestId) -> SamplesResponse:
        """What has become of a request, and links to the pictures that are drawn."""
        record = table.find(id)
        return record.answer([record.picture(i, link=True) for i in sorted(record.pngs)])

    @app.get("/v1/samples/{id}/events", responses={**of_id, 200: {"content": {"text/event-stream": {}}}})
    async def events(id: RequestId) -> StreamingResponse:
        """Server-sent events: progress, preview, picture, then done, failed or cancelled. Late ones get what was."""
        return StreamingResponse(_stream(table.find(id)), media_type="text/event-stream")

    @app.get("/v1/samples/{id}/{index}.png", responses={**of_id, 200: {"content": {"image/png": {}}}})
    async def picture(id: RequestId, index: Annotated[int, Path(ge=0)]) -> Response:
        """A picture that is drawn."""
        png = table.find(id).pngs.get(index)
        if png is None:
            raise Unserved(404, f"index={index}: is no picture of this request that is drawn")
        return Response(png, media_type="image/png", headers={"Cache-Control": "private, max-age=600"})

    @app.delete("/v1/samples/{id}", response_model=SamplesResponse, response_model_exclude_none=True, responses=of_id)
    async def cancel(id: RequestId) -> SamplesResponse:
        """Cancels a request; its pictures leave the batch at the next step. What is done stays done."""
        record = table.find(id)
        table.cancel(record)
        return record.answer([])

    @app.post("/v1/bulk", responses={**responses, 200: {"content": {"application/x-tar": {}}}})
    async def bulk_(body: BulkRequest) -> StreamingResponse:
        """Any number of pictures, as a tar in the order asked for, whole if it has its end. Hanging up cancels it."""
        stream = bulk.draw_all(backend, body, in_flight)
        first = await anext(stream)  # what is wrong is told before the answer begins
        return StreamingResponse(_after(first, stream), media_type="application/x-tar")

    @app.get("/v1/models", responses={401: {"model": Problem}, 403: {"model": Problem}})
    async def models() -> dict[str, Any]:
        """What is served: steps, classes, sizes of pictures (a side, or [height, width]); and the limits."""
        described = await backend.describe()
        return {"models": described["models"], "limits": described["limits"]}

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether the frontend lives."""
        return {"status": "ok"}

    @app.get("/readyz", responses={503: {"model": Problem}})
    async def readyz() -> dict[str, Any]:
        """Whether a replica answers with a model loaded."""
        try:
            described = await asyncio.wait_for(backend.describe(), 5)
        except TimeoutError:
            raise Unserved(503, "no replica answers", 5.0) from None
        return {"status": "ready", "waiting": described["waiting"]}

    _add_page(app)
    return app


def _explain_errors(app: "FastAPI") -> None:
    """Every refusal is a `Problem`: one line that names the field."""
    from fastapi import Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException
    from starlette.routing import Match

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse({"detail": one_line(error.errors()[0])}, 422)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        if (
            error.status_code == 400
        ):  # FastAPI's for a body that JSON readers give up on, such as one of 100,000 brackets
            return JSONResponse({"detail": "body: is no JSON"}, 422)
        headers = dict(error.headers or {})
        if error.status_code == 405:  # each of FastAPI's routes knows its own method alone
            matching = [route for route in app.routes if route.matches(request.scope)[0] != Match.NONE]
            headers["Allow"] = ", ".join(sorted({m for route in matching for m in getattr(route, "methods", ())}))
        return JSONResponse({"detail": error.detail}, error.status_code, headers)

    @app.exception_handler(RequestError)
    async def wrong(request: Request, error: RequestError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 422)

    @app.exception_handler(Unserved)
    async def unserved(request: Request, error: Unserved) -> JSONResponse:
        headers = {} if error.retry_after is None else {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
        return JSONResponse({"detail": error.detail}, error.status, headers)


def _add_page(app: "FastAPI") -> None:
    """The static page: read once, so that no path of a request ever reaches the disk."""
    from fastapi import Response

    folder = files("pipelines.serve") / "page"
    read = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} if folder.is_dir() else {}

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def index() -> Response:
        return page("index.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def page_file(name: str) -> Response:
        return page(name)

    def page(name: str) -> Response:
        kind = next((kind for ending, kind in PAGE_TYPES.items() if name.endswith(ending)), None)
        if name not in read or kind is None:
            raise Unserved(404, f"page/{name[:64]}: is no file of the page")
        headers = {"Content-Security-Policy": PAGE_POLICY, "Cache-Control": "no-cache"}
        return Response(read[name], media_type=kind, headers=headers)


async def _finished_or_gone(record: Record, http: Any) -> None:
    """Returns when the request is over, or the one who asked has hung up."""

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    waits = [asyncio.ensure_future(record.finished.wait()), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


async def _stream(record: Record) -> AsyncIterator[str]:
    """Server-sent events."""
    async for event in record.events():
        kind = event["type"]
        if kind == "quiet":
            yield ": still here\n\n"
        elif kind == "progress":
            answer = record.answer([])
            yield _event(kind, answer.model_dump(include={"steps_done", "steps", "images_done", "num_images"}))
        elif kind == "preview":
            png = base64.b64encode(event["data"]).decode()
            yield _event(kind, {"index": event["index"], "steps_done": event["steps_done"], "png": png})
        elif kind == "picture":
            png = base64.b64encode(event["data"]).decode()
            yield _event(kind, record.picture(event["index"], png=png, link=True).model_dump())
    yield _event(record.status, record.answer([]).model_dump(exclude={"images"}, exclude_none=True))


def _event(kind: str, data: dict[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n"


async def _after(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for part in rest:
        yield part


def _json(answer: SamplesResponse) -> str:
    return answer.model_dump_json(exclude_none=True)
