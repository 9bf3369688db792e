"""What is sent with a job: this very code and the resolved configuration, without a secret and without data."""

import importlib.util
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

import ldm
from ldm import storage
from ldm.autoencoder import is_name
from ldm.config import Config, RequestError, fields

PACKAGES = ("ldm", "pipelines", "jobs")
_LEFT_OUT = shutil.ignore_patterns("__pycache__", ".*")
_SIGNED = re.compile(
    r"[?&](x-(?:amz|goog)-(?:signature|credential|security-token)|signature|sig|token|access_token|password)=", re.I
)


def resolve(config: Config) -> Config:
    """As it holds anywhere: with absolute paths, and tracking by its URI. Raises RequestError for a secret in it."""
    config = _with_absolute_locations(config)
    for key, value in _strings(config.model_dump(mode="json")):
        check_no_secret(key, value)
    return config


def check_no_secret(key: str, value: str) -> None:
    """Raises RequestError for a URL with a password or a signature: all who reach the cluster could read it."""
    for text in re.findall(r"[a-zA-Z][\w+.-]*://\S+", value):
        if urlsplit(text).password or _SIGNED.search(text):
            shown = re.sub(r"//[^/@\s]*@", "//…@", text).partition("?")[0]
            raise RequestError(
                f"{key}={shown}: holds a secret, and what a job is given can be read on the whole cluster; leave it "
                "out, and give it to the nodes: ~/.mlflow/credentials or MLFLOW_TRACKING_PASSWORD, a role for S3"
            )


def pack(folder: Path, config: Config, limit: int) -> int:
    """Copies packages and configuration into an empty folder; returns their bytes.

    Raises RequestError where they are more than `limit` bytes, before anything is copied.
    """
    root = Path(str(ldm.__file__)).parent.parent
    packages = [root / name for name in PACKAGES] + _own_denoiser(config)
    sizes = {package: sum(file.stat().st_size for file in _files(package)) for package in packages}
    if sum(sizes.values()) > limit:
        largest = max(sizes, key=lambda package: sizes[package])
        raise RequestError(
            f"{largest}: has {storage.readable(sizes[largest])}, and Ray takes {storage.readable(limit)} with a job; "
            "move what is no code out of that package"
        )
    for package in packages:
        if package.is_dir():
            shutil.copytree(package, folder / package.name, ignore=_LEFT_OUT)
        else:
            shutil.copyfile(package, folder / package.name)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json", by_alias=True), sort_keys=False))
    return sum(sizes.values())


def locations(config: Config) -> Iterator[tuple[str, str]]:
    """(key, path or URL) of each place that a configuration names, patterns as they stand."""
    for key, _, _, _, is_location in fields(type(config)):
        value = getattr(config, key, None) if "." not in key else None
        if is_location and value is not None:
            for text in [value] if isinstance(value, str) else value:
                if not _is_no_path(text, key):
                    yield from ((key, part) for part in _parts(text, key))


def _files(package: Path) -> Iterator[Path]:
    if package.is_file():
        yield package
        return
    left_out = _LEFT_OUT(str(package), [place.name for place in package.iterdir()])
    for place in package.iterdir():
        if place.name not in left_out:
            yield from _files(place) if place.is_dir() else [place]


def _own_denoiser(config: Config) -> list[Path]:
    """The module or package of a denoiser class of the user's own. Raises RequestError where it is not found."""
    denoiser = getattr(config, "denoiser", None)
    named = denoiser.type if denoiser is not None else getattr(config, "denoiser_type", None)
    if not named or ":" not in named:
        return []
    found = importlib.util.find_spec(named.split(":")[0].split(".")[0])
    if found is None or found.origin is None:
        raise RequestError(f"denoiser.type={named}: its module is not found here; its folder must be on PYTHONPATH")
    origin = Path(found.origin)
    return [origin.parent if origin.name == "__init__.py" else origin]


def _with_absolute_locations(config: Config) -> Config:
    """A job runs in a folder of its own: relative paths are made absolute here."""
    updates: dict[str, Any] = {}
    for key, _, _, _, is_location in fields(type(config)):
        value = getattr(config, key, None) if "." not in key else None
        if is_location and value is not None:
            many = [value] if isinstance(value, str) else list(value)
            made = [text if _is_no_path(text, key) else _absolute(text, key) for text in many]
            updates[key] = made[0] if isinstance(value, str) else tuple(made)
    if tracking := getattr(config, "tracking", None):
        updates["tracking"] = tracking.resolved()
    return config.model_copy(update=updates)


def _is_no_path(text: str, key: str) -> bool:
    """A hub's or MLflow's name, or one that a stage knows, in place of a location."""
    if key == "features":
        return text in ("classifier", "vae")
    if key == "autoencoder":
        return is_name(text)
    return key == "snapshot" and text.startswith("models:/")


def _absolute(text: str, key: str) -> str:
    """A relative path made absolute, of a comma set each one; URLs as they stand."""
    return ",".join(storage.absolute(part) for part in _parts(text, key))


def _parts(text: str, key: str) -> list[str]:
    return storage.split_commas(text) if key in ("source", "reference", "pictures") else [text]


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every text in a configuration."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _strings(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner, key)
    elif isinstance(value, str):
        yield key, value
