"""The configuration of `ldm serve`."""

import hashlib
from typing import Literal

from pydantic import Field, field_validator

from ldm import storage
from ldm.config import Config, Location, RequestError
from pipelines.token_files import other_readers

LOOPBACK = ("127.0.0.1", "localhost")


class ServeConfig(Config):
    """Serves snapshots over HTTP with Ray Serve."""

    snapshot: Location = Field(
        description="a snapshot, the output of `ldm train` or a folder of snapshots (the newest; others by "
        "name), or a model of MLflow as models:/NAME@ALIAS or models:/NAME/VERSION"
    )
    host: str = Field(
        "127.0.0.1", description="IPv4 address to listen on; one that others reach, such as 0.0.0.0, needs a token_file"
    )
    port: int = Field(8000, ge=0, le=65535, description="TCP port; 0: any free one")
    token_file: str | None = Field(
        None,
        description="file on this machine whose first line is the token that requests bear (mode 0600); null: none",
    )
    batch_size: int | Literal["auto"] = Field(
        "auto",
        description="rows in one call of the denoiser at most, two for a guided picture; auto: the fewest that are "
        "within 5% of the fastest here, measured at the start",
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="what the denoiser computes in")
    compile: bool = Field(
        False, description="whether the denoiser is compiled (torch.compile), each bucket at the start"
    )
    max_images: int = Field(1024, gt=0, description="most pictures in one request; a bulk request has no bound")
    max_steps: int = Field(1000, gt=0, description="most num_inference_steps in one request")
    max_waiting: int = Field(64, gt=0, description="most requests at a replica at a time; others get a 429")
    deadline_s: float = Field(
        600.0, gt=0, description="seconds within which a request is answered, where it names no other; else a 429"
    )
    num_replicas: int | tuple[int, int] = Field(
        1, description="replicas, each with the whole model; [least, most]: as many as the queue asks for"
    )
    gpus_per_replica: float = Field(1.0, gt=0, le=1, description="share of a GPU that a replica takes")
    refresh_s: float = Field(
        10.0, ge=0, description="seconds between looks for a newer version of the model; 0: never looked for"
    )
    max_models: int = Field(
        2, ge=2, description="models that a replica holds at a time: a newer version is loaded beside the older one"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the replicas run")
    denoiser_type: str | None = Field(None, description="package:Class, for a snapshot of your own denoiser class")

    @field_validator("batch_size")
    @classmethod
    def _is_positive(cls, value: int | str) -> int | str:
        if value != "auto" and int(value) < 1:
            raise ValueError("must be at least 1, or auto")
        return value

    @field_validator("num_replicas")
    @classmethod
    def _rises(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        least, most = value if isinstance(value, tuple) else (value, value)
        if not 1 <= least <= most:
            raise ValueError("must be at least 1, or [least, most] such as [1, 4]")
        return value

    @property
    def most_replicas(self) -> int:
        return self.num_replicas if isinstance(self.num_replicas, int) else self.num_replicas[1]


def read_token(config: ServeConfig) -> str | None:
    """The token, None for none. Raises RequestError where others could use the deployment without one, or read it."""
    if config.token_file is None:
        if config.host not in LOOPBACK:
            raise RequestError(
                f"host={config.host}: others could use it without a token; give token_file=FILE, or host=127.0.0.1"
            )
        return None
    path = storage.local_path(config.token_file)
    try:
        token, others = path.read_text().strip().split("\n")[0].strip(), other_readers(path)
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"token_file={config.token_file}: cannot be read ({error})") from None
    if others:
        raise RequestError(f"token_file={config.token_file}: can be read by {others}; chmod 600 {config.token_file}")
    if len(token) < 8:
        raise RequestError(f"token_file={config.token_file}: holds no token of at least 8 characters")
    return token


def token_sha256(token: str | None) -> str | None:
    """All that the deployment is told of a token."""
    return None if token is None else hashlib.sha256(token.encode()).hexdigest()
