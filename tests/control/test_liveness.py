"""Watching a process: what any thread may ask at any time."""

from __future__ import annotations

import subprocess
import sys
import threading

from shmbroker.control.liveness import Watch, process_of
from tests.processes import stop_process, wait_until

LOOKS = 2000
THREADS = 8


def test_many_threads_may_look_at_once_and_all_learn_of_the_end() -> None:
    """A call's deadline is told with the worker's state, by whichever thread it passed in."""
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    watch = Watch(process_of(process.pid))
    failed: list[BaseException] = []
    seen: list[bool] = []

    def look() -> None:
        try:
            seen.extend(watch.alive() for _ in range(LOOKS))
        except BaseException as error:
            failed.append(error)

    try:
        threads = [threading.Thread(target=look) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        assert all(seen)
        assert len(seen) == LOOKS * THREADS
        process.kill()
        wait_until(lambda: not watch.alive())
    finally:
        assert process.stdin is not None
        process.stdin.close()
        stop_process(process)
        watch.close()
    assert not watch.alive(), "what was seen stays so"
