"""The YAML file of `ldm run`: stages in their order, each with its own keys, and what they hand on to one another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from jobs import cli
from jobs.submit import check_submittable
from ldm.config import Config, RequestError, load_yaml
from ldm.features import check_extractor
from ldm.sources import find_shards
from pipelines.evaluate import networks
from pipelines.train import TrainConfig
from pipelines.train.record import read_record
from pipelines.train.resume import choose_checkpoint
from pipelines.train.snapshots import snapshot_url

_LABEL = "label"
"""Of encode: what holds a picture's class number. Whoever takes the pictures as the reference finds it there too."""

CONFIG = "config"
"""The key of a step that names a packaged config or a file, as `--config` does."""


@dataclass(frozen=True)
class Step:
    """title: as written, `study sweep`: the stage, then what stands behind it on the command line."""

    title: str
    values: Mapping[str, Any]

    @property
    def verb(self) -> str:
        return self.title.split()[0]

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(self.title.split()[1:])


@dataclass
class Pipeline:
    """Steps, and what those that are done gave to the others."""

    name: str
    steps: tuple[Step, ...]
    given: dict[str, Any] = field(default_factory=dict)

    def configs(self) -> list[Config]:
        """Of all steps, each with what those before it will give. Raises RequestError, which names the step."""
        ahead, configs = Pipeline(self.name, self.steps), []
        for step in self.steps:
            config = ahead.config(step)
            ahead.gave(step, _promised(step, config))
            configs.append(config)
        return configs

    def config(self, step: Step) -> Config:
        """Of a step, with what those before it gave where it leaves that out. Raises RequestError."""
        values = {key: value for key, value in step.values.items() if key != CONFIG}
        named = step.values.get(CONFIG)
        arguments = [*step.words, *(["--config", str(named)] if named is not None else [])]
        try:
            config = _parse(step, arguments, values, self.given)
            if (check := getattr(cli.stage_module(step.verb), "check", None)) is not None:
                check(config)
            return config
        except RequestError as error:
            raise RequestError(f"{self.name}: {step.title}: {error}") from None

    def gave(self, step: Step, report: Mapping[str, Any]) -> None:
        """Keeps what later steps take from this one, whose report says where it is."""
        if step.verb == "encode":
            asked = self.config(step).model_dump()
            self.given |= {"latents": report["destination"], "reference": asked["source"], _LABEL: asked["label"]}
        elif step.verb == "train":
            self.given["snapshot"] = report["snapshot"]


def read_pipeline(path: Path) -> Pipeline:
    """Raises RequestError where the file is no mapping of stages to their keys."""
    values = load_yaml(path)
    if not values:
        raise RequestError(f"{path}: holds no step; give stages with their keys, such as encode, train and evaluate")
    document: Any = yaml.compose(path.read_text(), Loader=yaml.SafeLoader)
    written = [str(key.value) for key, _ in document.value]
    for title, keys in values.items():
        if not isinstance(title, str) or not title.strip():
            raise RequestError(f"{path}: {title!r}: is no stage")
        try:
            check_submittable(title.split()[0])
        except RequestError as error:
            raise RequestError(f"{path}: {error}") from None
        if option := next(
            (word for word in title.split() if word in ("-h", "--help", "--dry-run", "--print-config")), None
        ):
            raise RequestError(f"{path}: {title}: {option} runs nothing; leave it out")
        if not isinstance(keys, dict | None):
            raise RequestError(f"{path}: {title}: holds a {type(keys).__name__}, expected a mapping of keys to values")
        if written.count(title) > 1:
            raise RequestError(f"{path}: {title}: stands there twice; give the second one a file of its own")
    return Pipeline(str(path), tuple(Step(title, keys or {}) for title, keys in values.items()))


def check_inputs(pipeline: Pipeline, configs: Sequence[Config]) -> None:
    """Raises RequestError for image shards or networks that are not there, and for an output that holds another run: a
    late step must not fail for them after days."""
    for step, config in zip(pipeline.steps, configs, strict=True):
        try:
            _check_inputs(config)
        except RequestError as error:
            raise RequestError(f"{pipeline.name}: {step.title}: {error}") from None


def _check_inputs(config: Config) -> None:
    for key in ("source", "reference"):
        value = getattr(config, key, None)
        if value is None or (isinstance(value, str) and value.endswith(".safetensors")):
            continue
        try:
            find_shards(value)
        except RequestError as error:
            raise RequestError(str(error).replace("source=", f"{key}=", 1)) from None
    if (features := getattr(config, "features", None)) not in (None, networks.CLASSIFIER, networks.VAE):
        check_extractor(features)
    if isinstance(config, TrainConfig):
        read_record(config, choose_checkpoint(config.output, config.resume_from))


def _parse(step: Step, arguments: list[str], values: Mapping[str, Any], given: Mapping[str, Any]) -> Config:
    """The configuration of a step; keys that it needs and nobody gives are taken from `given`."""
    taken: set[str] = set()
    while True:
        try:
            _, config = cli.parse_stage(step.verb, arguments, [(step.title, values)])
        except RequestError as error:
            key = str(error).partition(": missing; ")[0]
            if key not in given or key in values:
                raise
            values = {**values, key: given[key]}
            taken.add(key)
            continue
        assert config is not None  # nothing among the arguments asks for less than a run
        if "reference" in taken and _LABEL in type(config).model_fields and _LABEL not in config.model_fields_set:
            values = {**values, _LABEL: given[_LABEL]}
            continue
        return config


def _promised(step: Step, config: Config) -> dict[str, Any]:
    """What the report of a step will say of where its output is."""
    if step.verb == "train":
        values = config.model_dump(include={"output", "max_steps"})
        return {"snapshot": snapshot_url(values["output"], values["max_steps"])}
    return config.model_dump(include={"destination"})
