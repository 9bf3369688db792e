"""The cache of remote files in several processes: fetched once for a node, capped, right whoever is killed."""

import contextlib
import multiprocessing
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

from ldm import storage
from ldm.latents.cache import Cache, RemoteFile
from tests.ldm.caching import SIZE, held, is_right, parts, until

SPAWN = multiprocessing.get_context("spawn")


def parts_with_room(folder: Path) -> list[Path]:
    found = []
    for part in parts(folder):
        with contextlib.suppress(FileNotFoundError):  # it has just become a whole file
            found += [part] if part.stat().st_size else []
    return found


def get_all(cache: Cache, files: list[RemoteFile], barrier, answers) -> None:
    storage.exists(files[0].url)  # what a process does once takes as long as the rest
    barrier.wait()
    cache.prefetch(files)
    answers.put([is_right(cache.get(file), file) for file in files])


def test_of_four_processes_one_fetches_each_file(chaos, put, tmp_path):
    """A used cache travels to them: only its settings are pickled."""
    folder, files = tmp_path / "cache", put(9)
    cache = Cache(folder=folder)
    cache.prefetch(files[8:])
    cache.get(files[8])
    barrier, answers = SPAWN.Barrier(5), SPAWN.Queue()
    processes = [SPAWN.Process(target=get_all, args=(cache, files[:8], barrier, answers)) for _ in range(4)]
    for process in processes:
        process.start()
    until(lambda: barrier.n_waiting == 4)
    chaos.calm()
    barrier.wait()
    assert [answers.get(timeout=60) for _ in processes] == [[True] * 8] * 4
    for process in processes:
        process.join()
    assert chaos.counts["bytes_out"] == 8 * SIZE and chaos.counts["HEAD"] == 0
    assert held(folder, files) == list(range(9)) and not parts(folder)


def get_in_parts(folder: Path, file: RemoteFile) -> None:
    storage.files.PART = 20_000
    Cache(folder=folder).get(file)


def test_a_process_that_is_killed_over_a_download(chaos, put, tmp_path):
    """One who waits for it goes on by itself; what another dead one has left is swept."""
    folder, (file, other, third) = tmp_path, put(3)

    def killed_at_work(file: RemoteFile, meanwhile: Callable[[], None] = lambda: None) -> None:
        chaos.rage(1.0, kinds=("slow",), delay=30, only=lambda method, path: chaos.counts["GET"] > 1)
        process = SPAWN.Process(target=get_in_parts, args=(folder, file))
        process.start()
        until(lambda: chaos.counts["slow"] and chaos.counts["bytes_out"])  # one part is there
        meanwhile()
        process.kill()
        process.join()
        chaos.calm()

    paths: list[Path] = []
    waiting = threading.Thread(target=lambda: paths.append(Cache(folder=folder).get(file)))

    def wait() -> None:
        waiting.start()
        time.sleep(0.3)
        assert waiting.is_alive()

    killed_at_work(file, wait)
    waiting.join(30)
    assert is_right(paths[0], file) and not parts(folder)
    killed_at_work(other)
    assert [part.stat().st_size for part in parts(folder)] == [SIZE] and not is_right(parts(folder)[0], other)
    cache = Cache(folder=folder)
    assert is_right(cache.get(third), third) and not parts(folder)
    assert is_right(cache.get(other), other)
    assert held(folder, [file, other, third]) == [0, 1, 2]


def serve(folder: Path, max_bytes: int, questions) -> None:
    cache = Cache(max_bytes, folder)
    while (file := questions.recv()) is not None:
        questions.send(is_right(cache.get(file), file))


def test_the_least_recently_used_gives_way_whoever_used_it(put, tmp_path):
    files = put(6)
    pipes = []
    for _ in range(2):
        here, there = SPAWN.Pipe()
        SPAWN.Process(target=serve, args=(tmp_path, 3 * SIZE, there), daemon=True).start()
        pipes.append(here)
    draw, used = random.Random(0), []
    for turn in range(60):
        number = draw.randrange(6)
        pipes[turn % 2].send(files[number])
        assert pipes[turn % 2].recv()
        used = [*(n for n in used if n != number), number]
        assert held(tmp_path, files) == sorted(used[-3:])
    for pipe in pipes:
        pipe.send(None)


def use_at_random(folder: Path, max_bytes: int, files: list[RemoteFile], seed: int, answers) -> None:
    cache, draw, right = Cache(max_bytes, folder), random.Random(seed), 0
    for _ in range(60):
        ahead = draw.sample(files, 4)
        cache.prefetch(ahead)
        for file in ahead[:2]:
            while True:
                try:
                    right += is_right(cache.get(file), file)
                    break
                except FileNotFoundError as error:
                    assert str(folder) in str(error)  # it gave way before it was opened
    cache.close()
    answers.put(right)


def test_several_processes_with_caps_of_their_own(put, tmp_path):
    """The bytes on the disk stay below the largest cap, but for what the three need at once."""
    files, answers = put(12), SPAWN.Queue()
    caps = [3 * SIZE, 4 * SIZE, 5 * SIZE]
    processes = [
        SPAWN.Process(target=use_at_random, args=(tmp_path, cap, files, seed, answers)) for seed, cap in enumerate(caps)
    ]
    for process in processes:
        process.start()
    taken = []
    while any(process.is_alive() for process in processes):
        whole = len(held(tmp_path, files))  # first, so that nothing counts twice
        taken.append(whole + len(parts_with_room(tmp_path)))
        time.sleep(0.002)
    assert [answers.get(timeout=1) for _ in processes] == [120] * 3
    assert max(taken) <= 5 + 3 and len(taken) > 100
    assert Cache(5 * SIZE, tmp_path).get(files[0]) and len(held(tmp_path, files)) <= 5 and not parts(tmp_path)
