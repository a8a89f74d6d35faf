"""Log lines: with the time where people read them, with priorities for journald, and none repeated without end."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest

from shmbroker.systemd import journal

LOGS = """
import logging
from shmbroker import console
console.set_up_logging("debug")
log = logging.getLogger("shmbroker.x")
log.debug("looked"); log.info("began"); log.warning("odd\\nin two lines"); log.error("failed"); log.critical("ends")
"""


def said(code: str, journal_stream: str) -> list[str]:
    """What a process says on standard error, whose device and inode are put for ``{}`` in the variable that systemd sets."""
    read_fd, write_fd = os.pipe()
    found = os.fstat(write_fd)
    stream = journal_stream.format(f"{found.st_dev}:{found.st_ino}")
    with open(read_fd) as reader:
        subprocess.run((sys.executable, "-c", code), env={**os.environ, "JOURNAL_STREAM": stream}, stderr=write_fd, check=False)
        os.close(write_fd)
        return reader.read().splitlines()


def test_journald_is_given_priorities_and_no_second_time() -> None:
    assert said(LOGS, "{}") == [
        "<7>shmbroker.x: looked",
        "<6>shmbroker.x: began",
        "<4>shmbroker.x: odd",
        "<4>in two lines",
        "<3>shmbroker.x: failed",
        "<2>shmbroker.x: ends",
    ]


@pytest.mark.parametrize("stream", ["", "1:1"])
def test_a_stream_that_does_not_go_to_the_journal_has_the_time(stream: str) -> None:
    """A child of a service, or a terminal of a desktop's session, has the variable too, and its standard error somewhere else."""
    lines = said(LOGS, stream)
    assert lines[0].endswith(" DEBUG shmbroker.x: looked")
    assert lines[0][:4].isdecimal()


def test_an_error_of_a_command_has_its_priority_too() -> None:
    command = "import sys; from shmbroker.commands.cli import main; sys.argv[1:] = ['serve', '--group', 'no-such-group']; main()"
    (line,) = said(command, "{}")
    assert line.startswith("<3>error: there is no group 'no-such-group'")


def test_lines_of_one_kind_are_told_so_often_and_then_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("shmbroker.systemd.journal.time.monotonic", lambda: clock[0])
    repeats = journal.Repeats()

    def told(template: str, *arguments: object) -> str | None:
        record = logging.LogRecord("shmbroker.x", logging.WARNING, "", 0, template, arguments, None)
        return record.getMessage() if repeats.filter(record) else None

    first = [told("call %d failed", number) for number in range(3 * journal.AT_ONCE)]
    assert first == [f"call {number} failed" for number in range(journal.AT_ONCE)] + [None] * 2 * journal.AT_ONCE
    assert told("something else") == "something else"
    clock[0] += journal.PERIOD_SECONDS
    assert told("call %d failed", 99) == f"call 99 failed ({2 * journal.AT_ONCE} more like this were not told)"
    assert told("call %d failed", 100) == "call 100 failed"
    assert told("something else") == "something else"
