"""Replicas of a split model on a Ray cluster, behind one OpenAI-compatible endpoint (docs/scale-out.md).

``serve.run(deployment(Options(model=...), replicas=2))`` from Python, ``tee-worker ray`` from a shell, :func:`application` from a configuration file of
Ray Serve's. Needs ``pip install 'shmbroker[ray]'``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import msgspec

from shmbroker.errors import BadInput
from tee_worker.run_options import API_KEY_VARIABLE
from tee_worker.scale_out.options import Autoscale, Options, check_fleet

__all__ = ["Autoscale", "Options", "application", "deployment"]


def deployment(options: Options, *, replicas: int = 2, autoscale: Autoscale | None = None) -> Any:
    """The application, for ``ray.serve.run``: ``replicas`` of the model, or as many as the load asks for, and what takes requests to them.

    Raises :class:`BadInput` for options that a replica cannot have, and without Ray.
    """
    check_fleet(options)
    if replicas < 1:
        raise BadInput(f"--replicas {replicas}: give 1 or more")
    try:
        from tee_worker.scale_out.fleet import fleet
    except ImportError as error:
        raise BadInput(f"replicas need packages that are not installed ({error}): pip install 'shmbroker[ray]'") from None
    return fleet(options, replicas, autoscale)


def application(arguments: Mapping[str, Any]) -> Any:
    """:func:`deployment` for a configuration file of Ray Serve's, as ``import_path: tee_worker.ray:application``.

    Its ``args``: fields of :class:`Options`, ``replicas``, ``autoscale`` (``1:4``). The API key is that of $SHMBROKER_API_KEY. Raises :class:`BadInput`.
    """
    fields = {"api_key": os.environ.get(API_KEY_VARIABLE), **arguments}
    replicas, autoscale = fields.pop("replicas", 2), fields.pop("autoscale", None)
    known = {field.name for field in msgspec.structs.fields(Options)}
    unknown = sorted(set(fields) - known)
    if unknown:
        raise BadInput(f"args: {unknown[0]!r} is no option of a replica; there are: {', '.join(sorted(known))}, replicas, autoscale")
    try:
        options = msgspec.convert(fields, Options)
        count = msgspec.convert(replicas, int)
    except msgspec.ValidationError as error:
        raise BadInput(f"args: {error}") from None
    return deployment(options, replicas=count, autoscale=None if autoscale is None else Autoscale.parsed(str(autoscale)))
