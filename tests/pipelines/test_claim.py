"""Who may write an output: the command that began last, and the one before hears of it."""

from pathlib import Path

import pytest

from ldm import storage
from pipelines.train import claim
from pipelines.train.claim import OWNER_FILE, Claim
from tests.pipelines.mlflow_server import wait_until


@pytest.fixture(params=["disk", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(claim, "_LOOK_EVERY_S", 0.01)
    return str(tmp_path) if request.param == "disk" else f"{request.getfixturevalue('s3')}/claim"


def test_the_one_before_hears_of_it_and_the_last_one_goes_on(output: str) -> None:
    with Claim(output) as first:
        first.check()
        with Claim(output) as second:
            wait_until(lambda: first._other)
            with pytest.raises(RuntimeError, match=rf"^output={output}: another `ldm train` has begun here at 2.* on "):
                first.check()
            second.check()
    with Claim(output) as again:  # after the end of both
        again.check()


def test_what_is_no_claim_stops_nobody(output: str) -> None:
    with Claim(output) as only:
        for text in (b"", b"[]", b'{"token": ', b"\xff"):
            storage.write_bytes(storage.join(output, OWNER_FILE), text)
            storage.read_bytes(storage.join(output, OWNER_FILE))
        with Claim(output):
            wait_until(lambda: only._other)  # its thread still looks
