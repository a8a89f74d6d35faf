"""A segment drawn once: header, statistics, channels with their queues, and the arena with its blocks; as text or SVG."""

from __future__ import annotations

from collections.abc import Iterator
from xml.sax.saxutils import escape

from shmbroker.errors import BadInput
from shmbroker.memory import names
from shmbroker.monitoring.figures import Block, ChannelFigures, SegmentFigures
from shmbroker.monitoring.observation import Observation
from shmbroker.monitoring.ring_picture import CURSOR, FREE, FULL, PARTLY, draw_ring
from shmbroker.settings.sizes import mib

TEXT_WIDTH = 96
SVG_WIDTH = 960
_ROW, _GAP, _LEFT = 22, 6, 20
_COLORS = {"header": "#c9d7e8", "statistics": "#d9e8c9", "channel": "#f2e2c4", "closed": "#f4f4f4", "free": "#eef3f8", "held": "#4878a8"}


def is_segment(target: str) -> bool:
    """Whether ``target`` is the name of a segment."""
    name = names.parse(target.lstrip("/"))
    return name is not None and name.kind == names.SEGMENT


def segment_of(seen: Observation, target: str) -> str:
    """The segment of the client called ``target``, by name, id or pid. Raises :class:`BadInput` when there is none, or several."""
    found = [one.peer for one in seen.clients if target in (one.peer.name, one.peer.peer, str(one.peer.pid))]
    if len(found) == 1:
        return found[0].segment
    if found:
        raise BadInput(f"{len(found)} clients are called {target!r}: name one by its id: {', '.join(peer.peer for peer in found)}")
    there = ", ".join(f"{one.peer.name} ({one.peer.peer})" for one in seen.clients) or "none"
    raise BadInput(f"no client is called {target!r}; there are: {there}; or give a segment's name, /shmbroker.<instance>.segment.<id>")


def as_text(figures: SegmentFigures) -> str:
    """For a terminal."""
    geometry, arena = figures.geometry, figures.arena
    lines = [
        f"{figures.name}: {mib(geometry.total_bytes)}, client {figures.owner}",
        f"made {figures.age_seconds:.0f} s ago for process {figures.owner_pid} by process {figures.maker_pid}, the broker",
        "",
    ]
    for offset, nbytes, what in _parts(figures):
        lines.append(f"{offset:>14}  {nbytes:>14}  {what}")
    lines += ["", *draw_ring(arena, geometry.arena_offset, TEXT_WIDTH), ""]
    lines.append(
        f"{FULL} held, {PARTLY} partly, {FREE} free, {CURSOR} cursor at {arena.cursor}; a letter is {arena.total_bytes // TEXT_WIDTH} bytes"
    )
    lines += [f"{block.offset:>14}  {block.nbytes:>14}  held for {block.age_seconds:.1f} s" for block in arena.blocks]
    if arena.held_blocks > len(arena.blocks):
        lines.append(f"{arena.held_blocks - len(arena.blocks)} more blocks are held: these are the oldest and the largest")
    return "\n".join(lines)


def _parts(figures: SegmentFigures) -> Iterator[tuple[int, int, str]]:
    """Offset, bytes and name of each part."""
    geometry, arena = figures.geometry, figures.arena
    yield 0, geometry.statistics_offset, "header"
    yield geometry.statistics_offset, geometry.channels_offset - geometry.statistics_offset, "statistics of the channels"
    opened = {one.index: one for one in figures.channels}
    first_closed = 0
    closed = 0
    for index in [*range(geometry.channel_count), -1]:
        one = opened.get(index)
        if index >= 0 and one is None:
            first_closed = first_closed if closed else index
            closed += 1
            continue
        if closed:
            yield geometry.channel_offset(first_closed), closed * geometry.channel_bytes, f"{closed} channels, not open"
            closed = 0
        if one is not None:
            yield geometry.channel_offset(index), geometry.channel_bytes, f"channel {index}: {_described(one, geometry.depth)}"
    yield geometry.arena_offset, arena.total_bytes, f"arena: {mib(arena.held_bytes)} held in {arena.held_blocks} blocks"


def _described(one: ChannelFigures, depth: int) -> str:
    return (
        f"{one.service!r} on worker {one.worker}, {one.lane}/{one.doorbell}, {one.calls} calls, {one.outstanding} of {depth} on their way"
    )


def as_svg(figures: SegmentFigures) -> str:
    """A drawing: the parts as rows, below them the arena to scale."""
    geometry, arena = figures.geometry, figures.arena
    body: list[str] = []
    y = 40
    for offset, nbytes, what in _parts(figures):
        kind = what.split(" ")[0].rstrip(":")
        color = _COLORS.get(kind, _COLORS["closed"])
        body.append(_box(_LEFT, y, SVG_WIDTH, _ROW, color, f"{what}, {nbytes} bytes"))
        body.append(_label(_LEFT + 8, y + 15, f"{offset}: {what} ({nbytes} bytes)"))
        y += _ROW + _GAP
    y += _GAP
    scale = SVG_WIDTH / arena.total_bytes
    start = geometry.arena_offset
    body.append(_box(_LEFT, y, SVG_WIDTH, 60, _COLORS["free"], f"free, largest extent {arena.largest_free_bytes} bytes"))
    body += [
        _box(_LEFT + (block.offset - start) * scale, y, max(1.0, block.nbytes * scale), 60, _COLORS["held"], _block(block))
        for block in arena.blocks
    ]
    x = _LEFT + (arena.cursor - start) * scale
    body.append(f'<path d="M {x:.2f} {y + 62} l -5 10 l 10 0 z" fill="#b03030"><title>cursor at {arena.cursor}</title></path>')
    y += 90
    body.append(
        _label(
            _LEFT, y, f"{mib(arena.held_bytes)} of {mib(arena.total_bytes)} held, {len(arena.blocks)} of {arena.held_blocks} blocks drawn"
        )
    )
    title = escape(f"{figures.name}, client {figures.owner}")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{SVG_WIDTH + 2 * _LEFT}" height="{y + 20}" font-family="sans-serif" font-size="12">\n'
        f"<title>{title}</title>\n{_label(_LEFT, 24, f'{figures.name}, client {figures.owner}, {mib(geometry.total_bytes)}')}\n"
        + "\n".join(body)
        + "\n</svg>\n"
    )


def _block(block: Block) -> str:
    return f"{block.nbytes} bytes at {block.offset}, held for {block.age_seconds:.1f} s"


def _box(x: float, y: float, width: float, height: float, color: str, title: str) -> str:
    extent = f'x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}"'
    return f'<rect {extent} fill="{color}" stroke="#8090a0" stroke-width="0.5"><title>{escape(title)}</title></rect>'


def _label(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.2f}" y="{y:.2f}">{escape(text)}</text>'
