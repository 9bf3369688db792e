"""A cold cache against plain parallel range GETs of the same bytes: `python tests/bench/bench_cache.py [LINK …]`.

64 shards of 16 MiB on a moto server in a process of its own; all sides fetch eight at a time, into files. They take
turns, and the median of their ratios is printed as JSON with all rounds, the faster plain way being the measure.

LINK: MiB/s of one connection, as the kernel paces it; 0, which is the default, for no limit: then the CPU is the limit,
and the hash, which the plain ways do not take, is a part of what is measured. An S3 connection gives about 60.
"""

import contextlib
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config

from ldm import storage
from ldm.latents.cache import Cache, RemoteFile

SHARDS, BYTES, CONNECTIONS, ROUNDS = 64, 16 << 20, 8, 5
SERVER = (
    "import socket, sys, time\n"
    "from moto.server import ThreadedMotoServer\n"
    "server = ThreadedMotoServer(ip_address='127.0.0.1', port=0, verbose=False)\n"
    "server.start()\n"
    "pace = int(sys.argv[1]) << 20\n"
    "if pace:\n"
    "    server._server.socket.setsockopt(socket.SOL_SOCKET, 47, pace)\n"  # SO_MAX_PACING_RATE; connections inherit it
    "print(server.get_host_and_port()[1], flush=True)\n"
    "time.sleep(1e6)\n"
)


@contextlib.contextmanager
def s3_server(link: int) -> Iterator[None]:
    """A moto server in a process of its own, which the `AWS_*` variables point to."""
    command = [sys.executable, "-c", SERVER, str(link)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            assert server.stdout
            endpoint = f"http://127.0.0.1:{int(server.stdout.readline())}"
            keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
            os.environ.update(AWS_ENDPOINT_URL=endpoint, **keys)
            urllib.request.urlopen(f"{endpoint}/moto-api/").close()
            yield
        finally:
            server.kill()


def upload() -> list[RemoteFile]:
    client, files = boto3.client("s3"), []
    client.create_bucket(Bucket="bucket")
    for number in range(SHARDS):
        data = os.urandom(BYTES)
        client.put_object(Bucket="bucket", Key=f"{number}.tar", Body=data)
        files.append(RemoteFile(f"s3://bucket/{number}.tar", hashlib.sha256(data).hexdigest(), BYTES))
    return files


def cached(files: list[RemoteFile], folder: Path) -> None:
    cache = Cache(folder=folder)
    cache.prefetch(files)
    for file in files:
        cache.get(file)


def with_boto3(files: list[RemoteFile], folder: Path) -> None:
    client = boto3.client("s3", config=Config(max_pool_connections=CONNECTIONS))

    def get(file: RemoteFile) -> None:
        key = storage.name(file.url)
        answer = client.get_object(Bucket="bucket", Key=key, Range=f"bytes=0-{BYTES - 1}")
        (folder / key).write_bytes(answer["Body"].read())

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        list(pool.map(get, files))


def with_s3fs(files: list[RemoteFile], folder: Path) -> None:
    fs, _ = storage.open_fs(files[0].url)  # as the cache opens it

    def get(file: RemoteFile) -> None:
        (folder / storage.name(file.url)).write_bytes(fs.cat_file(file.url, start=0, end=BYTES))

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        list(pool.map(get, files))


def rate(way: Callable[[list[RemoteFile], Path], None], files: list[RemoteFile]) -> float:
    """MiB/s into an empty folder."""
    folder = Path(tempfile.mkdtemp())
    try:
        os.sync()  # what the round before has written
        began = time.perf_counter()
        way(files, folder)
        return SHARDS * BYTES / 2**20 / (time.perf_counter() - began)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(link: int) -> dict[str, Any]:
    with s3_server(link):
        files = upload()
        ways = {"cache": cached, "boto3": with_boto3, "s3fs": with_s3fs}
        rounds = []
        for number in range(-1, ROUNDS):  # the first one warms up
            order = sorted(ways, key=lambda name: (list(ways).index(name) + number) % len(ways))
            rates = {name: rate(ways[name], files) for name in order}
            print({name: round(value) for name, value in rates.items()}, file=sys.stderr, flush=True)
            if number >= 0:
                rounds.append(rates)
    medians = {name: statistics.median(rates[name] for rates in rounds) for name in ways}
    return {
        **{f"{name} MiB/s": round(value) for name, value in medians.items()},
        **{
            f"cache / {name}": round(statistics.median(r["cache"] / r[name] for r in rounds), 3)
            for name in ("boto3", "s3fs")
        },
        "rounds": [{name: round(value) for name, value in rates.items()} for rates in rounds],
    }


if __name__ == "__main__":
    for argument in sys.argv[1:] or ["0"]:
        print(json.dumps({f"link {argument}": measure(int(argument))}), flush=True)
