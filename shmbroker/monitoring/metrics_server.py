"""``/metrics`` and ``/healthz`` of the broker, over HTTP on loopback or on a socket that it is handed, in threads of their own."""

from __future__ import annotations

import contextlib
import logging
import socket
import socketserver
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from shmbroker.monitoring.metrics import InstanceCollector, Watched

log = logging.getLogger(__name__)

HOST = "127.0.0.1"

MOST_REQUESTS = 4
"""At a time; more are turned away, as the broker is to stay small."""

REQUEST_SECONDS = 5.0
"""How long a client of the HTTP server may take to ask."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, listener: socket.socket, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._turns = threading.Semaphore(MOST_REQUESTS)
        # That of TCPServer would make a socket of its own, which a sandbox without a network forbids.
        socketserver.BaseServer.__init__(self, listener.getsockname(), _Handler)
        self.socket = listener

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._turns.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._turns.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a request for metrics failed", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    timeout = REQUEST_SECONDS
    server: _Server

    def do_GET(self) -> None:
        """Answer one request."""
        path = self.path.partition("?")[0]
        if path == "/metrics":
            self._answer(200, CONTENT_TYPE_LATEST, generate_latest(self.server.registry))
        elif path == "/healthz":
            self._answer(200, "text/plain; charset=utf-8", b"ok\n")
        else:
            self._answer(404, "text/plain; charset=utf-8", b"there are /metrics and /healthz\n")

    def _answer(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class names it so
        log.debug(format, *args)


def listen(port: int) -> socket.socket | None:
    """A socket that listens on ``port`` of loopback; 0 for any. One that is taken, or may not be had, is a warning, and None."""
    try:
        return socket.create_server((HOST, port))
    except OSError as error:
        why = error.strerror or str(error)
        log.warning("no metrics: port %d of %s cannot be had (%s); choose another --metrics-port, or 0 for any", port, HOST, why)
        return None


@contextlib.contextmanager
def serving_metrics(broker: Watched, listener: socket.socket) -> Iterator[None]:
    """Serve the metrics of ``broker`` on ``listener`` for the length of a block, at whose end it is closed."""
    registry = CollectorRegistry()
    registry.register(InstanceCollector(broker))
    ProcessCollector("shmbroker", registry=registry)
    server = _Server(listener, registry)
    where = listener.getsockname()
    log.info(
        "metrics at %s", f"http://{where[0]}:{where[1]}/metrics" if isinstance(where, tuple) else f"unix socket {where}, path /metrics"
    )
    thread = threading.Thread(target=server.serve_forever, name="shmbroker-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
