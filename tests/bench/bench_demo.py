"""Runs the whole demonstration and measures it: `python tests/bench/bench_demo.py [FOLDER]`; one line of JSON.

Memory is the sum of the proportional set sizes (PSS) of the command and all its children, sampled every second, so
that shared pages are counted once. Linux only.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil


def measure(folder: str) -> dict[str, object]:
    """Runs `ldm demo` in an empty folder; returns its report with the peak memory and the time of the whole process."""
    started = time.monotonic()
    command = [sys.executable, "-m", "jobs.cli", "demo", f"folder={folder}", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    family = psutil.Process(process.pid)
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(_pss(p) for p in [family, *family.children(recursive=True)]))
        time.sleep(1)
    assert process.stdout is not None
    report = json.loads(process.stdout.read())
    return {
        "seconds_of_the_process": round(time.monotonic() - started, 1),
        "peak_memory_gb": round(peak / 1e9, 2),
        "exit_code": process.returncode,
        **report,
    }


def _pss(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except (psutil.Error, OSError):  # it ended in the meantime
        return 0


if __name__ == "__main__":
    target = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="ldm-demo-")
    print(json.dumps(measure(target)))
