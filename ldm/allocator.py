"""Memory that is freed stays with the process, for the next tensor of its size is only a moment away.

glibc gives large blocks back to the kernel when they are freed, which hands out the next ones page by page, zeroed. A
training step of DiT-S/2 on a CPU took 50,000 such page faults, a fifth of its time (docs/benchmarks.md).
"""

import ctypes
import os

_OWN_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_MIB = 2**20


def keep_freed_memory() -> bool:
    """Lets this process keep up to 2 GiB that it has freed; whether it does.

    Nothing is changed where the environment says how malloc is to work, or where the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None or any(name in os.environ for name in _OWN_SETTINGS):
        return False
    values = {_MMAP_THRESHOLD: 1024 * _MIB, _TRIM_THRESHOLD: 2048 * _MIB - 1, _TOP_PAD: 64 * _MIB}
    return all(mallopt(name, value) == 1 for name, value in values.items())
