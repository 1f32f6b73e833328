"""A process that has imported everything and forks one child per command, to be killed.

Run as a script it reads one JSON object a line, ``{"do": NAME, "arguments": {...}, "kill": HOW}``,
does NAME in a child and answers one line ``{"status": …, "seconds": …, "calls": …}``: status 0,
-9 where the child was killed, 1 where it raised. HOW is null, ``{"after_s": S}`` for SIGKILL after
S seconds, or ``{"call": N}`` for SIGKILL just before the child's N-th call that changes the file
system.

Forking takes a millisecond where starting Python and importing torch takes two seconds, so that
hundreds of kills are affordable.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from typing import Any, Self

# What changes a file system, as the interpreter's audit events name it; reads of folders are left
# out. Writes to files raise no event and are counted by wrapping them.
EVENTS = {
    "os.link",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.symlink",
    "os.truncate",
    "os.utime",
    "shutil.rmtree",
}
CALLS = (
    "write",
    "writev",
    "pwrite",
    "fsync",
    "fdatasync",
    "replace",
    "sendfile",
    "copy_file_range",
)
PART_BYTES = 3_000  # so that a small corpus makes many parts


class Victims:
    """The process, as a test sees it; a context manager."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()

    def run(
        self, do: str, kill: dict[str, float] | None = None, **arguments: Any
    ) -> dict[str, Any]:
        """Do one command in a child of its own and return how it ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"do": do, "kill": kill, "arguments": arguments}
        self._process.stdin.write(json.dumps(request, default=str) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the process that forks is gone"
        return dict(json.loads(answer))


# -- what the children do --------------------------------------------------------------------------


def extract(manifest: str, cache: str, feature: str) -> None:
    """Like `mer extract`, with small parts."""
    from mer.cache.home import Cache
    from mer.pipelines.extraction import extract as run
    from mer.pipelines.manifest import read_manifest

    result = run(
        read_manifest(manifest), [feature], Cache(cache), device="cpu", workers=2, batch_seconds=0.5
    )
    assert not result.report.failures


def gc(cache: str) -> None:
    """Like `mer cache gc`."""
    from mer.cache.collect import plan, run
    from mer.cache.home import Cache

    report = run(plan(Cache(cache)))
    assert not report.notes, report.notes


def cp(source: str, cache: str) -> None:
    """Like `mer cache cp`."""
    from mer.cache.home import Cache
    from mer.cache.transfer import copy

    for store in Cache(source).stores():
        report = copy(store, Cache(cache))
        assert not report.damaged, report.damaged


def import_(source: str, format: str, cache: str) -> None:
    """Like `mer cache import`."""
    from mer.cache.exchange import import_ as bring
    from mer.cache.home import Cache

    report = bring(Path(source), format, Cache(cache), name="theirs")
    assert not report.skipped, report.skipped


COMMANDS: dict[str, Callable[..., None]] = {
    "extract": extract,
    "gc": gc,
    "cp": cp,
    "import": import_,
}


# -- the process that forks ------------------------------------------------------------------------


def _count_calls(fatal: int | None) -> list[int]:
    """Count calls that change the file system; die just before the ``fatal`` one."""
    count = [0]

    def called() -> None:
        count[0] += 1
        if count[0] == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_CREAT
        if opened or event in EVENTS:
            called()

    def counting(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            called()
            return real(*args, **kwargs)

        return call

    sys.addaudithook(hook)
    for name in CALLS:
        if hasattr(os, name):
            setattr(os, name, counting(getattr(os, name)))
    return count


def _child(request: dict[str, Any], answer: int) -> int:
    """Do the command; write the number of calls to the pipe ``answer``."""
    kill = request["kill"] or {}
    write = os.write
    count = _count_calls(kill.get("call"))
    try:
        COMMANDS[request["do"]](**request["arguments"])
    except BaseException:
        traceback.print_exc()
        return 1
    write(answer, str(count[0]).encode())
    return 0


def _serve() -> None:
    import torch

    # What children would import.
    from mer.cache import collect, exchange, transfer, verify  # noqa: F401
    from mer.cache.exchange import incoming, npy  # noqa: F401
    from mer.cache.store import Store
    from mer.extract import engine, logmel  # noqa: F401
    from mer.pipelines import caching, extraction  # noqa: F401

    torch.set_num_threads(1)
    Store.writer = partialmethod(Store.writer, part_bytes=PART_BYTES)  # type: ignore[method-assign]
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    for line in sys.stdin:
        request = json.loads(line)
        reading, writing = os.pipe()
        started = time.monotonic()
        pid = os.fork()
        if pid == 0:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
            os.close(reading)
            os._exit(_child(request, writing))
        os.close(writing)
        after_s = (request["kill"] or {}).get("after_s")
        if after_s is not None and signal.sigtimedwait({signal.SIGCHLD}, after_s) is None:
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        seconds = time.monotonic() - started
        while signal.sigtimedwait({signal.SIGCHLD}, 0) is not None:
            pass
        calls = os.read(reading, 32).decode()
        os.close(reading)
        code = os.waitstatus_to_exitcode(status)
        report = {"status": code, "seconds": seconds, "calls": int(calls) if calls else None}
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    _serve()
