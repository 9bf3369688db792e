"""The `ldm` command: one verb for each stage, one way to configure them all."""

import argparse
import contextlib
import dataclasses
import difflib
import importlib
import json
import os
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import yaml

from jobs.outcome import Outcome, do
from ldm import __version__
from ldm.config import Config, DamagedError, RequestError, fields, load_yaml, parse

STAGES = {
    "demo": "the whole path on 1,797 handwritten digits: encode, train, serve, evaluate",
    "inspect": "what is in image shards or in a latent dataset, and what encoding would take",
    "encode": "image shards to a latent dataset, with a frozen autoencoder, on Ray",
    "verify": "a latent dataset checked against its manifest; with --resume, whether training resumes exactly here",
    "convert": "a table joined to a latent dataset's columns; a snapshot to diffusers; a DiT of others to a snapshot",
    "train": "a latent dataset to snapshots, with DeepSpeed ZeRO under Ray Train; run again, it goes on",
    "sample": "a snapshot to pictures, on this machine",
    "serve": "a snapshot behind HTTP, with Ray Serve",
    "evaluate": "a snapshot measured against reference pictures, drawn through Ray Serve or by workers on Ray",
    "study": "many settings, spaces or sizes compared, on Ray: sweep, latent-vs-pixel or scaling",
}
COMMANDS = {
    "run": "several stages, one after the other: ldm run PIPELINE.yaml [--address URL] …",
    "submit": "a stage as a job on a Ray cluster: ldm submit STAGE [--address URL] [--no-wait] …",
}
"""What works on stages: each a module with a main of its own."""
Do = Callable[[ModuleType, Config], Outcome]
CONFIGS = Path(__file__).parent / "configs"
SKIPPED = "skipped"
"""The key of a report that was there already."""
DONE, FAILED, WRONG_REQUEST, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143


