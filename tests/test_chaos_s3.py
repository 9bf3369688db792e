"""The proxy that harms S3 requests does what it says, the same on each run."""

import http.client
import os
import subprocess
import sys

import boto3
import pytest

from tests.chaos_s3 import KINDS

BODY = b"0123456789" * 100


def get(chaos, path):
    connection = http.client.HTTPConnection(chaos.endpoint.removeprefix("http://"), timeout=5)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


@pytest.fixture
def signed(chaos_s3):
    """(proxy, path with a query that is signed) of an object."""
    client = boto3.client("s3", endpoint_url=chaos_s3.endpoint)
    client.put_object(Bucket="bucket", Key="chaos/x", Body=BODY)
    url = client.generate_presigned_url("get_object", Params={"Bucket": "bucket", "Key": "chaos/x"})
    return chaos_s3, url.removeprefix(chaos_s3.endpoint)


def test_each_kind_of_fault(signed):
    chaos, path = signed
    assert get(chaos, path) == (200, BODY)
    answers = (("error", 500, b"InternalError"), ("busy", 503, b"SlowDown"), ("expired", 403, b"ExpiredToken"))
    for kind, status, code in answers:
        chaos.rage(1.0, kinds=(kind,))
        found, body = get(chaos, path)
        assert found == status and b"<Code>" + code in body
    for kind in ("reset", "lost"):
        chaos.rage(1.0, kinds=(kind,))
        with pytest.raises(ConnectionError):
            get(chaos, path)
    for kind, error in (("broken", ConnectionResetError), ("truncated", http.client.IncompleteRead)):
        chaos.rage(1.0, kinds=(kind,))
        with pytest.raises(error):
            get(chaos, path)
        assert chaos.counts == {"GET": 1, kind: 1, "bytes_in": 0, "bytes_out": len(BODY)}
    chaos.rage(1.0, kinds=("slow",), delay=0.1)
    assert get(chaos, path) == (200, BODY)


def test_while_it_is_down_nobody_listens_and_no_connection_stands(signed):
    chaos, path = signed
    kept = http.client.HTTPConnection(chaos.endpoint.removeprefix("http://"), timeout=5)
    kept.request("GET", path)
    assert kept.getresponse().read() == BODY
    with chaos.down():
        with pytest.raises(ConnectionRefusedError):
            get(chaos, path)
        with pytest.raises(ConnectionError):
            kept.request("GET", path)
            kept.getresponse()
    assert get(chaos, path) == (200, BODY)
    kept.close()


def test_a_lost_request_was_done_and_a_reset_one_was_not(chaos_s3, s3):
    direct = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    for kind, done in (("lost", True), ("error", True), ("reset", False), ("busy", False)):
        chaos_s3.rage(1.0, kinds=(kind,), first=1, only=lambda method, path: method == "PUT")
        direct.put_object(Bucket="bucket", Key=f"chaos/{kind}", Body=BODY)  # boto repeats it
        assert chaos_s3.counts[kind] == 1 and chaos_s3.counts["PUT"] == 2
        assert chaos_s3.counts["bytes_in"] == len(BODY) * (2 if done else 1)


def test_faults_depend_on_seed_and_number_alone(chaos_s3):
    def draw(seed):
        chaos_s3.rage(0.3, seed=seed)
        return [chaos_s3.fault("GET", "/") for _ in range(400)]

    faults = draw(1)
    assert faults == draw(1) != draw(2)
    assert 80 < sum(map(bool, faults)) < 160 and {*faults} == {"", *KINDS}


def test_a_process_that_starts_now_meets_the_proxy(chaos_s3, s3):
    code = f"from ldm import storage; assert not storage.exists('{s3}/none')"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert chaos_s3.counts["HEAD"] == 1
