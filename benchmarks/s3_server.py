"""Answer the requests of S3 by which objects are read, from a directory: `python s3_server.py PORT DIRECTORY`.

moto, the emulator of the tests, takes more processor time for a request than any client, so it would be what is
measured. This server sends files with ``sendfile``. It knows ListObjectsV2, HEAD, and GET with a range. The first
directories in the directory are the buckets. Entity tags are as after an upload by the command of AWS: the MD5 of the
content up to 8 MB, and no MD5 above.
"""

from __future__ import annotations

import hashlib
import os
import socket
import socketserver
import sys
from functools import cache
from pathlib import Path
from urllib.parse import parse_qs, unquote
from xml.sax.saxutils import escape

PART_BYTES = 8 * 2**20
MODIFIED = "Thu, 01 Jan 2026 00:00:00 GMT"


class Connection(socketserver.StreamRequestHandler):
    disable_nagle_algorithm = True

    def handle(self) -> None:
        root = sys.argv[2]
        while line := self.rfile.readline().decode():
            method, target, _ = line.split()
            wanted = ""
            while (header := self.rfile.readline()) != b"\r\n":
                if header[:6].lower() == b"range:":
                    wanted = header.decode().partition("=")[2].strip()
            path, _, query = target.partition("?")
            path = root + unquote(path)
            if os.path.isfile(path):
                self.send_file(method, path, wanted)
            elif "list-type=2" in query and os.path.isdir(path):
                self.send("200 OK", page(os.path.normpath(path), parse_qs(query)))
            else:
                self.send("404 Not Found", b"" if method == "HEAD" else b"<Error><Code>NoSuchKey</Code></Error>")

    def send(self, status: str, content: bytes) -> None:
        self.connection.sendall(f"HTTP/1.1 {status}\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content)

    def send_file(self, method: str, path: str, wanted: str) -> None:
        size = os.path.getsize(path)
        start, _, last = wanted.partition("-")
        first, end = int(start or 0), min(int(last or size) + bool(last), size)
        status = f"206 Partial Content\r\nContent-Range: bytes {first}-{end - 1}/{size}" if wanted else "200 OK"
        head = f"HTTP/1.1 {status}\r\nContent-Length: {end - first}\r\nETag: {tag(path)}\r\nLast-Modified: {MODIFIED}"
        more = socket.MSG_MORE if method == "GET" and end > first else 0
        self.connection.sendall(f"{head}\r\nAccept-Ranges: bytes\r\n\r\n".encode(), more)
        if method == "GET":
            with open(path, "rb") as file:
                while first < end:
                    first += os.sendfile(self.connection.fileno(), file.fileno(), first, end - first)


@cache
def tag(path: str) -> str:
    is_whole = os.path.getsize(path) <= PART_BYTES
    digest = hashlib.md5(Path(path).read_bytes() if is_whole else path.encode()).hexdigest()
    return f'"{digest}"' if is_whole else f'"{digest}-{-(-os.path.getsize(path) // PART_BYTES)}"'


@cache
def entries(bucket: str) -> list[tuple[str, str]]:
    """Return the keys of all objects in order, each with its entry in a listing."""
    keys = sorted(str(path.relative_to(bucket)) for path in Path(bucket).rglob("*") if path.is_file())
    return [(key, entry(key, f"{bucket}/{key}")) for key in keys]


def entry(key: str, path: str) -> str:
    return (
        f"<Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
        f"<ETag>{escape(tag(path))}</ETag><Size>{os.path.getsize(path)}</Size></Contents>"
    )


def page(bucket: str, query: dict[str, list[str]]) -> bytes:
    """Return one page of a listing: the entries after the continuation token, which is a key."""
    prefix, after, limit = (
        query.get(name, [default])[0]
        for name, default in (("prefix", ""), ("continuation-token", ""), ("max-keys", "1000"))
    )
    found = [(key, text) for key, text in entries(bucket) if key.startswith(prefix) and key > after]
    shown = found[: int(limit)]
    is_cut = len(shown) < len(found)
    more = f"<NextContinuationToken>{shown[-1][0]}</NextContinuationToken>" if is_cut else ""
    return (
        f"<ListBucketResult><KeyCount>{len(shown)}</KeyCount><IsTruncated>{str(is_cut).lower()}</IsTruncated>{more}"
        f"{''.join(text for _, text in shown)}</ListBucketResult>"
    ).encode()


class Server(socketserver.ThreadingTCPServer):
    daemon_threads = allow_reuse_address = True
    request_queue_size = 128


if __name__ == "__main__":
    Server(("127.0.0.1", int(sys.argv[1])), Connection).serve_forever()
