"""``shmbroker top``: an instance at work, live or once."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import click
import msgspec

from shmbroker.commands.options import instance_option, json_option
from shmbroker.commands.picture import show_pictures

if TYPE_CHECKING:
    from rich.console import RenderableType

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
            terminal().print(picture.render())
        return

    def another() -> RenderableType:
        nonlocal before
        earlier, before = before, look()
        return Top.between(earlier, before).render()

    if not sys.stdout.isatty():
        time.sleep(interval)  # rates are of the time between two looks
    show_pictures(Top.between(before, before).render() if sys.stdout.isatty() else another(), another, interval)
