"""Configuration: defaults, then a YAML file, then dotted `key=value` overrides; one frozen model for each stage.

A `RequestError` is the user's mistake. Its text is one line that names the key, the value and what would be
right; the command line prints it and exits with 2.
"""

import difflib
import json
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import pydantic
import yaml


class RequestError(ValueError):
    """The request is wrong. `str(error)` is one line: the key, the value, what would be right."""


class DamagedError(ValueError):
    """A file is not what was written. `str(error)` is one line that names it."""


class Config(pydantic.BaseModel):
    """Base of every stage's configuration: frozen, and a misspelt key is an error."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _split_commas(cls, value: object, info: pydantic.ValidationInfo) -> object:
        """`0.9,0.99` is read as [0.9, 0.99] where nothing but a tuple is meant."""
        if not isinstance(value, str) or info.field_name is None:
            return value
        kind = cls.model_fields[info.field_name].annotation
        choices = [one for one in get_args(kind) if one is not type(None)] if _is_union(kind) else [kind]
        if len(choices) == 1 and get_origin(choices[0]) is tuple:
            return [part.strip() for part in value.split(",")]
        return value


def _is_union(kind: object) -> bool:
    return get_origin(kind) in (Union, types.UnionType)


class _IsLocation:
    """Marks a field that holds a path or URL, so that `ldm submit` can make a relative path absolute."""


Location = Annotated[str, _IsLocation()]
"""A path or an fsspec URL (`s3://bucket/key`). Sources also take globs, comma sets and brace ranges."""

C = TypeVar("C", bound=Config)

_MAPPING = re.compile(r"""\{\s*(\}$|[\w.-]+\s*:\s|["'][^"']*["']\s*:)""")
"""How a YAML or JSON mapping begins, and a path with braces does not."""


def parse(
    model: type[C],
    layers: Sequence[tuple[str, Mapping[str, Any]]],
    overrides: Sequence[str] = (),
) -> C:
    """Builds `model` from nested mappings (name, values), later ones winning, then `key=value` overrides.

    Raises RequestError on the first wrong key or value.
    """
    merged: dict[str, Any] = {}
    for name, values in layers:
        if not isinstance(values, Mapping):
            raise RequestError(f"{name}: holds {type(values).__name__}, expected a mapping of keys to values")
        _merge(merged, values)
    for override in overrides:
        _merge(merged, _parse_override(override))
    return validate(model, merged)


def validate(model: type[C], values: Mapping[str, Any]) -> C:
    """Builds `model`, turning pydantic's report into one RequestError line."""
    try:
        return model.model_validate(values)
    except pydantic.ValidationError as error:
        raise RequestError(_first_problem(model, error)) from None


def load_yaml(path: Path) -> dict[str, Any]:
    """Reads one YAML mapping. Raises RequestError where the file is no YAML mapping."""
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RequestError(f"config={path}: cannot be read as YAML ({_one_line(error)})") from None
    if not isinstance(values, dict | None):
        raise RequestError(f"config={path}: holds a {type(values).__name__}, expected a mapping of keys")
    return values or {}


def fields(model: type[Config], prefix: str = "") -> Iterator[tuple[str, str, str, str, bool]]:
    """Yields (dotted key, type, default, description, is_location) for every leaf field of `model`."""
    for name, field in model.model_fields.items():
        nested, name = _nested_model(field.annotation), field.alias or name
        if nested is not None:
            yield from fields(nested, f"{prefix}{name}.")
            continue
        default = "required" if field.is_required() else _show(field.get_default(call_default_factory=True))
        is_location = any(isinstance(mark, _IsLocation) for mark in field.metadata) or "_IsLocation" in repr(
            field.annotation
        )
        yield f"{prefix}{name}", _type_name(field.annotation), default, field.description or "", is_location


def canonical_json(value: Any) -> str:
    """One text for one value: sorted keys, no spaces. What hashes are taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Readable differences of two nested mappings: `a.b: old != new`, in the order of the keys."""
    lines = []
    for key in sorted({*old, *new}):
        was, now = old.get(key), new.get(key)
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            lines += differences(was, now, f"{prefix}{key}.")
        elif was != now:
            lines.append(f"{prefix}{key}: {_show(was)} != {_show(now)}")
    return lines


def _parse_override(override: str) -> dict[str, Any]:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise RequestError(f"{override!r}: is no option and no key=value pair")
    # Only lists, mappings and null are read as YAML; every other text goes to pydantic as it stands, which
    # reads numbers and booleans itself and leaves a path such as "{0..3}" or a name such as "on" alone.
    value: Any = text
    if text in ("null", "none", "None"):
        value = None
    elif (text.startswith("[") and text.endswith("]")) or _MAPPING.match(text):
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RequestError(f"{key}={text}: cannot be read ({_one_line(error)})") from None
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        elif isinstance(value, Mapping):
            into[key] = {}
            _merge(into[key], value)
        else:
            into[key] = value


def _first_problem(model: type[Config], error: pydantic.ValidationError) -> str:
    problems = error.errors(include_url=False)
    # A misspelt key often causes "missing" elsewhere: name the misspelling first.
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    key = _key(model, problem["loc"])
    shown = _show(problem["input"])
    if problem["type"] == "extra_forbidden":
        known = [name for name, *_ in fields(model)]
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5) or difflib.get_close_matches(
            key.split(".")[-1], [name.split(".")[-1] for name in known], n=1, cutoff=0.5
        )
        hint = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(sorted(known))}"
        return f"{key}={shown}: unknown key; {hint}"
    if problem["type"] == "missing" and isinstance(problem["loc"][-1], str):
        return f"{key}: missing; give {key}=VALUE"
    if problem["type"] == "missing":  # an item of a tuple of so many
        kind = next(type_name for name, type_name, *_ in fields(model) if name == key)
        given = ",".join(str(one) for one in problem["input"])
        return f"{key}={given}: has too few values, expected {kind}"
    # The branches of a union each say what they expected.
    own = [p for p in problems if _key(model, p["loc"]) == key and p["type"] != "missing"]
    messages = dict.fromkeys(p["msg"].removeprefix("Value error, ") for p in own)
    if not key:  # a check over several fields names its keys itself
        return next(iter(messages))
    return f"{key}={shown}: " + "; or ".join(f"{message[0].lower()}{message[1:]}" for message in messages)


def _key(model: type[Config], loc: Sequence[int | str]) -> str:
    """The dotted key of a problem's place, which also counts list items and names the branches of unions."""
    names: list[str] = []
    here: type[Config] | None = model
    for part in loc:
        if here is None:
            break
        names.append(str(part))
        field = here.model_fields.get(str(part))
        here = _nested_model(field.annotation) if field else None
    return ".".join(names)


def _nested_model(annotation: Any) -> type[Config] | None:
    candidates = [annotation, *get_args(annotation)]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Config)), None)


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        return _type_name(get_args(annotation)[0])
    if isinstance(annotation, type) and not get_args(annotation):
        return "null" if annotation is type(None) else annotation.__name__
    origin, args = get_origin(annotation), get_args(annotation)
    if str(origin) == "typing.Literal":
        return "|".join(str(a) for a in args)
    if origin in (tuple, list, dict):
        return f"{origin.__name__}[{', '.join(_type_name(a) for a in args if a is not Ellipsis)}]"
    return "|".join(_type_name(a) for a in args) if args else str(annotation)


def _show(value: Any) -> str:
    if isinstance(value, str):
        return " ".join(value.split()) or "''"
    try:
        return json.dumps(value)
    except TypeError:
        return str(value)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
