"""The client of `ldm serve` that evaluation draws through: what it tries again, and what it does not."""

import contextlib
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import torch

from ldm.config import RequestError
from pipelines.evaluate.client import SamplesClient


class TestClient:
    def test_nothing_listens(self, free_port: Any) -> None:
        with pytest.raises(RequestError, match=r"^endpoint=http://127\.0\.0\.1:\d+: no deployment answers there"):
            SamplesClient(f"http://127.0.0.1:{free_port()}")

    def test_something_else_answers(self) -> None:
        with answering([(200, b"<html>")]) as (url, _), pytest.raises(RequestError, match="no deployment answers"):
            SamplesClient(url)

    def test_a_failure_in_passing_is_tried_again(self) -> None:
        pictures = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).reshape(2, 3, 4, 4)
        broken, rest = tar(pictures)[: 512 + 512 + 512], tar(pictures[1:])  # the first one, and no end
        answers = [(200, MODEL), (503, b'{"detail": "busy"}'), (0, b""), (200, broken), (200, rest)]
        with answering(answers) as (url, seen):
            drawn = torch.stack(list(SamplesClient(url).draw(torch.tensor([1, 2]), torch.tensor([3, 4]))))
        assert torch.equal(drawn, pictures)
        assert [path for path, _ in seen] == ["/v1/models"] + ["/v1/bulk"] * 4
        whole = {"model": "s", "labels": [1, 2], "seeds": [3, 4], "response_format": "npy"}
        assert [body for _, body in seen[1:]] == [whole] * 3 + [{**whole, "labels": [2], "seeds": [4]}]

    def test_the_model_that_is_asked_for_draws(self) -> None:
        with answering([(200, MODEL)] * 2) as (url, _):
            assert SamplesClient(url, "1").model["name"] == "other"
            assert SamplesClient(url, "2").model["name"] == "s"  # the default: the caller sees that it is another one

    def test_what_a_picture_depends_on_there_is_told(self) -> None:
        about = {**json.loads(MODEL), "limits": {"batch_size": 16, "max_images": 4, **PRECISE}}
        with answering([(200, json.dumps(about).encode()), (200, MODEL)]) as (url, _):
            assert SamplesClient(url).settings == {"batch_size": 16, **PRECISE}
            assert SamplesClient(url).settings == {"batch_size": 16}  # of an older server

    def test_a_refusal_is_not_tried_again(self) -> None:
        with answering([(200, MODEL), (422, b'{"detail": "eta=2: is too much"}')]) as (url, seen):
            with pytest.raises(RequestError, match=r"^eta=2: is too much$"):
                next(SamplesClient(url).draw(None, torch.tensor([3]), eta=2))
            assert len(seen) == 2


PRECISE = {"precision": "bf16", "compile": False, "device": "cpu"}
MODEL = json.dumps(
    {
        "models": [
            {"name": "s", "snapshot": "run/s", "step": 1, "weights_sha256": "0"},
            {"name": "other", "snapshot": "run/other", "step": 2, "weights_sha256": "1"},
        ],
        "limits": {"batch_size": 16},
    }
).encode()


@contextlib.contextmanager
def answering(answers: list[tuple[int, bytes]]) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """A server on this machine that gives these (status, body) in turn; status 0 hangs up. Yields (URL, requests)."""
    left, seen = iter(answers), list[tuple[str, Any]]()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(None)

        def do_POST(self) -> None:
            self.answer(json.loads(self.rfile.read(int(self.headers["content-length"]))))

        def answer(self, body: Any) -> None:
            seen.append((self.path, body))
            status, content = next(left)
            if status == 0:
                self.close_connection = True
                return
            self.send_response(status)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", seen
        finally:
            server.shutdown()


def tar(pictures: torch.Tensor) -> bytes:
    """What a bulk request is answered with: a header and a member of 512 bytes for each of these small pictures."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for i, picture in enumerate(pictures.numpy()):
            member = io.BytesIO()
            np.save(member, picture)
            header = tarfile.TarInfo(f"{i:08d}.npy")
            header.size = len(member.getvalue())
            file.addfile(header, io.BytesIO(member.getvalue()))
    return buffer.getvalue()
