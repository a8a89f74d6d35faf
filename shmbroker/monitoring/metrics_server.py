"""``/metrics`` and ``/healthz`` of the broker, over HTTP on loopback, in threads of their own."""

from __future__ import annotations

import contextlib
import logging
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
    allow_reuse_address = True

    def __init__(self, port: int, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._turns = threading.Semaphore(MOST_REQUESTS)
        super().__init__((HOST, port), _Handler)

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

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's asks the name service who 127.0.0.1 is

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


@contextlib.contextmanager
def serving_metrics(broker: Watched, port: int) -> Iterator[None]:
    """Serve the metrics of ``broker`` for the length of a block; ``port`` 0 for any, which is logged. A port that is taken is a warning."""
    registry = CollectorRegistry()
    registry.register(InstanceCollector(broker))
    ProcessCollector("shmbroker", registry=registry)
    try:
        server = _Server(port, registry)
    except OSError as error:
        log.warning("no metrics: port %d of %s cannot be had (%s); choose another --metrics-port, or 0 for any", port, HOST, error.strerror)
        yield
        return
    log.info("metrics at http://%s:%d/metrics", HOST, server.server_address[1])
    thread = threading.Thread(target=server.serve_forever, name="shmbroker-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
