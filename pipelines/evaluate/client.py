"""Pictures from a running deployment (`ldm serve`), over HTTP."""

import http.client
import io
import json
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import IO, Any
from urllib.parse import urlparse

import numpy as np
import torch
from torch import Tensor

from ldm.config import RequestError

_MODEL_KEYS = ("name", "snapshot", "step", "weights_sha256")
_SETTING_KEYS = ("batch_size", "precision", "compile", "device")
_TRIES = 6
_PICTURE_WITHIN_S = 1800.0  # the next one, its waiting included
_DESCRIBE_WITHIN_S = 10.0


class SamplesClient:
    """A client of one deployment. Raises RequestError where none answers, or it refuses the request.

    weights_sha256: of the model that is to draw, where it is served; else the default one. model: what draws (name,
    snapshot, step, weights_sha256). settings: what a picture depends on there beside what it is asked for: batch_size
    (rows in the largest call), precision, compile and device; an older server tells the first alone.
    """

    def __init__(self, endpoint: str, weights_sha256: str | None = None) -> None:
        self.endpoint = endpoint.rstrip("/")
        # A deployment on this machine is never reached by way of an HTTP proxy.
        local = urlparse(endpoint).hostname in ("127.0.0.1", "localhost", "::1")
        self._opener = urllib.request.build_opener(*[urllib.request.ProxyHandler({})] * local)
        self.model, self.settings = self._model(weights_sha256)

    def draw(self, labels: Tensor | None, seeds: Tensor, **settings: Any) -> Iterator[Tensor]:
        """labels, seeds: int64 (N,), labels None for an unconditional model => raw pictures uint8 (3, H, W) in order.

        One stream, which goes on from where it broke off. settings: those of a `SamplerConfig`.
        """
        done = tries = 0
        while done < len(seeds):
            body: dict[str, Any] = {
                **settings,
                "model": self.model["name"],
                "seeds": seeds[done:].tolist(),
                "response_format": "npy",
            }
            if labels is not None:
                body["labels"] = labels[done:].tolist()
            before = done
            try:
                with self._open("/v1/bulk", body, _PICTURE_WITHIN_S) as answer:
                    for picture in _pictures(answer):
                        done += 1
                        yield picture
                problem: Exception = ConnectionError(f"{self.endpoint}/v1/bulk: the answer broke off")
            except (OSError, http.client.HTTPException, tarfile.TarError, ValueError) as error:
                if isinstance(error, RequestError):
                    raise
                problem = ConnectionError(f"{self.endpoint}/v1/bulk: {error}")
            tries = 0 if done > before else tries + 1
            if tries == _TRIES:
                raise problem
            if tries:
                time.sleep(2.0 ** (tries - 2))  # 0.5 s, then twice as long each time

    def _model(self, weights_sha256: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
        """(model, settings)"""
        try:
            with self._open("/v1/models", None, _DESCRIBE_WITHIN_S) as answer:
                about = json.loads(answer.read())
            models, limits = about["models"], about["limits"]  # the default one first
            model = next((model for model in models if model["weights_sha256"] == weights_sha256), models[0])
            settings = {key: limits[key] for key in _SETTING_KEYS if key in limits}
            return {key: model[key] for key in _MODEL_KEYS}, {**settings, "batch_size": int(limits["batch_size"])}
        except (OSError, ValueError, LookupError, TypeError) as error:  # or something else answers
            text = " ".join(str(error).split())[:160]
            raise RequestError(
                f"endpoint={self.endpoint}: no deployment answers there ({text}); give the URL that `ldm serve` prints"
            ) from None

    def _open(self, path: str, body: dict[str, Any] | None, within_s: float) -> Any:
        """The open answer. Raises RequestError where the request is refused as wrong, else OSError."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.endpoint + path, data, {"Content-Type": "application/json"})
        try:
            return self._opener.open(request, timeout=within_s)
        except urllib.error.HTTPError as error:
            detail = _detail(error)
            if error.code == 422:
                raise RequestError(detail) from None
            raise ConnectionError(f"answers {error.code} ({detail})") from None


def _pictures(answer: IO[bytes]) -> Iterator[Tensor]:
    """The members of a tar, as they come: uint8 (3, H, W) each."""
    with tarfile.open(fileobj=answer, mode="r|") as tar:
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            yield torch.from_numpy(np.load(io.BytesIO(file.read()), allow_pickle=False))


def _detail(error: urllib.error.HTTPError) -> str:
    text = error.read().decode("utf-8", "replace")
    try:
        return str(json.loads(text)["detail"])
    except (ValueError, LookupError, TypeError):
        return " ".join(text.split())[:160] or error.reason
