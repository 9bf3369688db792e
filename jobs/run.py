"""`ldm run PIPELINE.yaml`: stages one after the other, each skipped where its output is there and fits."""

import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jobs import cli
from jobs.follow import Detached, follow
from jobs.outcome import skip
from jobs.pipeline import Pipeline, Step, check_inputs, read_pipeline
from jobs.submit import Job, submit
from ldm.config import Config, RequestError
from pipelines import cluster
from pipelines.progress import say

Done = tuple[int, dict[str, Any]]
"""The exit code of a step, and what is said of it: step, skipped, report."""


def _found(name: str) -> Path:
    """The file, or a packaged config. Raises RequestError."""
    try:
        return cli.find_config(name)
    except RequestError:
        raise RequestError(f"pipeline={name}: is no file; give one, as in: ldm run pipeline.yaml") from None


def main(arguments: Sequence[str]) -> int:
    """Runs the steps of a pipeline; returns the exit code of the one that ends it. Raises RequestError."""
    parser = cli.Parser(prog="ldm run", add_help=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--address", default=None)
    parser.add_argument("--python", default=None)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("pipeline", nargs="?")
    options = parser.parse_args(list(arguments))
    if options.help:
        print(_usage())
        return cli.DONE
    if options.pipeline is None:
        raise RequestError("pipeline: missing; give a YAML file of steps, as in: ldm run pipeline.yaml")
    pipeline = read_pipeline(_found(options.pipeline))
    configs = pipeline.configs()  # all of them, before the first begins
    if options.address is None:
        check_inputs(pipeline, configs)
    if options.dry_run:
        print(_plan(pipeline, configs, options.address))
        return cli.DONE
    with contextlib.ExitStack() as stack:
        if options.address is None:

            def work(step: Step, config: Config) -> Done:
                return _run_here(step, config, stack)
        else:

            def work(step: Step, config: Config) -> Done:
                return _run_there(step, config, options.address, options.python)

        return _run(pipeline, work, options.json, f"ldm run {' '.join(arguments)}")


def _run(pipeline: Pipeline, work: Callable[[Step, Config], Done], as_json: bool, command: str) -> int:
    """Does each step with what those before it gave."""
    done: list[dict[str, Any]] = []
    code = cli.DONE
    for number, step in enumerate(pipeline.steps, 1):
        say(f"run: {number}/{len(pipeline.steps)} {step.title}")
        try:
            code, said = work(step, pipeline.config(step))
        except Detached:
            return cli.INTERRUPTED
        except BaseException:
            say(f"run: ended in {step.title}; the same command goes on there: {command}")
            raise
        done.append(said)
        if code != cli.DONE:
            say(f"run: {step.title} ended with {code}; the same command goes on there: {command}")
            break
        pipeline.gave(step, said["report"])
        if not as_json:
            cli.show_values({"step": step.title, "skipped": said["skipped"], **said["report"]})
    if as_json:
        print(json.dumps({"steps": done}), flush=True)
    return code


def _run_here(step: Step, config: Config, stack: contextlib.ExitStack) -> Done:
    """All steps share one Ray session, which the first one that has work begins."""
    stage = cli.stage_module(step.verb)
    with contextlib.redirect_stdout(sys.stderr):
        done = skip(stage, config)
        if done is not None:
            report, skipped = done.report, True
        else:
            stack.enter_context(cluster.ray_session())
            report, skipped = stage.run(config), False
    said = {"step": step.title, "skipped": skipped, "report": cli.report_values(report)}
    return int(getattr(report, "exit_code", cli.DONE)), said


def _run_there(step: Step, config: Config, address: str, python: str | None) -> Done:
    """As a Ray job, which sees itself whether anything is left to do."""
    found, job_id = submit(address, Job(step.verb, config, step.words, python=python, unless_done=True))
    code, report = follow(found.client, job_id, address)
    if report is None and code == cli.DONE:
        raise RuntimeError(f"job {job_id} ended without a report")
    values = {key: value for key, value in (report or {}).items() if key != cli.SKIPPED}
    return code, {"step": step.title, "skipped": bool((report or {}).get(cli.SKIPPED)), "report": values}


def _plan(pipeline: Pipeline, configs: Sequence[Config], address: str | None) -> str:
    """What each step would do, as far as that is known before those ahead of it are done."""
    lines, before = [], ""
    for step, config in zip(pipeline.steps, configs, strict=True):
        stage = cli.stage_module(step.verb)
        if address is not None:
            text = f"as a Ray job on {address}, which sees whether anything is left to do"
        elif before:
            text = f"is looked at when {before} is done; its keys are right"
        elif hasattr(stage, "finished") and stage.finished(config) is not None:
            text = "skipped, its output is there and fits"
        else:
            text, before = str(stage.dry_run(config)), step.title
        lines.append(f"{step.title}: {text}")
    return "\n".join(lines)


def _usage() -> str:
    return (
        "usage: ldm run PIPELINE.yaml [--address URL] [--python PROGRAM] [--json] [--dry-run]\n\n"
        "Runs the steps of a YAML file, in their order. A key of it is a stage (encode, train, evaluate; also\n"
        "verify, sample, study KIND), its values are that stage's own keys, and `config` a packaged config or a file\n"
        "that they hold over. What a step leaves out it takes from those before it: latents from encode's\n"
        "destination, reference from its source, snapshot from train. encode, train and evaluate are skipped where\n"
        "their output is there and fits. With --address each step is a Ray job, as of `ldm submit`."
    )
