"""``shmbroker ping``: how long a call takes, from here to a worker and back."""

from __future__ import annotations

import json

import click

from shmbroker.commands.options import instance_option, json_option, service_argument
from shmbroker.settings.kinds import DOORBELL_WORDS, LANE_WORDS
from shmbroker.settings.schema import DEFAULTS

CALL_SECONDS = 30.0
"""A worker that computes for its clients meanwhile answers between two calls."""

LARGEST_BYTES = 1 << 32


@click.command()
@service_argument
@instance_option()
@click.option("--count", type=click.IntRange(1, 1_000_000), default=1000, show_default=True, help="Calls.")
@click.option("--size", default="256", show_default=True, help="Bytes of the tensor each way, e.g. 8M; whole float32 numbers.")
@click.option("--lane", type=click.Choice(LANE_WORDS), default=DEFAULTS.lane, show_default=True, help="What carries the frames.")
@click.option(
    "--doorbell", type=click.Choice(DOORBELL_WORDS), default=DEFAULTS.doorbell, show_default=True, help="What wakes, on lane shm."
)
@json_option()
def ping(service: str, instance: str | None, count: int, size: str, lane: str, doorbell: str, as_json: bool) -> None:
    """Measure the round trip of calls to a worker of SERVICE: a tensor there, and its copy back, by an op that every worker has."""
    import msgspec

    from shmbroker.client.client import connect
    from shmbroker.commands.round_trip import measure
    from shmbroker.errors import BadInput
    from shmbroker.settings.sizes import parse_bytes

    nbytes = parse_bytes(size)
    if nbytes % 4 or nbytes > LARGEST_BYTES:
        raise BadInput(f"--size {size} is {nbytes} bytes: give a multiple of 4, at most {LARGEST_BYTES >> 30}G")
    room = (1 << 20) + 4 * nbytes  # the tensor, its copy, and what alignment takes
    with connect(instance, arena=room, name="shmbroker-ping", timeout=CALL_SECONDS, channels=1, depth=4) as client:
        channel = client.channel(service, lane=lane, doorbell=doorbell, wait=0.0)
        trip = measure(channel, count, nbytes // 4)
        who = {"service": service, "worker": channel.worker_name, "pid": channel.worker_pid, "device": channel.device}
        how = {"lane": channel.lane, "doorbell": channel.doorbell, "control": channel.control}
    if as_json:
        click.echo(json.dumps(who | how | msgspec.to_builtins(trip)))
        return
    click.echo(f"{service!r}: worker {who['worker']} (pid {who['pid']}) on {who['device']}")
    click.echo(
        f"lane {how['lane']}, doorbell {how['doorbell']}, control {how['control']}; {trip.calls} calls, {trip.nbytes} bytes each way"
    )
    click.echo(f"round trip: min {trip.min_us:.1f} us, median {trip.median_us:.1f} us, p99 {trip.p99_us:.1f} us, max {trip.max_us:.1f} us")
