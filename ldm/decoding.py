"""Decoding in processes of their own: a picture that hangs or crashes the C code costs itself alone.

Run as a program (`python -m ldm.decoding RULES SECONDS`) this is one such process. It answers one question at a time:

    question   length (uint64), encoded picture
    answer     length (uint64), JSON, the pixels of each view

It ends when its standard input does, so none outlives its parent for longer than one picture may take.
"""

import contextlib
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Any, TypeAlias

import numpy as np

from ldm.images import BadPicture, PictureRules, TooSmall, View, views

Decoded: TypeAlias = tuple[list[View], tuple[int, int]]
"""What `ldm.images.views` gives."""

MEMORY = 4 << 30
"""Address space of one process, bytes. Pictures of `MAX_PIXELS` pixels need about half of it."""

_LENGTH = struct.Struct("<Q")
_READY = b"!"


class DecoderPool:
    """`ldm.images.views` in `num_processes` processes, each led by a thread of this one.

    time_limit_s: seconds that one picture may take, from when its process begins on it. A picture that takes longer, or
    on which two processes die, is a BadPicture, and the next one gets a fresh process.
    """

    def __init__(self, num_processes: int, rules: PictureRules, time_limit_s: float) -> None:
        assert num_processes > 0 and time_limit_s > 0
        self._rules, self._time_limit_s = rules, time_limit_s
        self._children: list[_Child] = []
        self._own = threading.local()
        self._threads = ThreadPoolExecutor(num_processes, "decoder", initializer=self._adopt)

    def submit(self, data: bytes) -> Future[Decoded]:
        """A future of the views and the original (width, height), or of what `views` raises.

        It holds a ChildProcessError where a process cannot even start. How many wait is for the caller to bound.
        """
        return self._threads.submit(self._decode, data)

    def close(self) -> None:
        """Ends all processes. What waits is cancelled, what is being decoded is given up."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for child in self._children:
            child.kill()
        self._threads.shutdown(wait=True)
        for child in self._children:  # one may have been starting
            child.end()

    def __enter__(self) -> "DecoderPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _adopt(self) -> None:
        self._own.child = _Child(self._rules, self._time_limit_s)
        self._children.append(self._own.child)

    def _decode(self, data: bytes) -> Decoded:
        child: _Child = self._own.child
        return child.decode(data)


class _Child:
    """The process of one thread; started when it is needed and there is none."""

    def __init__(self, rules: PictureRules, time_limit_s: float) -> None:
        self.time_limit_s = time_limit_s
        # Not `multiprocessing`: spawning imports the parent's main module again (in Ray, a worker), forking is not safe
        # beside threads. -P: what lies in the working directory must not be taken for a module.
        self.command = [sys.executable, "-P", "-m", "ldm.decoding", rules.to_json(), str(time_limit_s)]
        self.process: subprocess.Popen[bytes] | None = None
        self.closed = False

    def decode(self, data: bytes) -> Decoded:
        """Raises BadPicture, ChildProcessError."""
        try:
            return self._decode(data)
        except _Died as death:
            if death.code == -signal.SIGALRM:
                raise BadPicture(f"took more than {self.time_limit_s:g} s to decode") from None
            if self.closed:
                raise BadPicture("was given up") from None
        try:  # perhaps it was not the picture: a node short of memory kills processes
            return self._decode(data)
        except _Died as death:
            raise BadPicture(f"its decoder process {_how_it_ended(death.code)}, twice") from None

    def _decode(self, data: bytes) -> Decoded:
        if self.process is None or self.process.poll() is not None:  # one that died idle costs no picture
            self.end()
            self.process = self._start()
        try:
            answer, pixels = _ask(self.process, data)
        except BaseException as error:  # whatever it was: the two may no longer agree where an answer begins
            code = self.end()
            if isinstance(error, BrokenPipeError | EOFError):
                raise _Died(code) from None
            raise
        if "reason" in answer:
            raise (TooSmall if answer["too_small"] else BadPicture)(answer["reason"])
        made = [
            View(p, tuple(box), flipped)
            for p, box, flipped in zip(pixels, answer["boxes"], answer["flipped"], strict=True)
        ]
        return made, tuple(answer["original"])

    def kill(self) -> None:
        self.closed = True
        process = self.process  # its own thread may put None there meanwhile
        if process is not None:
            process.kill()

    def end(self) -> int:
        """Kills the process if it lives. Returns its exit code, negative for a signal."""
        process, self.process = self.process, None
        if process is None:
            return 0
        process.kill()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # what was not yet written
                pipe.close()
        return process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        """Raises ChildProcessError where the process does not come to the point of asking for pictures."""
        modules = os.pathsep.join(os.path.abspath(place) for place in sys.path)  # found as they were found here
        environment = {**os.environ, "PYTHONPATH": modules, "OPENBLAS_NUM_THREADS": "1"}
        try:
            # A session of its own: Ctrl-C at the terminal is for the parent alone.
            process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
            )
        except OSError as error:
            raise ChildProcessError(f"a decoder process cannot be started: {error}") from error
        self.process = process
        assert process.stdout is not None
        if process.stdout.read(1) != _READY:
            how = _how_it_ended(self.end())
            raise ChildProcessError(f"a decoder process {how} before it was ready; see what it wrote to standard error")
        return process


class _Died(Exception):
    """A decoder process ended over a picture."""

    def __init__(self, code: int) -> None:
        self.code = code


def _how_it_ended(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _ask(process: subprocess.Popen[bytes], data: bytes) -> tuple[dict[str, Any], list[Any]]:
    """(JSON, pixels) of the answer. Raises EOFError or BrokenPipeError where the process dies over it."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(_LENGTH.pack(len(data)))
    process.stdin.write(data)
    process.stdin.flush()
    answer = json.loads(_read(process.stdout, *_LENGTH.unpack(_read(process.stdout, _LENGTH.size))))
    pixels = [np.empty((3, h, w), np.uint8) for h, w in answer.get("shapes", [])]
    for array in pixels:
        if process.stdout.readinto(array) != array.nbytes:  # type: ignore[attr-defined]
            raise EOFError
    return answer, pixels


