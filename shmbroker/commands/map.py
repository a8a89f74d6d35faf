"""``shmbroker map``: one segment, drawn."""

from __future__ import annotations

from pathlib import Path

import click

from shmbroker.commands.options import instance_option


@click.command("map")
@click.argument("target", metavar="SEGMENT|CLIENT")
@instance_option("Of the client.")
@click.option("--svg", "file", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False), help="Write a drawing instead of text.")
def map_command(target: str, instance: str | None, file: Path | None) -> None:
    """Draw a segment: header, channels, and the arena with its blocks. A client is named by name, id or pid."""
    from shmbroker.control.status import ask
    from shmbroker.monitoring.figures import read_figures
    from shmbroker.monitoring.observation import observe
    from shmbroker.monitoring.segment_map import as_svg, as_text, is_segment, segment_of

    segment = target if is_segment(target) else segment_of(observe(ask(instance)), target)
    figures = read_figures(segment)
    if file is None:
        click.echo(as_text(figures))
        return
    file.write_text(as_svg(figures))
    click.echo(f"drew {figures.name} in {file}")
