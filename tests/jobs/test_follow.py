"""A job's log as it comes, whatever part of it following has missed; its report; a cluster that is away."""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from jobs import follow as module
from jobs.follow import _Log, follow

WHOLE = 'a line\n{"no": "report"\n{\'no\': 1}\n{"inputs": 5}\nlast words'
SAID = 'a line\n{"no": "report"\n{\'no\': 1}\nlast words\n'


@pytest.mark.parametrize("cut", range(len(WHOLE) + 1))
def test_the_report_is_found_however_much_of_the_log_has_come(cut: int, capsys: pytest.CaptureFixture[str]) -> None:
    log = _Log()
    log.begin()
    log.add(WHOLE[: cut // 2])
    log.add(WHOLE[cut // 2 : cut])
    log.begin()  # the connection was lost: all of it comes again
    log.add(WHOLE[: cut // 3])
    log.add(WHOLE[cut // 3 : cut])
    log.end(WHOLE)
    assert log.report == {"inputs": 5}
    assert capsys.readouterr().err == SAID


@dataclass
class Job:
    """A cluster's answers about one job: each look at it is answered, or is an error; then it has ended."""

    looks: list[Exception | None]
    status: str = "SUCCEEDED"
    code: int | None = 0
    message: str = ""
    log: str | Exception = WHOLE

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        yield WHOLE[: 9 + len(self.looks)]
        if self.looks and (error := self.looks.pop(0)):
            raise error

    def get_job_info(self, job_id: str) -> Any:
        status = SimpleNamespace(value=self.status, is_terminal=lambda: not self.looks)
        return SimpleNamespace(status=status, driver_exit_code=self.code, message=self.message)

    def get_job_logs(self, job_id: str) -> str:
        if isinstance(self.log, Exception):
            raise self.log
        return self.log


LOST = RuntimeError("WebSocket connection closed unexpectedly with close code 1006")


def test_a_lost_connection_is_no_failed_job(capsys: pytest.CaptureFixture[str]) -> None:
    code, report = follow(Job([None, LOST, ConnectionError("refused"), None]), "train-a1", "http://head:8265")
    assert (code, report) == (0, {"inputs": 5})
    said = capsys.readouterr().err
    assert said.count("submit: the cluster does not answer, the job goes on; asks again\n") == 1
    assert "".join(line for line in said.splitlines(True) if not line.startswith("submit: ")) == SAID


def test_a_cluster_that_stays_away_is_said_with_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_AWAY_S", 0.3)
    with pytest.raises(RuntimeError) as caught:
        follow(Job([LOST] * 9), "train-a1", "http://head:8265")
    first, *rest = str(caught.value).splitlines()
    assert first.startswith("--address=http://head:8265: does not answer any more (WebSocket connection closed")
    assert first.endswith("), and how job train-a1 ends is not known")
    assert "ray job logs --follow --address http://head:8265 train-a1" in rest[0] and len(rest) == 2


def test_why_a_job_never_began_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    job = Job([], "FAILED", None, "Job supervisor actor failed to start\nwithin 900 seconds", "")
    assert follow(job, "sample-a1", "http://head:8265") == (1, None)
    said = "submit: job sample-a1 failed: Job supervisor actor failed to start within 900 seconds\n"
    assert capsys.readouterr().err.endswith(said)


def test_a_log_that_is_gone_hides_no_end(capsys: pytest.CaptureFixture[str]) -> None:
    assert follow(Job([], "FAILED", 3, log=RuntimeError("500: its node is gone")), "a1", "http://head:8265") == (
        3,
        None,
    )
    said = capsys.readouterr().err
    assert "submit: the end of the log cannot be read (500: its node is gone)\n" in said
    assert said.endswith("submit: job a1 failed\n") and json.dumps({"inputs": 5}) not in said
