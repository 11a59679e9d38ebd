"""Helpers of tests about threads and processes: forks, a thread that goes on meanwhile, Pythons that end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

TIMEOUT = 60  # seconds, after which something hangs

# Python 3.12 and later warn about every fork of a process with threads, which is what is tested here.
allow_fork = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"
)


def in_fork(function: Callable[[], Any]) -> Any:
    """Fork, call the function in the child, and return its result (anything JSON can hold)."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover - not seen by the parent
        code = 1
        try:
            os.close(reader)
            os.write(writer, json.dumps(function()).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    deadline = time.monotonic() + TIMEOUT
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the child hangs")
        time.sleep(0.005)
    with os.fdopen(reader, "rb") as pipe:
        return json.loads(pipe.read())


@contextmanager
def stepping(act: Callable[[], object]) -> Iterator[None]:
    """Call a function again and again in another thread."""
    stop, started = threading.Event(), threading.Event()

    def act_until_stopped() -> None:
        while not stop.is_set():
            act()
            started.set()

    thread = threading.Thread(target=act_until_stopped, daemon=True)
    thread.start()
    try:
        assert started.wait(TIMEOUT)
        yield
    finally:
        stop.set()
        thread.join(TIMEOUT)


# The interpreter's end takes a while, in which the threads wake up and want the GIL back.
_DAEMONS = """
import sys, threading, time

class Lasting:
    def __del__(self, sleep=time.sleep):
        sleep(0.3)

sys.modules["lasting"] = Lasting()
started = threading.Semaphore(0)

def forever(act):
    act()
    started.release()
    while True:
        act()

{script}

for _ in range(3):
    threading.Thread(target=forever, args=(make(),), daemon=True).start()
for _ in range(3):
    started.acquire()
"""


def assert_daemons_let_python_end(script: str, times: int = 3) -> None:
    """Let Python end while three daemon threads call what the script's ``make()`` returns."""
    for _ in range(times):
        done = subprocess.run(
            [sys.executable, "-c", _DAEMONS.replace("{script}", script)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stderr=subprocess.PIPE,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
