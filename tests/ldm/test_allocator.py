"""Large blocks that are freed and taken again cost no page faults, unless the user tunes malloc."""

import os
import subprocess
import sys

import pytest

COUNT = """
import resource, torch
{first}
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.empty({bytes}, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def count_faults(first: str, **environment: str) -> int:
    """Page faults of taking, filling and freeing 24 MiB twenty times, after it was done once."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD"))}
    program = COUNT.format(first=first, bytes=24 * 2**20)
    done = subprocess.run(
        [sys.executable, "-c", program], env=clean | environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    plain = count_faults("", MALLOC_MMAP_THRESHOLD_="131072")
    assert plain >= 20 * 12, "24 MiB are at least twelve huge pages"
    assert count_faults("import ldm") < plain / 10


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_what_the_user_says_of_malloc_stands() -> None:
    said = {"MALLOC_MMAP_THRESHOLD_": "131072"}
    assert count_faults("import ldm", **said) >= 20 * 12
