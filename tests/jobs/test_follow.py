"""A job's log as it comes, and its report, whatever part of it following has missed."""

import pytest

from jobs.follow import _Log

WHOLE = 'a line\n{"no": "report"\n{"inputs": 5}\nlast words'


@pytest.mark.parametrize("cut", range(len(WHOLE) + 1))
def test_the_report_is_found_however_much_of_the_log_has_come(cut: int, capsys: pytest.CaptureFixture[str]) -> None:
    log = _Log()
    log.add(WHOLE[: cut // 2])
    log.add(WHOLE[cut // 2 : cut])
    log.end(WHOLE)
    assert log.report == '{"inputs": 5}'
    assert capsys.readouterr().err == 'a line\n{"no": "report"\nlast words\n'
