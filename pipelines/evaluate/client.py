"""Pictures from a running deployment (`ldm serve`), over HTTP."""

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
_TRIES = 6
_TIMEOUT_S = 1800.0  # of one request, waiting included
_BUSY = (429, 503)


class SamplesClient:
    """A client of one deployment. Raises RequestError where none answers, or it refuses the request."""

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
        **settings: float,
    ) -> Tensor:
        """labels, seeds: int64 (N,), labels None for an unconditional model => raw pixels uint8 (N, 3, H, W).

        Requests are of the deployment's own batch size, a few at a time. settings: num_inference_steps, eta,
        guidance_scale. progress: called with the number of pictures done.
        """
        size = min(self.model["batch_size"], self.model["max_images"])
        parts = [slice(first, first + size) for first in range(0, len(seeds), size)]

        def request(part: slice) -> Tensor:
            body: dict[str, Any] = {**settings, "seeds": seeds[part].tolist(), "response_format": "npy"}
            if labels is not None:
                body["labels"] = labels[part].tolist()
            array = np.load(io.BytesIO(self._request("/v1/samples", body)), allow_pickle=False)
            return torch.from_numpy(array)

        pictures: list[Tensor] = []
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
            return dict(json.loads(self._request("/v1/models", tries=1))["models"][0])
        except (OSError, ValueError, LookupError, TypeError) as error:
            if isinstance(error, RequestError):
                raise
            text = " ".join(str(error).split())[:160]
            raise RequestError(
                f"endpoint={self.endpoint}: no deployment answers there ({text}); give the URL that `ldm serve` prints"
            ) from None

    def _request(self, path: str, body: dict[str, Any] | None = None, tries: int = _TRIES) -> bytes:
        """The body of the answer. What fails in passing is tried again: a request may be repeated freely."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.endpoint + path, data, {"Content-Type": "application/json"})
        for left in reversed(range(tries)):
            try:
                with self._opener.open(request, timeout=_TIMEOUT_S) as answer:
                    return bytes(answer.read())
            except urllib.error.HTTPError as error:
                detail = _detail(error)
                if error.code == 422:
                    raise RequestError(detail) from None
                if error.code not in _BUSY or left == 0:
                    raise RuntimeError(f"{self.endpoint}{path}: answers {error.code} ({detail})") from None
            except OSError as error:
                if left == 0:
                    raise ConnectionError(f"{self.endpoint}{path}: {error}") from error
            if self._stopped.wait(2.0 ** (tries - left - 2)):  # 0.5 s, then twice as long each time
                break
        raise ConnectionAbortedError("stopped")


def _detail(error: urllib.error.HTTPError) -> str:
    text = error.read().decode("utf-8", "replace")
    try:
        return str(json.loads(text)["detail"])
    except (ValueError, LookupError, TypeError):
        return " ".join(text.split())[:160] or error.reason