def main(argv: Sequence[str] | None = None, work: Do = do) -> int:
    """Runs one verb; returns the exit code: 0 done, 1 failed, 2 the request is wrong, 3 too much quarantined.

    work: what is done with a stage and its configuration.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    signal.signal(signal.SIGTERM, interrupt)
    sys.path.append(os.getcwd())  # a denoiser class of the user's own is looked for there, and last
    try:
        return _run(arguments, work)
    except RequestError as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG_REQUEST
    except KeyboardInterrupt as error:
        print("interrupted: what was committed stays usable, and the same command goes on", file=sys.stderr)
        return TERMINATED if error.args == (signal.SIGTERM,) else INTERRUPTED
    except Exception as error:
        if not isinstance(error, RuntimeError | OSError | DamagedError) or os.environ.get("LDM_TRACEBACK"):
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return FAILED


def _run(arguments: list[str], work: Do) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return DONE
    if arguments[0] == "--version":
        print(f"ldm-pipelines {__version__}")
        return DONE
    verb, rest = arguments[0], arguments[1:]
    if verb in COMMANDS:
        code: int = importlib.import_module(f"jobs.{verb}").main(rest)
        return code
    options, config = parse_stage(verb, rest)
    if config is None:
        return DONE
    stage = stage_module(verb)
    with contextlib.redirect_stdout(sys.stderr):  # libraries print; stdout is for the report alone
        done = work(stage, config)
    if done.report is not None:  # `serve` ends without one
        show_report(done.report, options.json, getattr(stage, "show", None), done.skipped)
    return int(getattr(done.report, "exit_code", DONE))


def stage_module(verb: str) -> ModuleType:
    """The module jobs.VERB: StageConfig, run(config) -> report, dry_run(config) -> text. Raises RequestError.

    In place of its text, dry_run may return a report whose str() is the text.

    It may have POSITIONAL, the key that arguments without `=` are the value of, and show(report) -> text for a person;
    or FORMS, where a key among the arguments chooses the configuration: {key: (StageConfig, POSITIONAL)}; or KINDS,
    where their first word does: {word: StageConfig}; or SWITCHES, options that stand for another configuration:
    {name: StageConfig}. A stage that can tell has finished(config) -> its report where nothing is left to do, else
    None, and conclude(config) where it is to be told then all the same; and check(config), which raises RequestError
    for what is wrong whatever other stages give it, and wherever it runs.
    """
    if verb not in STAGES:
        near = difflib.get_close_matches(verb, [*STAGES, *COMMANDS], n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the commands are {', '.join([*STAGES, *COMMANDS])}"
        raise RequestError(f"{verb!r}: is no command; {hint}")
    return importlib.import_module(f"jobs.{verb}")


def parse_stage(
    verb: str, arguments: Sequence[str], given: Sequence[tuple[str, Mapping[str, Any]]] = ()
) -> tuple[argparse.Namespace, Config | None]:
    """Options and the configuration of a stage. given: (name, values) that hold over --config, and under key=value.

    None in place of it where nothing is to be run: --help, --print-config and --dry-run are answered here.
    """
    forms, kinds, others = _forms(stage_module(verb)), _kinds(verb), switches(verb)
    parser = Parser(prog=f"ldm {verb}", add_help=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--config", action="append", default=[])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--print-config", action="store_true")
    if any("preview" in model.model_fields for model, _ in forms.values()):
        parser.add_argument("--preview", type="preview={}".format, action="append", dest="named", default=[])
    for name in others:
        parser.add_argument(f"--{name}", action="store_const", const=name, dest="switch", default=None)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args(list(arguments))
    options.kind = _take_kind(verb, kinds, options)
    if options.kind:
        kinds, forms = {options.kind: kinds[options.kind]}, {"": (kinds[options.kind], None)}
    if options.help:
        pages = [_stage_help(f"{verb} {kind}", model, None) for kind, model in kinds.items()]
        pages = pages or [_stage_help(verb, model, main_key) for model, main_key in forms.values()]
        print("\n\n".join(pages + [_stage_help(f"{verb} --{name}", model, None) for name, model in others.items()]))
        return options, None
    if getattr(options, "switch", None):
        forms = {"": (others[options.switch], None)}
    layers = [*((name, load_yaml(find_config(name))) for name in options.config), *given]
    keys = {text.partition("=")[0] for text in options.overrides}.union(*(values for _, values in layers))
    if len(forms) > 1 and not keys & forms.keys():
        raise RequestError(f"ldm {verb}: give one of {', '.join(f'{key}=' for key in forms)}; see 'ldm {verb} --help'")
    model, main_key = next((form for key, form in forms.items() if key in keys), next(iter(forms.values())))
    pairs, plain = _split(options.overrides, main_key)
    config = parse(model, [*layers, ("the command", plain)], [*pairs, *getattr(options, "named", [])])
    if options.print_config:
        print(yaml.safe_dump(config.model_dump(mode="json", by_alias=True), sort_keys=False), end="")
        return options, None
    if options.dry_run:
        planned = stage_module(verb).dry_run(config)
        if isinstance(planned, str):
            print(planned)
        else:
            show_report(planned, options.json, str)
        return options, None
    return options, config


def _forms(stage: ModuleType) -> dict[str, tuple[type[Config], str | None]]:
    """The configurations of a stage, and the main key of each; most have one."""
    forms: dict[str, tuple[type[Config], str | None]] = getattr(stage, "FORMS", {})
    return forms or {"": (stage.StageConfig, getattr(stage, "POSITIONAL", None))}


def _kinds(verb: str) -> dict[str, type[Config]]:
    """The configurations of a stage that the first word of the arguments chooses among."""
    found: dict[str, type[Config]] = getattr(stage_module(verb), "KINDS", {})
    return found


def _take_kind(verb: str, kinds: dict[str, type[Config]], options: argparse.Namespace) -> str | None:
    """Takes the kind out of the arguments. None where the stage has none, or for --help. Raises RequestError."""
    word = next((text for text in options.overrides if "=" not in text), None) if kinds else None
    if word in kinds:
        options.overrides.remove(word)
        return word
    if kinds and not (options.help and word is None):
        near = difflib.get_close_matches(word or "", list(kinds), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"see 'ldm {verb} --help'"
        raise RequestError(f"ldm {verb}{f' {word}' if word else ''}: give one of {', '.join(kinds)}; {hint}")
    return None


def words(options: argparse.Namespace) -> tuple[str, ...]:
    """What stands behind a stage's name beside keys and the common options: its kind, its switch."""
    switch = getattr(options, "switch", None)
    return tuple(word for word in (options.kind, f"--{switch}" if switch else None) if word)


def switches(verb: str) -> dict[str, type[Config]]:
    """Options of a stage that stand for a configuration of their own."""
    found: dict[str, type[Config]] = getattr(stage_module(verb), "SWITCHES", {})
    return found


