"""A replica that clients reach by themselves: TLS ends in its own process, and what supervises it sees no prompt."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from typing import TYPE_CHECKING

from shmbroker.errors import BadInput, ShmBrokerError
from tee_worker.scale_out.options import Options, address_of

if TYPE_CHECKING:
    from tee_worker.serving.endpoint import Endpoint

DRAIN_SECONDS = 10
"""How long requests may take to finish when the replica is to end; then they are told that it ends."""


class DirectServer:
    """Answers over TLS from :meth:`start` to :meth:`end`."""

    def __init__(self, endpoint: Endpoint, options: Options, slot: int) -> None:
        """``slot``: of the replica on its host, which is added to the port. Raises :class:`BadInput` where it cannot listen."""
        import uvicorn

        assert options.direct is not None
        host, first = address_of(options.direct)
        port = first + slot
        try:
            self._listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        except OSError as error:
            raise BadInput(f"--direct: cannot listen on {host} port {port}: {error.strerror or error}") from None
        config = uvicorn.Config(
            endpoint,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=DRAIN_SECONDS,
            lifespan="off",
            loop="asyncio",
            http="h11",
            ssl_certfile=options.tls_cert,
            ssl_keyfile=options.tls_key,
        )
        try:
            config.load()
        except (OSError, ssl.SSLError) as error:
            self._listening.close()
            raise BadInput(f"--tls-cert and --tls-key cannot be used on this node: {error}") from None
        self._server = uvicorn.Server(config)
        self._serving: asyncio.Future[None] | None = None

    async def start(self) -> None:
        """Once it returns, requests are answered."""
        self._serving = asyncio.ensure_future(self._server.serve(sockets=[self._listening]))
        while not self._server.started and not self._serving.done():
            await asyncio.sleep(0.01)
        self.check()

    def check(self) -> None:
        """Raise :class:`ShmBrokerError` where it answers no more."""
        if self._serving is None or self._serving.done():
            raise ShmBrokerError("the replica's own server has ended")

    async def end(self) -> None:
        """No new requests; those on their way have a while."""
        self._server.should_exit = True
        if self._serving is not None:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(self._serving, 2 * DRAIN_SECONDS)
        self._listening.close()
