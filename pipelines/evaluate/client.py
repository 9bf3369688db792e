"""Pictures from a running deployment (`ldm serve`), over HTTP."""

import http.client
import io
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from torch import Tensor

from ldm.config import RequestError

_IN_FLIGHT = 4  # requests at a time: the next one waits at the replica when one is done
_MODEL_KEYS = ("snapshot", "step", "weights_sha256", "batch_size", "max_images")
_TRIES = 6
_DRAW_WITHIN_S = 1800.0  # one request, its waiting included
_DESCRIBE_WITHIN_S = 10.0


class SamplesClient:
    """A client of one deployment. Raises RequestError where none answers, or it refuses the request.

    model: what is served (snapshot, step, weights_sha256) and the limits (batch_size, max_images).
    """

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint.rstrip("/")
        # A deployment on this machine is never reached by way of an HTTP proxy.
        local = urlparse(endpoint).hostname in ("127.0.0.1", "localhost", "::1")
        self._opener = urllib.request.build_opener(*[urllib.request.ProxyHandler({})] * local)
        self._stopped = threading.Event()
        self.model = self._model()

    def draw(
        self,
        labels: Tensor | None,
        seeds: Tensor,
        *,
        progress: Callable[[int], None],
        **settings: Any,
    ) -> Tensor:
        """labels, seeds: int64 (N,), labels None for an unconditional model => raw pixels uint8 (N, 3, H, W).

        Requests are of the deployment's own batch size, a few at a time. settings: those of a
        `SamplerConfig`. progress: called with the number of pictures done.
        """
        size = min(self.model["batch_size"], self.model["max_images"])
        parts = [slice(first, first + size) for first in range(0, len(seeds), size)]

        def request(part: slice) -> Tensor:
            body: dict[str, Any] = {**settings, "seeds": seeds[part].tolist(), "response_format": "npy"}
            if labels is not None:
                body["labels"] = labels[part].tolist()
            answer = self._request("/v1/samples", body, tries=_TRIES, within_s=_DRAW_WITHIN_S)
            return torch.from_numpy(np.load(io.BytesIO(answer), allow_pickle=False))

        pictures: list[Tensor] = []
        self._stopped.clear()
        pool = ThreadPoolExecutor(_IN_FLIGHT, "samples")
        try:
            for part, drawn in zip(parts, pool.map(request, parts), strict=True):
                pictures.append(drawn)
                progress(min(part.stop, len(seeds)))
        finally:
            self._stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
        return torch.cat(pictures)

    def _model(self) -> dict[str, Any]:
        try:
            answer = self._request("/v1/models", tries=1, within_s=_DESCRIBE_WITHIN_S)
            model = json.loads(answer)["models"][0]
            return {key: model[key] for key in _MODEL_KEYS}
        except (OSError, RuntimeError, ValueError, LookupError, TypeError) as error:  # or something else answers
            text = " ".join(str(error).split())[:160]
            raise RequestError(
                f"endpoint={self.endpoint}: no deployment answers there ({text}); give the URL that `ldm serve` prints"
            ) from None

    def _request(self, path: str, body: dict[str, Any] | None = None, *, tries: int, within_s: float) -> bytes:
        """The body of the answer. What fails in passing is tried again: a request may be repeated freely."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.endpoint + path, data, {"Content-Type": "application/json"})
        problem: Exception = ConnectionAbortedError("stopped")
        for i in range(tries):
            if i and self._stopped.wait(2.0 ** (i - 2)):  # 0.5 s, then twice as long each time
                break
            try:
                with self._opener.open(request, timeout=within_s) as answer:
                    return bytes(answer.read())
            except urllib.error.HTTPError as error:
                detail = _detail(error)
                if error.code == 422:
                    raise RequestError(detail) from None
                problem = RuntimeError(f"{self.endpoint}{path}: answers {error.code} ({detail})")
                if error.code < 500 and error.code != 429:
                    break
            except (OSError, http.client.HTTPException) as error:
                problem = ConnectionError(f"{self.endpoint}{path}: {error}")
        raise problem


def _detail(error: urllib.error.HTTPError) -> str:
    text = error.read().decode("utf-8", "replace")
    try:
        return str(json.loads(text)["detail"])
    except (ValueError, LookupError, TypeError):
        return " ".join(text.split())[:160] or error.reason
