"""The ``shmbroker doctor`` command."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from shmbroker.commands.options import instance_option, json_option
from shmbroker.control.joining import resolve_instance
from shmbroker.settings.kinds import DOORBELL_WORDS, LANE_WORDS
from shmbroker.settings.load import Loaded, load

if TYPE_CHECKING:
    from shmbroker.commands.doctor.check import Check
    from shmbroker.commands.doctor.transport import Asked

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}
_FLAG = "flag --{}"


@click.command()
@instance_option("Which broker.")
@click.option("--lane", type=click.Choice(LANE_WORDS), help="For the probe. Default: as the settings, which is auto.")
@click.option("--doorbell", type=click.Choice(DOORBELL_WORDS), help="For the probe. Default: as the settings, which is auto.")
@click.option("--offline", is_flag=True, help="Check this machine alone: no broker is asked, none need run.")
@json_option()
@click.pass_context
def doctor(context: click.Context, instance: str | None, lane: str | None, doorbell: str | None, offline: bool, as_json: bool) -> None:
    """Check this machine, the broker and the transport in use; exit status 1 if anything fails.

    Opens a channel to every service that is offered and measures calls that do nothing. That no broker answers is a failure; the rest is checked
    all the same.
    """
    import msgspec

    from shmbroker.commands.doctor.check import State
    from shmbroker.commands.doctor.transport import Asked

    loaded = load()

    def asked(name: str, told: str | None, set_to: str) -> tuple[str, str]:
        by_flag = context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        return (told or set_to), (_FLAG.format(name) if by_flag else loaded.origins[name])

    probe = Asked(*asked("lane", lane, loaded.settings.lane), *asked("doorbell", doorbell, loaded.settings.doorbell))
    found = []
    for check in examine(loaded, resolve_instance(instance), probe, offline=offline):
        found.append(check)
        if not as_json:
            _show(check)
    failed = any(check.state is State.FAIL for check in found)
    if as_json:
        click.echo(json.dumps({"ok": not failed, "checks": msgspec.to_builtins(found)}, indent=2))
    else:
        counts = [f"{sum(check.state is state for check in found)} {state.value}" for state in State]
        click.echo(", ".join(counts))
    sys.exit(1 if failed else 0)


def examine(loaded: Loaded, instance: str, probe: Asked, *, offline: bool) -> Iterator[Check]:
    """All checks, in the order in which one explains the next; ``offline``: those that need no broker."""
    # The broker is started by the same program, and must not pay for any of it.
    from shmbroker.commands.doctor import cuda, files, host, memory, names, peers, software, transport

    settings = loaded.settings
    yield from software.checks(loaded)
    yield from memory.checks(settings, instance)
    report, broker = peers.not_asked() if offline else peers.ask_broker(instance)
    yield from names.checks(instance, report)
    yield from files.checks(report)
    yield from host.checks(settings, report)
    yield from cuda.checks(settings)
    yield broker
    if report is not None:
        yield from peers.checks(report, loaded)
        yield from transport.checks(report, probe)


def _show(check: Check) -> None:
    state = click.style(f"{check.state.value:4}", fg=_COLOURS[check.state.value])
    remedy = f" -> {check.remedy}" if check.remedy else ""
    click.echo(f"{state} {check.name}: {check.text}{remedy}")
