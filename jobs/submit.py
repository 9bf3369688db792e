"""`ldm submit STAGE …`: the same stage as a Ray job. Follows its log, and passes its exit code on."""

import hashlib
import json
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from jobs import cli, entry, package
from jobs.follow import Detached, follow, how_to_follow, stop_line
from jobs.preflight import Cluster, connect
from jobs.ray_token import warn_of_open_doors
from ldm import storage
from ldm.config import Config, RequestError, canonical_json
from pipelines.progress import say

SUBMITTABLE = ("encode", "verify", "train", "sample", "evaluate", "study")
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
STOP_WAIT_S = "300"
"""Seconds between the SIGTERM and the SIGKILL of `ray job stop`: 3 of Ray's own are too few for a checkpoint. The
job's supervisor reads it, and has the environment of the job."""
_FORWARDED = (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_EXPERIMENT_NAME",
    "AWS_ENDPOINT_URL",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    STOP_WAIT,
)
"""Environment that a job gets. No secret is among them: a job's metadata can be read by everyone on the cluster."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SETTINGS = "ldm_settings"


@dataclass(frozen=True)
class Job:
    """What is to run. words: of the command after `ldm STAGE`, such as a study's kind. name: None: derived."""

    verb: str
    config: Config
    words: tuple[str, ...] = ()
    name: str | None = None
    python: str | None = None
    unless_done: bool = False


