"""A replica: the endpoint of ``tee-worker serve`` in a process of Ray's, with a broker and GPU workers of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from ray import serve

from shmbroker import console
from shmbroker.errors import ShmBrokerError
from tee_worker.scale_out.direct import DirectServer
from tee_worker.scale_out.health import Health
from tee_worker.scale_out.messages import Answering, Begun, Here, Part, encode, question_of
from tee_worker.scale_out.options import Options, check_fleet
from tee_worker.scale_out.peers import Peers
from tee_worker.scale_out.secrecy import check_own_cluster, keep_to_loopback
from tee_worker.serving.resumption import EXTENSION, Journal

if TYPE_CHECKING:
    from tee_worker.serving.endpoint import Endpoint
    from tee_worker.serving.served_model import ServedModel

log = logging.getLogger(__name__)

WORKER_SECONDS = 600.0
"""How long a GPU worker may take to read its weights before there is a replica."""


class Replica:
    """Made, asked and ended by Ray Serve."""

    async def __init__(self, options: Options) -> None:  # type: ignore[misc]
        """Load everything. Raises :class:`ShmBrokerError`."""
        keep_to_loopback()
        check_own_cluster(trusted=options.trust_cluster)
        check_fleet(options)
        console.share_cpus()
        logging.getLogger("shmbroker").setLevel(logging.WARNING)
        self._options = options
        self._health = Health(options.failover)
        self._stack = contextlib.ExitStack()
        loop = asyncio.get_running_loop()
        lost: asyncio.Future[str] = loop.create_future()

        def settle(text: str) -> None:
            if not lost.done():
                lost.set_result(text)

        def failed(text: str) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: so is the replica
                loop.call_soon_threadsafe(settle, text)

        self._peers = await asyncio.to_thread(Peers, options, failed)
        self._stack.callback(self._peers.close)
        loading = asyncio.ensure_future(asyncio.to_thread(self._load, options))
        either: list[asyncio.Future[Any]] = [loading, lost]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            raise ShmBrokerError(lost.result())
        self._served: ServedModel = loading.result()
        self._endpoint: Endpoint = await self._served.endpoint(self._stack, log.info)
        self._name = serve.get_replica_context().replica_id.unique_id
        self._direct: DirectServer | None = None
        if options.direct is not None:
            self._direct = DirectServer(self._endpoint, options, int(self._peers.instance.rpartition("-")[2]))
            await self._direct.start()

    def _load(self, options: Options) -> ServedModel:
        from transformers.utils import logging as of_transformers

        from tee_worker.serving.served_model import served_model
        from tee_worker.split_run import check

        of_transformers.set_verbosity_error()  # type: ignore[no-untyped-call]
        of_transformers.disable_progress_bar()  # type: ignore[no-untyped-call]
        check(options)
        return self._stack.enter_context(served_model(options, log.info, wait=WORKER_SECONDS))

    async def check_health(self) -> None:
        """Asked by Ray; raises where this replica is to be replaced.

        A wrong result of the GPU worker's is none of that: a new replica would ask the same host again, and somebody has to look. It answers 503, and
        requests go elsewhere.
        """
        if self._peers.failure:
            raise ShmBrokerError(self._peers.failure)
        if self._direct is not None:
            self._direct.check()
        if self._served.distrust():
            return
        trouble = await asyncio.to_thread(self._served.running.channel.trouble)
        verdict = self._health.verdict(trouble)
        if verdict:
            raise ShmBrokerError(verdict)

    async def answer(self, question: bytes, avoid: list[str]) -> AsyncGenerator[bytes, None]:
        """One request: its answer in parts, each some :data:`Answering` together. ``avoid`` is for the router."""
        asked = question_of(question)
        yield encode([Here(self._name)])
        journal = Journal(asked.resumption)
        parts: asyncio.Queue[Answering | None] = asyncio.Queue()
        body = [asked.body]

        async def receive() -> dict[str, Any]:
            if body:
                return {"type": "http.request", "body": body.pop(), "more_body": False}
            await asyncio.Future()  # who goes away has this cancelled
            raise AssertionError

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                head = [(bytes(name), bytes(value)) for name, value in message["headers"]]
                parts.put_nowait(Begun(message["status"], head, journal.created, journal.answers, journal.resumable))
            elif message["type"] == "http.response.body":
                parts.put_nowait(Part(message.get("body", b""), journal.taken(), journal.failed, not message.get("more_body", False)))

        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "scheme": "http",
            "method": asked.method,
            "path": asked.path,
            "raw_path": asked.path.encode(),
            "root_path": "",
            "query_string": asked.query,
            "headers": asked.headers,
            "client": None,
            "server": None,
            "extensions": {EXTENSION: journal},
        }
        task = asyncio.ensure_future(self._endpoint(scope, receive, send))
        task.add_done_callback(lambda _: parts.put_nowait(None))
        try:
            over = False
            while not over:
                ready = [await parts.get()]
                while not parts.empty():
                    ready.append(parts.get_nowait())
                over = ready[-1] is None
                told = [part for part in ready if part is not None]
                if told:
                    yield encode(told)
            task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def __del__(self) -> None:
        """Called by Ray when the replica is to end in peace; the keeper does it too, however it ends."""
        direct: DirectServer | None = getattr(self, "_direct", None)
        if direct is not None:
            await direct.end()
        if hasattr(self, "_endpoint"):
            self._endpoint.stop()
            await asyncio.to_thread(self._served.running.channel.close)
        if hasattr(self, "_stack"):
            await asyncio.to_thread(self._stack.close)
