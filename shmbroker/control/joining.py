"""What every process that joins a broker has to know first: which instance, under which name, and how to ask."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TypeVar

from shmbroker.control.access import KEYS_VARIABLE
from shmbroker.control.endpoint import may_listen, transport_of
from shmbroker.control.messages import Message
from shmbroker.control.sockets import Requester
from shmbroker.errors import BadInput, BrokerUnreachable
from shmbroker.memory.names import check_instance
from shmbroker.settings.load import current
from shmbroker.settings.schema import DEFAULTS

Answer = TypeVar("Answer", bound=Message)

DEFAULT_INSTANCE = DEFAULTS.instance
INSTANCE_VARIABLE = "SHMBROKER_INSTANCE"
PRIVATE_INSTANCE = "local-{}-{}"
"""How private brokers' instances are named: by the pid of their process, and a part of an id."""

MAX_NAME = 100

_PRIVATE = re.compile(PRIVATE_INSTANCE.format(r"(\d+)", "[0-9a-f]+"))

ASK_SECONDS = 3.0
"""How long a broker on the same machine may take to answer before it is taken for absent."""


def resolve_instance(instance: str | None) -> str:
    """``instance``, else that of the settings (``$SHMBROKER_INSTANCE``), else ``default``."""
    return check_instance(instance or current().instance)


def peer_name(told: str | None = None) -> str:
    """A name for people: ``told``, else the program's, and its pid. Raises :class:`BadInput` for one that cannot be printed in a line."""
    name = told if told is not None else f"{Path(sys.argv[0]).name or 'python'}-{os.getpid()}"
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= MAX_NAME:
        raise BadInput(f"name {name!r} cannot be used: 1 to {MAX_NAME} printable characters")
    return name


def ask_broker(requester: Requester, message: Message, answer: type[Answer], instance: str, timeout: float = ASK_SECONDS) -> Answer:
    """Ask the broker. Raises :class:`BrokerUnreachable` that says how to start one, or that keys differ, when nobody answers."""
    try:
        if not may_listen(requester.endpoint):
            raise TimeoutError  # no need to wait for nobody
        return requester.ask(message, answer, timeout, lambda: may_listen(requester.endpoint))
    except TimeoutError:
        raise BrokerUnreachable(_why_nobody_answers(requester.endpoint, instance)) from None


def _why_nobody_answers(endpoint: str, instance: str) -> str:
    private = _PRIVATE.fullmatch(instance)
    if private:
        return (
            f"the private broker of process {private[1]} does not answer any more ({endpoint}): it ends with its 'with local_broker():' block, or with that "
            "process; begin a new one, and connect inside of it"
        )
    command = "shmbroker serve" if instance == DEFAULT_INSTANCE else f"shmbroker serve --instance {instance}"
    if transport_of(endpoint) == "tcp":
        if may_listen(endpoint):
            return (
                f"whoever listens at {endpoint} does not answer: most likely its keys are others than those of this process; {KEYS_VARIABLE} must "
                "name the folder that the broker was started with (--keys), or a copy of it"
            )
        command += f" --control {endpoint} --keys DIR"
    return f"no broker answers for instance {instance!r} at {endpoint}: start one with '{command}'"
