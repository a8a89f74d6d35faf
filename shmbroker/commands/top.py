"""``shmbroker top``: an instance at work, live or once."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import click
import msgspec

from shmbroker.commands.options import instance_option, json_option

if TYPE_CHECKING:
    from shmbroker.monitoring.top import Look


@click.command("top")
@instance_option()
@click.option("--interval", type=click.FloatRange(0.1, 3600), default=1.0, show_default=True, help="Seconds between two looks.")
@click.option("--once", is_flag=True, help="Print one picture and end.")
@json_option("For programs: one picture, as JSON.")
def top_command(instance: str | None, interval: float, once: bool, as_json: bool) -> None:
    """Show workers, channels and arenas as they work, and how fast; q ends it."""
    from shmbroker.console import terminal
    from shmbroker.control.status import ask
    from shmbroker.monitoring.observation import observe
    from shmbroker.monitoring.top import Look, Top

    def look() -> Look:
        return Look.of(observe(ask(instance)))

    before = look()
    if once or as_json:
        time.sleep(interval)
        picture = Top.between(before, look())
        if as_json:
            click.echo(msgspec.json.format(msgspec.json.encode(picture), indent=2).decode())
        else:
            terminal().print(picture.render(), soft_wrap=True)
        return
    if sys.stdout.isatty():
        with contextlib.suppress(KeyboardInterrupt):
            _live(look, before, interval)
        return
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            time.sleep(interval)
            now = look()
            terminal().print(Top.between(before, now).render(), soft_wrap=True)
            before = now


def _live(look: Callable[[], Look], before: Look, interval: float) -> None:
    from rich.live import Live

    from shmbroker.commands.keyboard import keys
    from shmbroker.monitoring.top import Top

    with keys() as pressed, Live(Top.between(before, before).render(), screen=True, auto_refresh=False) as live:
        while pressed(interval) != "q":
            now = look()
            live.update(Top.between(before, now).render(), refresh=True)
            before = now