def main(arguments: Sequence[str]) -> int:
    """Submits one stage; returns the job's exit code. Raises RequestError before anything is sent."""
    parser = cli.Parser(prog="ldm submit", add_help=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--address", default=os.environ.get("RAY_ADDRESS"))
    parser.add_argument("--name", default=None)
    parser.add_argument("--no-wait", action="store_true")
    parser.add_argument("--python", default=None)
    parser.add_argument("stage", nargs="?")
    options, rest = parser.parse_known_args(list(arguments))
    if options.help or options.stage is None:
        print(_usage())
        return cli.DONE
    check_submittable(options.stage)
    stage_options, config = cli.parse_stage(options.stage, rest)
    if config is None:
        return cli.DONE
    if options.address is None:
        raise RequestError("--address: missing; give --address http://HEAD:8265, or set RAY_ADDRESS")
    job = Job(options.stage, config, cli.words(stage_options), options.name, options.python)
    cluster, job_id = submit(options.address, job)
    say(how_to_follow(job_id, options.address))
    if options.no_wait:
        return cli.DONE
    try:
        code, report = follow(cluster.client, job_id, options.address)
    except Detached:
        return cli.INTERRUPTED
    if report is not None and stage_options.json:
        print(json.dumps(report), flush=True)
    elif report is not None:
        cli.show_values(report)
    elif code == cli.DONE:
        say(f"submit: job {job_id} is done, but its log, with its report, could not be read here")
    return code


def check_submittable(verb: str) -> None:
    """Raises RequestError for what is no stage that runs as a job."""
    if verb not in SUBMITTABLE:
        raise RequestError(f"{verb!r}: cannot be submitted; give one of {', '.join(SUBMITTABLE)}")


def submit(address: str, job: Job) -> tuple[Cluster, str]:
    """(the cluster, the id of the job): of a new one, or of the same job where it is pending or runs already.

    Raises RequestError before anything is sent; RuntimeError where the cluster refuses the job.
    """
    if job.name is not None and not _NAME.fullmatch(job.name):
        raise RequestError(f"--name={job.name}: give letters, digits, '.', '_' and '-', at most 100, as in train-first")
    config = package.resolve(job.config)
    environment = {STOP_WAIT: STOP_WAIT_S} | {key: os.environ[key] for key in _FORWARDED if key in os.environ}
    for key, value in environment.items():
        package.check_no_secret(key, value)
    cluster = connect(address)
    warn_of_open_doors(cluster.client.get_address())
    name = job.name or job_name(job.verb, config)
    settings = _hash([job.verb, job.words, config.model_dump(mode="json")])
    attempts = _attempts(cluster.client, name)
    running = next((number for number in sorted(attempts) if not attempts[number].status.is_terminal()), None)
    if running is not None:
        return cluster, _attach(cluster, f"{name}-a{running}", settings)
    job_id = f"{name}-a{max(attempts, default=0) + 1}"
    try:
        _send(cluster, job, config, job_id, {_SETTINGS: settings}, environment)
    except RuntimeError as error:
        # Ray takes an id once, so of two submissions at the same time one wins.
        if "already exists" in str(error):
            return cluster, _attach(cluster, job_id, settings)
        text = " ".join(str(error).split())
        raise RuntimeError(f"--address={address}: does not take job {job_id} ({text[-300:]})") from error
    say(f"submit: job {job_id} on {address}")
    return cluster, job_id


def job_name(verb: str, config: Config) -> str:
    """The same for all jobs that write to one place, with absolute locations: `train-first-1f0c3a9e`."""
    place = next(str(getattr(config, key)) for key in ("destination", "output", "latents") if hasattr(config, key))
    readable = re.sub(r"[^A-Za-z0-9]+", "-", storage.name(place)).strip("-")[:40]
    return "-".join(part for part in (verb, readable, _hash([verb, place])[:8]) if part)


def _attempts(client: Any, name: str) -> dict[int, Any]:
    """The jobs NAME-aN that the cluster knows, by N."""
    pattern, found = re.compile(re.escape(name) + r"-a(\d+)"), {}
    for details in client.list_jobs():
        if match := pattern.fullmatch(details.submission_id or ""):
            found[int(match[1])] = details
    return found


def _attach(cluster: Cluster, job_id: str, settings: str) -> str:
    """Raises RequestError where that job was given other settings: its end would not be ours."""
    details = cluster.client.get_job_info(job_id)
    if (details.metadata or {}).get(_SETTINGS) != settings:
        raise RequestError(
            f"--name={job_id.rpartition('-a')[0]}: job {job_id} is {details.status.value.lower()} with other settings; "
            f"wait for it, or end it by: {stop_line(job_id, cluster.address)}"
        )
    say(f"submit: job {job_id} is {details.status.value.lower()} on {cluster.address} already: attached to it")
    return job_id


def _send(
    cluster: Cluster, job: Job, config: Config, job_id: str, metadata: dict[str, str], environment: dict[str, str]
) -> None:
    from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE

    python = job.python or (shlex.quote(sys.executable) if _is_this_machine(cluster.address) else "python3")
    options = [entry.UNLESS_DONE] if job.unless_done else []
    command = [python, "-m", "jobs.entry", *options, job.verb, *job.words, "--config", "config.yaml", "--json"]
    where = cluster.place(job.verb, config)
    with tempfile.TemporaryDirectory() as folder:
        size = package.pack(Path(folder), config, GCS_STORAGE_MAX_SIZE)
        say(f"submit: sends {storage.readable(size)} of code")
        cluster.client.submit_job(
            entrypoint=" ".join(command),
            submission_id=job_id,
            metadata=metadata,
            runtime_env={"working_dir": folder, "env_vars": environment},
            **where,
        )


def _hash(value: Any) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def _is_this_machine(address: str) -> bool:
    host = urlparse(address).hostname if "://" in address else address.rsplit(":", 1)[0]
    return host in ("127.0.0.1", "localhost", "::1", "auto", "local")


def _usage() -> str:
    return (
        "usage: ldm submit STAGE [--address URL] [--name NAME] [--no-wait] [--python PROGRAM] "
        "[the options and keys of the stage]\n\n"
        f"Runs a stage ({', '.join(SUBMITTABLE)}) as a Ray job. The address is the cluster's dashboard\n"
        "(http://HEAD:8265), or RAY_ADDRESS. Its id is NAME-aN, the N-th attempt; NAME is made of the stage and the\n"
        "place that it writes to unless given. The same job that runs already is followed, not begun again. Its log\n"
        "is followed; Ctrl-C detaches and leaves the job running. The exit code is the job's."
    )
