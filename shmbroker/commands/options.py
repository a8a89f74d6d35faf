"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


def instance_option(what: str = "Which broker; one machine may run several.") -> Callable[[Command], Command]:
    """``--instance NAME``; its help begins with ``what``."""
    return click.option("--instance", metavar="NAME", help=f"{what} Default: $SHMBROKER_INSTANCE, else 'default'.")


def json_option(what: str = "For programs.") -> Callable[[Command], Command]:
    """``--json``, given to the command as ``as_json``; its help is ``what``."""
    return click.option("--json", "as_json", is_flag=True, help=what)


def _services(context: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """For a shell that completes: the services that are offered now. A shell that asks is never told of an error."""
    from shmbroker.control.status import ask
    from shmbroker.errors import ShmBrokerError

    try:
        peers = ask(context.params.get("instance")).peers
    except (ShmBrokerError, OSError):
        return []
    return sorted({service for peer in peers for service in peer.services if service.startswith(incomplete)})


service_argument = click.argument("service", metavar="SERVICE", shell_complete=_services)
"""``SERVICE``: what a worker offers."""
