"""A server on a free loopback port that answers as the metadata servers of AWS, Google and Azure are documented to."""

from __future__ import annotations

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

TOKEN = "a-token"
MACHINE = "machine-3"


class MetadataServer(ThreadingHTTPServer):
    """The three protocols."""

    preempted: str | None = None
    """The machine that is about to be taken back."""
    events: str | None = None
    """The answer about Azure's events, if it is another than the documented one."""

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: MetadataServer

    def do_PUT(self) -> None:
        lifetime = int(self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "0"))
        is_valid = self.path == "/latest/api/token" and 1 <= lifetime <= 21600
        self._answer(*((200, TOKEN) if is_valid else (400, "")))

    def do_GET(self) -> None:
        preempted = self.server.preempted
        if self.path == "/latest/meta-data/spot/instance-action":
            if self.headers.get("X-aws-ec2-metadata-token") != TOKEN:
                self._answer(401, "Unauthorized")
            elif preempted != MACHINE:
                self._answer(404, "Not Found")
            else:
                self._answer(200, json.dumps({"action": "terminate", "time": "2026-11-27T16:02:00Z"}))
        elif self.path == "/computeMetadata/v1/instance/preempted":
            if self.headers.get("Metadata-Flavor") != "Google":
                self._answer(403, "Forbidden")
            else:
                self._answer(200, "TRUE" if preempted == MACHINE else "FALSE")
        elif self.headers.get("Metadata") != "true":
            self._answer(400, "Bad Request")
        elif self.path.startswith("/metadata/scheduledevents?api-version="):
            freeze = {"EventType": "Freeze", "Resources": [MACHINE], "NotBefore": "Fri, 27 Nov 2026 15:00:00 GMT"}
            preempt = {"EventType": "Preempt", "Resources": [preempted], "NotBefore": "Fri, 27 Nov 2026 16:02:00 GMT"}
            events = json.dumps({"Events": [freeze, preempt] if preempted else [freeze]})
            self._answer(200, events if self.server.events is None else self.server.events)
        elif self.path.startswith("/metadata/instance/compute/name?api-version="):
            self._answer(200, MACHINE)
        else:
            self._answer(404, "Not Found")

    def _answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Print nothing."""


@contextlib.contextmanager
def metadata_server() -> Iterator[MetadataServer]:
    """Start the server, and stop it after the block."""
    with MetadataServer(("127.0.0.1", 0), _Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
