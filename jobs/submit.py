"""`ldm submit STAGE …`: the same stage as a Ray job. Follows its log, and passes its exit code on."""

import asyncio
import importlib.util
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import yaml

import ldm
from jobs import cli
from ldm import storage
from ldm.autoencoder import is_name
from ldm.config import Config, RequestError, fields
from pipelines.progress import say

SUBMITTABLE = ("encode", "verify", "train", "sample", "evaluate", "study")
_PACKAGES = ("ldm", "pipelines", "jobs")
_FORWARDED = (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_EXPERIMENT_NAME",
    "AWS_ENDPOINT_URL",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
)
"""Environment that a job gets. No secret is among them: a job's metadata can be read by everyone on the cluster."""


def main(arguments: Sequence[str]) -> int:
    """Submits one stage; returns the job's exit code. Raises RequestError before anything is sent."""
    parser = cli.Parser(prog="ldm submit", add_help=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--address", default=os.environ.get("RAY_ADDRESS"))
    parser.add_argument("--no-wait", action="store_true")
    parser.add_argument("--python", default=None)
    parser.add_argument("stage", nargs="?")
    options, rest = parser.parse_known_args(list(arguments))
    if options.help or options.stage is None:
        print(_usage())
        return cli.DONE
    if options.stage not in SUBMITTABLE:
        raise RequestError(f"{options.stage!r}: cannot be submitted; give one of {', '.join(SUBMITTABLE)}")
    stage_options, config = cli.parse_stage(options.stage, rest)
    if config is None:
        return cli.DONE
    if options.address is None:
        raise RequestError("--address: missing; give --address http://HEAD:8265, or set RAY_ADDRESS")
    python = options.python or (sys.executable if _is_this_machine(options.address) else "python3")
    kind = f" {stage_options.kind}" if stage_options.kind else ""
    switch = f" --{stage_options.switch}" if getattr(stage_options, "switch", None) else ""
    client = _connect(options.address)
    job_id = f"ldm-{options.stage}-{time.strftime('%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"
    with tempfile.TemporaryDirectory() as folder:
        _pack(Path(folder), config)
        client.submit_job(
            entrypoint=f"{python} -m jobs.{options.stage}{kind}{switch} --config config.yaml --json",
            submission_id=job_id,
            runtime_env={
                "working_dir": folder,
                "env_vars": {name: os.environ[name] for name in _FORWARDED if name in os.environ},
            },
        )
    say(f"submit: job {job_id} on {options.address}")
    if options.no_wait:
        say(_how_to_follow(job_id, options.address))
        return cli.DONE
    try:
        return _follow(client, job_id, stage_options.json)
    except KeyboardInterrupt:
        say(f"submit: detached, the job goes on\n{_how_to_follow(job_id, options.address)}")
        return cli.INTERRUPTED


def _connect(address: str) -> Any:
    """A job client. Raises RequestError where no cluster answers, or it does not take our token."""
    # Ray 2.60 turns token authentication on for `ray start --head`; the client must be told to use its token.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    from ray.job_submission import JobSubmissionClient

    try:
        client = JobSubmissionClient(address)
        client.get_version()
        return client
    except Exception as error:  # requests, Ray and its RPC layer each have their own
        text = " ".join(str(error).split())[:200]
        raise RequestError(
            f"--address={address}: no Ray cluster takes the job ({text}); "
            "give its dashboard as http://HEAD:8265, with the cluster's token in ~/.ray/auth_token or RAY_AUTH_TOKEN"
        ) from None


def _pack(folder: Path, config: Config) -> None:
    """This very code and the resolved configuration: what the job's workers run and read."""
    root = Path(str(ldm.__file__)).parent.parent
    for package in [root / name for name in _PACKAGES] + _own_denoiser(config):
        if package.is_dir():
            shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(package, folder / package.name)
    values = _with_absolute_locations(config).model_dump(mode="json")
    (folder / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False))


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
    return (key == "autoencoder" and is_name(text)) or (key == "snapshot" and text.startswith("models:/"))


def _absolute(text: str, key: str) -> str:
    """A relative path made absolute, of a comma set each one; URLs as they stand."""
    parts = storage.split_commas(text) if key in ("source", "reference", "pictures") else [text]
    return ",".join(storage.absolute(part) for part in parts)


def _follow(client: Any, job_id: str, as_json: bool) -> int:
    """Prints the job's log on stderr and its report on stdout; returns its exit code."""
    # asyncio's own handler of Ctrl-C cancels a task and no more, and what is awaited then may make nothing of it.
    signal.signal(signal.SIGINT, cli.interrupt)
    report = asyncio.run(_print_log(client, job_id))
    while not (status := client.get_job_status(job_id)).is_terminal():
        time.sleep(0.5)
    code = client.get_job_info(job_id).driver_exit_code
    if report and as_json:
        print(report, flush=True)
    elif report:
        cli.show_values(json.loads(report))
    say(f"submit: job {job_id} {status.value.lower()}")
    if code is None:
        return cli.DONE if status.value == "SUCCEEDED" else cli.FAILED
    return int(code)


async def _print_log(client: Any, job_id: str) -> str:
    """Prints all but the report, one line of JSON, which it returns; nothing where the job gave none."""
    held = report = ""
    async for chunk in client.tail_job_logs(job_id):
        *lines, held = (held + chunk).split("\n")
        for line in [*lines]:
            if line.startswith("{") and line.endswith("}"):
                report = line
            else:
                print(line, file=sys.stderr, flush=True)
    if held.startswith("{") and held.endswith("}"):
        return held
    print(held, file=sys.stderr, end="", flush=True)
    return report


def _how_to_follow(job_id: str, address: str) -> str:
    prefix = f"RAY_AUTH_MODE=token ray job {{}} --address {address} {job_id}"
    return f"  follow: {prefix.format('logs --follow')}\n  stop:   {prefix.format('stop')}"


def _is_this_machine(address: str) -> bool:
    host = urlparse(address).hostname if "://" in address else address.rsplit(":", 1)[0]
    return host in ("127.0.0.1", "localhost", "::1", "auto", "local")


def _usage() -> str:
    return (
        "usage: ldm submit STAGE [--address URL] [--no-wait] [--python PROGRAM] [the options and keys of the stage]\n\n"
        f"Runs a stage ({', '.join(SUBMITTABLE)}) as a Ray job. The address is the cluster's dashboard\n"
        "(http://HEAD:8265), or RAY_ADDRESS. Its log is followed; Ctrl-C detaches and leaves the job running.\n"
        "The exit code is the job's."
    )
