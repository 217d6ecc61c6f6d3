"""A local HTTP server of one folder, with byte ranges as object stores have them."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class FolderServer(ThreadingHTTPServer):
    """Serves ``folder``; keeps what was asked for, and can be told to misbehave."""

    request_queue_size = 64

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.ranges = True
        self.failures = 0
        self.sent: list[tuple[str, int]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FolderServer

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        if self.server.failures:
            self.server.failures -= 1
            self._head(503, 0)
            return
        self._answer(with_body=True)

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self, with_body: bool) -> None:
        file = self.server.folder / self.path.lstrip("/")
        if not file.is_file():
            self._head(404, 0)
            return
        content = file.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and self.server.ranges:
            begin, last = int(asked[1]), int(asked[2] or len(content) - 1)
            part = content[begin : last + 1]
            where = f"bytes {begin}-{begin + len(part) - 1}/{len(content)}"
            self._head(206, len(part), {"Content-Range": where})
            content = part
        else:
            self._head(200, len(content))
        if with_body:
            self.server.sent.append((self.path, len(content)))
            self.wfile.write(content)

    def _head(
        self, status: int, length: int, more: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Length": str(length),
            "Accept-Ranges": "bytes" if self.server.ranges else "none",
            **(more or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()


@contextmanager
def serving(folder: Path) -> Iterator[FolderServer]:
    """A server of ``folder`` that runs until the end of the context."""
    with FolderServer(folder) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
