"""Decoding in other processes: the same views, and a picture that hangs or crashes costs itself alone."""

import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path

import numpy as np
import psutil
import pytest

from ldm import decoding
from ldm.decoding import DecoderPool
from ldm.images import BadPicture, Buckets, PictureRules, TooSmall, views
from tests.ldm.picturing import png_file, png_header
from tests.pictures import encoded, picture
from tests.processes import named

ROOT = Path(__file__).resolve().parents[2]
RULES = PictureRules((32,))
GOOD = encoded(picture(0, 60, 50), "JPEG")
LIMIT = 120.0  # of a picture that is to be decoded in full, however busy the machine is


@pytest.fixture(scope="module")
def slow() -> bytes:
    """A picture of seconds: 129 million pixels, some of them transparent, in a few KiB."""
    side = 11_384
    return png_file(side, side, 1, 0, [bytes(side // 8)] * side, (b"tRNS", b"\0\1"))


def children() -> list[psutil.Process]:
    """The decoder processes of this one, those that ended aside."""
    return named(f"{sys.executable} -P -m ldm.decoding")


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE  # nobody may be there to collect an orphan
    except psutil.NoSuchProcess:
        return True


def same(found, expected) -> bool:
    (made, original), (wanted, wanted_original) = found, expected
    return original == wanted_original and all(
        np.array_equal(a.pixels, b.pixels)
        and (a.pixels.dtype, a.pixels.shape, a.box, a.flipped) == (b.pixels.dtype, b.pixels.shape, b.box, b.flipped)
        for a, b in zip(made, wanted, strict=True)
    )


@pytest.mark.parametrize(
    "rules",
    [
        RULES,
        PictureRules((64, 32), flip=True),
        PictureRules((128, 64), Buckets(step=16, max_ratio=3), (10, 20, 30), 5, True),
    ],
    ids=["plain", "sizes", "all"],
)
def test_views_are_those_of_this_process(rules):
    transparent = picture(3, 300, 111)
    transparent.putalpha(100)
    data = [GOOD, encoded(transparent), encoded(picture(1, 33, 200), "GIF"), encoded(picture(2, 7, 7), "TIFF")]
    with DecoderPool(1, rules, LIMIT) as pool:
        for one in data:
            made, original = pool.submit(one).result()
            assert same((made, original), views(one, rules))
            assert all(v.pixels.flags.writeable and v.pixels.flags.c_contiguous for v in made)
            assert isinstance(original, tuple) and all(isinstance(v.box, tuple) for v in made)


def test_futures_keep_their_pictures():
    data = [encoded(picture(n, 20 + 13 * (n * 7 % 40), 30)) for n in range(40)]
    with DecoderPool(3, RULES, LIMIT) as pool:
        futures = [pool.submit(one) for one in data]
        assert all(same(future.result(), views(one, RULES)) for future, one in zip(futures, data, strict=True))
        assert 1 <= len(children()) <= 3


HOSTILE = {
    "truncated": GOOD[: len(GOOD) // 2],
    "bomb": png_header(12_000, 12_000),
    "greater bomb": png_header(60_000, 60_000),
    "garbage": np.random.default_rng(0).bytes(100_000),
    "empty": b"",
    "zeros": bytes(1000),
    "text": b"no picture at all\n" * 9,
    "too small": encoded(picture(0, 9, 40)),
}


def test_bad_pictures_are_those_of_this_process():
    rules = PictureRules((32,), min_size=10)
    with DecoderPool(1, rules, LIMIT) as pool:
        for name, data in HOSTILE.items():
            with pytest.raises(BadPicture) as expected:
                views(data, rules)
            with pytest.raises(BadPicture) as found:
                pool.submit(data).result()
            assert (str(found.value), type(found.value)) == (str(expected.value), type(expected.value)), name
            assert (name == "too small") == isinstance(found.value, TooSmall)
        assert same(pool.submit(GOOD).result(), views(GOOD, rules))


def test_a_picture_that_takes_too_long_costs_itself_alone(slow):
    with DecoderPool(1, RULES, 1) as pool:
        futures = [pool.submit(data) for data in (GOOD, slow, GOOD, slow, GOOD)]
        for number, future in enumerate(futures):
            if number % 2:
                with pytest.raises(BadPicture, match=r"^took more than 1 s to decode$"):
                    future.result()
            else:
                assert same(future.result(), views(GOOD, RULES))


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_a_picture_over_which_two_processes_die_costs_itself_alone(slow, number):
    """One death may be the node's doing, and costs nothing."""
    with DecoderPool(1, RULES, LIMIT) as pool:
        for deaths in (1, 2):
            futures = [pool.submit(data) for data in (GOOD, slow, GOOD)]
            assert same(futures[0].result(), views(GOOD, RULES))
            for _ in range(deaths):
                wait_until(lambda: any(c.memory_info().rss > 200 << 20 for c in children()), "nothing is decoded")
                (child,) = children()
                child.send_signal(number)
                wait_until(lambda: gone(child.pid), "it lives")  # noqa: B023
            if deaths == 1:
                assert same(futures[1].result(), views(slow, RULES))
            else:
                with pytest.raises(BadPicture, match=f"^its decoder process was ended by {number.name}, twice$"):
                    futures[1].result()
            assert same(futures[2].result(), views(GOOD, RULES))


def test_a_process_that_dies_idle_costs_no_picture():
    with DecoderPool(1, RULES, LIMIT) as pool:
        pool.submit(GOOD).result()
        (child,) = children()
        child.kill()
        wait_until(lambda: gone(child.pid), "it lives")
        assert same(pool.submit(GOOD).result(), views(GOOD, RULES))


def test_an_interrupt_is_for_the_parent():
    with DecoderPool(1, RULES, LIMIT) as pool:
        pool.submit(GOOD).result()
        (child,) = children()
        child.send_signal(signal.SIGINT)
        assert same(pool.submit(GOOD).result(), views(GOOD, RULES))
        assert [p.pid for p in children()] == [child.pid]
        assert os.getsid(child.pid) == child.pid  # Ctrl-C at the terminal does not even reach it


def test_memory_is_bounded_and_too_little_of_it_is_a_bad_picture(slow):
    with DecoderPool(1, RULES, LIMIT) as pool:
        pool.submit(GOOD).result()
        (child,) = children()
        assert child.rlimit(resource.RLIMIT_AS) == (decoding.MEMORY, decoding.MEMORY)
        assert child.rlimit(resource.RLIMIT_CORE) == (0, 0)
        little = child.memory_info().vms + (200 << 20)
        child.rlimit(resource.RLIMIT_AS, (little, little))
        with pytest.raises(BadPicture, match="^MemoryError$"):
            pool.submit(slow).result()
        assert same(pool.submit(GOOD).result(), views(GOOD, RULES))
        assert [p.pid for p in children()] == [child.pid]


def test_what_libraries_print_is_neither_among_the_answers_nor_heard(capfd):
    noisy = encoded(picture(0), "TIFF", compression="tiff_adobe_deflate")
    noisy = noisy[:8] + b"\xff" * 8 + noisy[16:]  # where its pixels begin
    with pytest.raises(BadPicture):
        views(noisy, RULES)
    assert "ZIPDecode" in capfd.readouterr().err  # from libtiff itself
    with DecoderPool(1, RULES, LIMIT) as pool:
        with pytest.raises(BadPicture):
            pool.submit(noisy).result()
        assert same(pool.submit(GOOD).result(), views(GOOD, RULES))
    assert capfd.readouterr() == ("", "")
    code = (
        "import os; from ldm.decoding import _stand_apart as f; a = f(); os.system('echo x; echo x >&2'); a.write(b'y')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"y", b"")


def test_modules_come_from_where_this_process_has_them(tmp_path, monkeypatch):
    (tmp_path / "numpy.py").write_text("raise RuntimeError('found in the working directory')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    with DecoderPool(1, RULES, LIMIT) as pool:
        assert same(pool.submit(GOOD).result(), views(GOOD, RULES))


@pytest.mark.parametrize(
    ("executable", "message"),
    [("/nowhere/python", "cannot be started: .*No such file"), ("/bin/false", "ended with exit code 1 before it was")],
)
def test_a_process_that_cannot_start_is_an_error(monkeypatch, executable, message):
    monkeypatch.setattr(sys, "executable", executable)
    with DecoderPool(2, RULES, LIMIT) as pool:
        for future in [pool.submit(GOOD) for _ in range(5)]:
            with pytest.raises(ChildProcessError, match=message):
                future.result()


def test_close_leaves_no_process(slow):
    before = psutil.Process().num_fds()
    pool = DecoderPool(2, RULES, LIMIT)
    futures = [pool.submit(slow) for _ in range(6)]
    wait_until(lambda: sum(p.memory_info().rss > 100 << 20 for p in children()) == 2, "nothing is being decoded")
    pids = [p.pid for p in children()]
    pool.close()
    assert all(not psutil.pid_exists(pid) for pid in pids)
    assert psutil.Process().num_fds() == before
    for future in futures[:2]:
        assert isinstance(future.exception(), BadPicture)
    for future in futures[2:]:
        with pytest.raises(CancelledError):
            future.result()
    pool.close()  # again does no harm
    with pytest.raises(RuntimeError, match="after shutdown"):
        pool.submit(GOOD)


ORPHANS = """
import sys, time
import psutil
from ldm.decoding import DecoderPool
from ldm.images import PictureRules
slow = open(sys.argv[1], "rb").read()
pool = DecoderPool(2, PictureRules((32,)), float(sys.argv[2]))
futures = [pool.submit(slow), pool.submit(b"")]
futures[1].exception()
children = psutil.Process().children()
while max(child.memory_info().rss for child in children) < 100 << 20:
    time.sleep(0.02)
print(*(child.pid for child in children), flush=True)
time.sleep(600)
"""


def test_no_process_outlives_a_killed_parent(slow, tmp_path):
    """Neither one that waits for a picture, nor one that is at a picture without an end."""
    (tmp_path / "slow.png").write_bytes(slow)
    command = [sys.executable, "-c", ORPHANS, str(tmp_path / "slow.png"), "2"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(pids) == 2
    wait_until(lambda: all(gone(pid) for pid in pids), "a decoder process outlived its parent")


@pytest.mark.real_data
def test_real_fuzzed_files_go_through(shared):
    counts: Counter[str] = Counter()
    with tarfile.open(shared / "data" / "hostile" / "fuzz-00000.tar") as tar:
        data = [tar.extractfile(member).read() for member in tar if member.isfile()]
    with DecoderPool(2, RULES, LIMIT) as pool:
        for future in [pool.submit(one) for one in data]:
            try:
                counts["decoded"] += future.result()[0][0].pixels.shape == (3, 32, 32)
            except BadPicture as error:
                assert "\n" not in str(error)
                counts[str(error).split(":")[0]] += 1
    print(f"\nfuzzed pictures: {dict(counts.most_common(8))}")
    assert counts.total() == 1708 and counts["decoded"] > 300
    assert not any("process" in reason or "took" in reason for reason in counts)
