"""``tee-worker ray``: replicas on a Ray cluster. Nothing heavy is imported before it is run."""

from __future__ import annotations

import signal
import sys
from typing import Any

import click

from shmbroker import console
from tee_worker.cli_options import defaulted, model_option, run_options, serve_options
from tee_worker.scale_out.options import Autoscale, Options


def _autoscale(context: click.Context, option: click.Parameter, told: str | None) -> Autoscale | None:
    return None if told is None else Autoscale.parsed(told)


@click.command()
@model_option
@serve_options(Options)
@click.option("--replicas", type=click.IntRange(1), default=2, show_default=True, help="How many; with --autoscale, in the beginning.")
@click.option("--autoscale", callback=_autoscale, metavar="LEAST:MOST", help="As many as the load asks for, e.g. 1:4.")
@click.option("--address", metavar="ADDRESS", help="Of a Ray cluster that is there: auto, or HOST:PORT. Default: one is started here.")
@click.option(
    "--local-nodes", type=click.IntRange(1), metavar="N", help="Start a cluster of N nodes on this machine, to try it out. Default: 1."
)
@defaulted(Options, "--device", help="Of the GPU workers: cpu, cuda or cuda:N.")
@defaulted(Options, "--cpus", type=float, help="That Ray counts for one replica: threads of either side.")
@click.option("--gpus", type=float, help="That Ray counts for one replica. Default: 1 on device cuda.")
@click.option(
    "--i-trust-the-cluster", "trust_cluster", is_flag=True, help="Also one that is not on loopback and has neither TLS nor tokens."
)
@click.option("--direct", metavar="HOST:PORT", help="Where each replica listens itself, over TLS, past Ray's proxies (docs/scale-out.md).")
@click.option("--tls-cert", metavar="FILE", help="For --direct: certificate chain, PEM, on each node.")
@click.option("--tls-key", metavar="FILE", help="For --direct: its key.")
@run_options(Options, peers=False)
def ray(until_exit: int, replicas: int, autoscale: Autoscale | None, address: str | None, local_nodes: int | None, **options: Any) -> None:
    """Serve replicas of a split model, each with its own broker and GPU worker, behind one endpoint, until SIGTERM or Ctrl-C."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    console.end_with(until_exit)
    from tee_worker.scale_out.run import run

    run(Options(**options), replicas, autoscale, address, local_nodes, lambda note: click.echo(note, err=True))
