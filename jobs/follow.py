"""A Ray job seen from outside: its log as it comes, its report, its exit code."""

import asyncio
import json
import signal
import sys
import time
from typing import Any

from jobs import cli
from pipelines.progress import say


class Detached(KeyboardInterrupt):
    """Ctrl-C while a job is followed: it goes on."""


def follow(client: Any, job_id: str, address: str) -> tuple[int, dict[str, Any] | None]:
    """Prints the job's log on stderr, from its beginning; returns (exit code, its report where it gave one).

    Ctrl-C detaches: it is said how to follow and to stop the job, and Detached is raised.
    """
    # asyncio's own handler of Ctrl-C cancels a task and no more, and what is awaited then may make nothing of it.
    signal.signal(signal.SIGINT, cli.interrupt)
    try:
        log = _Log()
        asyncio.run(_tail(client, job_id, log))
        while not (status := client.get_job_status(job_id)).is_terminal():
            time.sleep(0.5)
        log.end(client.get_job_logs(job_id))
    except KeyboardInterrupt:
        say(f"submit: detached, the job goes on\n{how_to_follow(job_id, address)}")
        raise Detached from None
    code = client.get_job_info(job_id).driver_exit_code
    say(f"submit: job {job_id} {status.value.lower()}")
    if code is None:
        code = {"SUCCEEDED": cli.DONE, "STOPPED": cli.TERMINATED}.get(status.value, cli.FAILED)
    return int(code), json.loads(log.report) if log.report else None


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
    """Prints what comes of a job's log but the report, which is one line of JSON; empty where the job gave none."""

    def __init__(self) -> None:
        self.report = ""
        self._taken, self._held = 0, ""  # characters that came; a line that is not whole yet

    def add(self, chunk: str) -> None:
        self._taken += len(chunk)
        *lines, self._held = (self._held + chunk).split("\n")
        for line in lines:
            self._take(line)

    def end(self, whole: str) -> None:
        """whole: the log of the job that has ended. Following it may end before its last lines have come."""
        self.add(whole[self._taken :])
        if self._held:
            self._take(self._held)

    def _take(self, line: str) -> None:
        if line.startswith("{") and line.endswith("}"):
            self.report = line
        else:
            print(line, file=sys.stderr, flush=True)