def _split(arguments: list[str], main_key: str | None) -> tuple[list[str], dict[str, Any]]:
    """(key=value pairs, the value of the main key as the other arguments give it: several where the shell expanded)"""
    if main_key is None:
        return arguments, {}
    plain = [text for text in arguments if "=" not in text]
    values = {main_key: plain[0] if len(plain) == 1 else plain} if plain else {}
    return [text for text in arguments if "=" in text], values


def find_config(name: str) -> Path:
    """A file, or the name of a packaged config. Raises RequestError."""
    packaged = CONFIGS / f"{name}.yaml"
    if Path(name).is_file():
        return Path(name)
    if packaged.is_file():
        return packaged
    names = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"the packaged ones are {', '.join(names)}"
    raise RequestError(f"config={name}: is no file and no packaged config; {hint}")


def show_report(report: Any, as_json: bool, show: Callable[[Any], str] | None = None, skipped: bool = False) -> None:
    """The report on stdout: ONE line of JSON, or a table for a person, which `show` may make."""
    values = report_values(report) | ({SKIPPED: True} if skipped else {})
    if as_json:
        print(json.dumps(values), flush=True)
        return
    if show is not None:
        print(show(report))
        return
    show_values(values)


def report_values(report: Any) -> dict[str, Any]:
    """What is shown of a report."""
    return {k: v for k, v in dataclasses.asdict(report).items() if k != "exit_code"}


def show_values(values: dict[str, Any]) -> None:
    """A report as a table for a person, who has been told its notes already."""
    values = {key: value for key, value in values.items() if key != "notes"}
    width = max(map(len, values))
    for key, value in values.items():
        if isinstance(value, dict) and value and all(isinstance(number, int | float) for number in value.values()):
            print(f"{key}\n" + textwrap.indent(_figures(value), "  "))
        else:
            print(f"{key:<{width}}  {json.dumps(value) if isinstance(value, dict | list | tuple) else value}")


def _figures(numbers: dict[str, float]) -> str:
    """A line for each figure: its interval (_low, _high), and what else is called after it."""
    names = [name for name in numbers if not any(name.startswith(f"{other}_") for other in numbers)]
    width, lines = max(map(len, names)), []
    for name in names:
        beside = {key[len(name) + 1 :]: f"{value:.4g}" for key, value in numbers.items() if key.startswith(f"{name}_")}
        low, high = beside.pop("low", None), beside.pop("high", None)
        interval = "" if low is None else f"[{low}, {high}]"
        rest = ", ".join(f"{key} {value}" for key, value in beside.items())
        lines.append(f"{name:<{width}}  {numbers[name]:<10.4g}  {interval:<24}  {rest}".rstrip())
    return "\n".join(lines)


class Parser(argparse.ArgumentParser):
    """Whose mistakes are RequestErrors."""

    def error(self, message: str) -> Any:
        raise RequestError(f"{message}; see '{self.prog} --help'")


def interrupt(number: int, frame: FrameType | None) -> None:
    """A handler of signals that ends what runs, wherever it is."""
    raise KeyboardInterrupt(number)


def _overview() -> str:
    width = max(map(len, STAGES))
    verbs = "\n".join(f"  {verb:<{width}}  {text}" for verb, text in {**STAGES, **COMMANDS}.items())
    return (
        "usage: ldm COMMAND [--config NAME_OR_FILE] [key=value …] [--json] [--dry-run] [--print-config]\n\n"
        f"{verbs}\n\n"
        "ldm COMMAND --help lists every key with its type, default and meaning.\n"
        f"Packaged configs: {', '.join(sorted(path.stem for path in CONFIGS.glob('*.yaml')))}"
    )


def _stage_help(verb: str, model: type[Config], main_key: str | None) -> str:
    of_its_own = " " in verb or hasattr(stage_module(verb), "FORMS")
    purpose = (model.__doc__ or "").splitlines()[0] if of_its_own else STAGES[verb] + "."
    place = f" {main_key.upper()}" if main_key else ""
    preview = " [--preview FILE]" if "preview" in model.model_fields else ""
    lines = [
        f"usage: ldm {verb}{place} [--config NAME_OR_FILE] [key=value …] [--json] [--dry-run] [--print-config]"
        + preview,
        "",
        purpose[0].upper() + purpose[1:],
        "",
    ]
    for key, kind, default, description, _ in sorted(fields(model), key=lambda row: row[2] != "required"):
        lines.append(f"  {key}  ({kind}; {default if default == 'required' else f'default {default}'})")
        lines += textwrap.wrap(description, 100, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
