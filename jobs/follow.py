"""A Ray job seen from outside: its log as it comes, its report, its exit code."""

import asyncio
import json
import signal
import sys
import time
from typing import Any

import aiohttp  # Ray's client follows logs with it

from jobs import cli
from pipelines.progress import say

_AWAY_S = 300.0
"""Seconds for which a cluster that does not answer is asked again: a tunnel, a laptop or a dashboard comes back."""


class Detached(KeyboardInterrupt):
    """Ctrl-C while a job is followed: it goes on."""


def follow(client: Any, job_id: str, address: str) -> tuple[int, dict[str, Any] | None]:
    """Prints the job's log on stderr, from its beginning; returns (exit code, its report where it gave one).

    Ctrl-C detaches: it is said how to follow and to stop the job, and Detached is raised. Raises RuntimeError where
    the cluster answers no more, and the job's end is not known.
    """
    # asyncio's own handler of Ctrl-C cancels a task and no more, and what is awaited then may make nothing of it.
    signal.signal(signal.SIGINT, cli.interrupt)
    log = _Log()
    try:
        details = _follow_to_its_end(client, job_id, log)
    except KeyboardInterrupt:
        say(f"submit: detached, the job goes on\n{how_to_follow(job_id, address)}")
        raise Detached from None
    except TimeoutError as error:
        raise RuntimeError(
            f"--address={address}: does not answer any more ({error}), and how job {job_id} ends is not known\n"
            f"{how_to_follow(job_id, address)}"
        ) from None
    code, status = details.driver_exit_code, details.status.value
    # Where it never began, or was lost with its node, only Ray can say why.
    why = (
        f": {' '.join(details.message.split())[-300:]}"
        if code is None and status == "FAILED" and details.message
        else ""
    )
    say(f"submit: job {job_id} {status.lower()}{why}")
    if code is None:
        code = {"SUCCEEDED": cli.DONE, "STOPPED": cli.TERMINATED}.get(status, cli.FAILED)
    return int(code), log.report


def _follow_to_its_end(client: Any, job_id: str, log: "_Log") -> Any:
    """Ray's details of the job that has ended. Raises TimeoutError where the cluster has not answered for long."""
    lost, answered = "", time.monotonic()
    while True:
        try:
            log.begin()
            asyncio.run(_tail(client, job_id, log))
            details, lost, answered = client.get_job_info(job_id), "", time.monotonic()
            if details.status.is_terminal():
                break
        except (RuntimeError, OSError, aiohttp.ClientError) as error:
            if not lost:
                say("submit: the cluster does not answer, the job goes on; asks again")
            lost = " ".join(str(error).split())[:200]
            if time.monotonic() - answered > _AWAY_S:
                raise TimeoutError(lost) from None
        time.sleep(0.5)
    try:
        log.end(client.get_job_logs(job_id))
    except (RuntimeError, OSError) as error:  # its node is gone, perhaps, and how it ended is known
        say(f"submit: the end of the log cannot be read ({' '.join(str(error).split())[:200]})")
    return details


def how_to_follow(job_id: str, address: str) -> str:
    """For a person who goes on by hand: how to follow a job and how to stop it."""
    follow_line = f"RAY_AUTH_MODE=token ray job logs --follow --address {address} {job_id}"
    return f"  follow: {follow_line}\n  stop:   {stop_line(job_id, address)}"


def stop_line(job_id: str, address: str) -> str:
    return f"RAY_AUTH_MODE=token ray job stop --address {address} {job_id}"


async def _tail(client: Any, job_id: str, log: "_Log") -> None:
    async for chunk in client.tail_job_logs(job_id):
        log.add(chunk)


class _Log:
    """Prints what comes of a job's log but the report, a line that is a JSON object; None where the job gave none."""

    def __init__(self) -> None:
        self.report: dict[str, Any] | None = None
        self._taken, self._held = 0, ""  # characters that came; a line that is not whole yet
        self._again = 0  # characters that come once more

    def begin(self) -> None:
        """The log comes from its beginning, perhaps not for the first time."""
        self._again = self._taken

    def add(self, chunk: str) -> None:
        new = chunk[self._again :]
        self._again = max(0, self._again - len(chunk))
        self._taken += len(new)
        *lines, self._held = (self._held + new).split("\n")
        for line in lines:
            self._take(line)

    def end(self, whole: str) -> None:
        """whole: the log of the job that has ended. Following it may end before its last lines have come."""
        self.begin()
        self.add(whole)
        if self._held:
            self._take(self._held)

    def _take(self, line: str) -> None:
        try:
            report = json.loads(line) if line.startswith("{") and line.endswith("}") else None
        except ValueError:  # somebody's print
            report = None
        if report is None:
            print(line, file=sys.stderr, flush=True)
        else:
            self.report = report