def _read(pipe: IO[bytes], count: int) -> bytes:
    data = pipe.read(count)
    if len(data) < count:
        raise EOFError
    return data


def _answer(data: bytes, rules: PictureRules) -> tuple[dict[str, Any], list[View]]:
    try:
        made, original = views(data, rules)
    except BadPicture as error:
        return {"reason": str(error), "too_small": isinstance(error, TooSmall)}, []
    return {
        "original": original,
        "shapes": [view.pixels.shape[1:] for view in made],
        "boxes": [view.box for view in made],
        "flipped": [view.flipped for view in made],
    }, made


def _stand_apart() -> IO[bytes]:
    """Sets up signals, limits and files of a decoder process. Returns where its answers go."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The kernel's own doing for these two, whatever was inherited: to end the process, even deep in C code.
    for number in (signal.SIGALRM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for limit, wanted in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CORE, 0)):
        _, most = resource.getrlimit(limit)
        wanted = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
        resource.setrlimit(limit, (wanted, wanted))
    # What C libraries print must not get among the answers, nor need it be read (libtiff on each unknown tag).
    answers = os.fdopen(os.dup(1), "wb")
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    return answers


def main() -> None:
    """Answers questions until there are no more."""
    rules, time_limit_s = PictureRules.from_json(sys.argv[1]), float(sys.argv[2])
    questions, answers = sys.stdin.buffer, _stand_apart()
    answers.write(_READY)
    answers.flush()
    while length := questions.read(_LENGTH.size):
        data = questions.read(*_LENGTH.unpack(length))
        signal.setitimer(signal.ITIMER_REAL, time_limit_s)  # the alarm ends this process
        answer, made = _answer(data, rules)
        signal.setitimer(signal.ITIMER_REAL, 0)
        text = json.dumps(answer).encode()
        answers.write(_LENGTH.pack(len(text)) + text)
        for view in made:
            answers.write(view.pixels.data)
        answers.flush()


if __name__ == "__main__":
    main()
