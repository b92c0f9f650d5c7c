"""Who a process is to a store, what it says where that does not suffice, and that no secret is ever seen."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from base64 import b64encode
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from servers import ACCOUNT, FTP, Azure

from polyaxon_tracking import CheckpointManager, TrackingError, cached_path
from polyaxon_tracking.storage.credentials import locate
from polyaxon_tracking.storage.opening import open_directory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from servers import Proxy, Request, Store

pytest_plugins = ["store_fixtures"]

SECRET = "c2VjcmV0/VlJ+Q4"
VARIABLE = "polyaxon-stores.s3-KEY"  # as the platform names them
TRAIN = """
import logging, sys
from polyaxon_tracking import CheckpointManager, get_outputs_path
from polyaxon_tracking.training import Run
logging.basicConfig(level="DEBUG")
run = Run()
class Model: ...
model = Model()
manager = run.checkpoint_manager(model)
checkpoint = manager.latest()
step = 1 + (checkpoint.step if checkpoint else 0)
with manager.save(step) as path:
    open(path, "w").write(repr((run, manager, vars(run), vars(manager), checkpoint)))
print(repr(run), repr(manager), manager.latest(), run.outputs_path)
CheckpointManager(get_outputs_path("custom")).latest()
"""


class Tokens(ThreadingHTTPServer):
    """The server from which a service account of Google's gets its tokens."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Tokens)
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Tokens(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        body = json.dumps({"access_token": "token-of-the-account", "expires_in": 3600, "token_type": "Bearer"}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def tokens() -> Iterator[str]:
    server = Tokens()
    yield f"http://127.0.0.1:{server.server_address[1]}/token"
    server.shutdown()
    server.server_close()


def service_account(token_uri: str) -> dict[str, str]:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    return {
        "type": "service_account",
        "project_id": "project",
        "private_key_id": "1",
        "private_key": pem,
        "client_email": "account@project.iam.gserviceaccount.com",
        "token_uri": token_uri,
    }


def secrets_of(store: Store, proxy: Proxy, token_uri: str) -> dict[str, object]:
    if store.kind == "s3":
        return {
            "AWS_ACCESS_KEY_ID": "AKIAPLATFORM",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}",
            "AWS_SECURITY_TOKEN": f"token-{SECRET}",
            "AWS_REGION": "eu-west-1",
        }
    if store.kind == "gcs":
        return dict(service_account(token_uri))
    assert isinstance(store.server, Azure)
    return {"AZURE_CONNECTION_STRING": store.server.connection_string(proxy.port)}


def train(**environment: str) -> subprocess.CompletedProcess[str]:
    hidden = ("AWS_", "AZURE_", "FSSPEC_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    return subprocess.run(
        [sys.executable, "-c", TRAIN], env=kept | environment, capture_output=True, text=True, check=False, timeout=300
    )


def test_the_platforms_credentials_reach_the_driver_and_nothing_else(
    store: Store, proxy: Proxy, tokens: str, tmp_path: Path
) -> None:
    secrets = secrets_of(store, proxy, tokens)
    keys = {
        store.server.url(store.bucket): {"store": store.kind, "secret_key": VARIABLE},
        "s3://another": {"store": "s3", "secret_key": "not-there"},
    }
    settings = {
        "POLYAXON_RUN_OUTPUTS_PATH": store.url,
        "POLYSTORES_RUN_STORES_ACCESS_KEYS": json.dumps(keys),
        VARIABLE: json.dumps(secrets),
    }
    for _ in range(2):
        process = train(**settings)
        assert process.returncode == 0, process.stderr
    seen = process.stdout + process.stderr
    assert "step=0000000002" in seen
    authorizations = {request.authorization for request in proxy.requests}
    if store.kind == "s3":
        assert all("Credential=AKIAPLATFORM/" in sent and "/eu-west-1/" in sent for sent in authorizations)
    elif store.kind == "gcs":
        assert authorizations == {"Bearer token-of-the-account"}
    else:
        assert all(sent.startswith(f"SharedKey {ACCOUNT}:") for sent in authorizations)
    written = "".join(store.fs.cat_file(store.path(name)).decode() for name in store.names())
    for name, secret in secrets.items():
        if "SECRET" in name or name in {"AWS_SECURITY_TOKEN", "AZURE_CONNECTION_STRING", "private_key"}:
            for line in str(secret).splitlines():
                assert line not in seen + written, name


@pytest.mark.parametrize("store", ["s3"], indirect=True)  # the URLs of the others have no place for them
def test_credentials_in_a_url_are_used_and_never_shown(store: Store, proxy: Proxy) -> None:
    url = store.url.replace("s3://", "s3://AKIAINURL:c2VjcmV0%2FVlJ+Q4@")
    process = train(
        POLYAXON_RUN_OUTPUTS_PATH=url,
        AWS_ENDPOINT_URL=f"http://127.0.0.1:{proxy.port}",
        AWS_DEFAULT_REGION="us-east-1",
    )
    assert process.returncode == 0, process.stderr
    assert all("Credential=AKIAINURL/" in request.authorization for request in proxy.requests)
    written = "".join(store.fs.cat_file(store.path(name)).decode() for name in store.names())
    for secret in (SECRET, "c2VjcmV0%2FVlJ+Q4", "AKIAINURL"):
        assert secret not in written
        assert secret not in process.stdout
        assert secret not in process.stderr


# Other protocols


PASSWORD = "p/4@s'5 6?w"


@pytest.fixture
def ftp(tmp_path: Path) -> Iterator[FTP]:
    directory = tmp_path / "ftp"
    (directory / "run").mkdir(parents=True)
    server = FTP(directory, "alice", PASSWORD)
    yield server
    server.stop()


class Files(SimpleHTTPRequestHandler):
    """Serve files to who has the password or a signature."""

    asked: list[tuple[str, str]]

    def send_head(self) -> object:
        url = urlsplit(self.path)
        given = self.headers.get("Authorization", "")
        self.asked.append((given, url.query))
        if given != f"Basic {b64encode(f'alice:{PASSWORD}'.encode()).decode()}" and "sig=" not in url.query:
            self.send_error(401)
            return None
        return super().send_head()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def files(tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    directory = tmp_path / "files"
    directory.mkdir()
    Files.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Files, directory=str(directory)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def hides_the_password(*seen: str) -> bool:
    return not [part for part in (PASSWORD, quote(PASSWORD, safe=""), "alice") if any(part in text for text in seen)]


def test_credentials_in_the_url_of_a_server_are_used_and_never_shown(ftp: FTP) -> None:
    url = f"ftp://alice:{quote(PASSWORD, safe='')}@127.0.0.1:{ftp.port}/run"
    for _ in range(2):
        process = train(POLYAXON_RUN_OUTPUTS_PATH=url)
        assert process.returncode == 0, process.stderr
    written = [path.read_text() for path in ftp.directory.rglob("*.ckpt")]
    assert len(written) == 2
    place = f"ftp://127.0.0.1:{ftp.port}/run"
    assert f"{place}/checkpoints/resume/step=0000000002" in process.stdout
    assert place in written[0]
    assert hides_the_password(process.stdout, process.stderr, *written)


def test_doctor_tries_a_server_with_the_credentials_in_its_url_and_shows_none(ftp: FTP) -> None:
    url = f"ftp://alice:{quote(PASSWORD, safe='')}@127.0.0.1:{ftp.port}"
    settings = {
        "POLYAXON_RUN_OUTPUTS_PATH": f"{url}/run",
        "POLYAXON_RUN_DATA_PATHS": json.dumps({"digits": f"{url}/digits"}),
    }
    for arguments in (["checkpoints", f"{url}/run"], ["doctor"], ["doctor", "--json"]):
        process = subprocess.run(
            [sys.executable, "-m", "polyaxon_tracking", *arguments],
            env=os.environ | settings,
            capture_output=True,
            text=True,
            check=False,
        )
        assert "127.0.0.1" in process.stdout + process.stderr
        assert hides_the_password(process.stdout, process.stderr)
    rows = {row["name"]: row for row in json.loads(process.stdout)["checks"]}
    assert rows["outputs: writable"]["status"] == "ok", rows
    assert rows["outputs: access"]["value"] == "credentials in the URL"


def test_a_driver_that_cannot_copy_downloads_and_uploads(ftp: FTP) -> None:
    directory = open_directory(f"ftp://alice:{quote(PASSWORD, safe='')}@127.0.0.1:{ftp.port}/run")
    with directory.write("a") as staged:
        Path(staged).write_text("content")
    directory.copy(f"{directory.path}/a", "b")
    assert (ftp.directory / "run" / "b").read_text() == "content"
    with pytest.raises(FileNotFoundError):
        directory.copy(f"{directory.path}/none", "c")
    assert sorted(directory.names()) == ["a", "b"]


def test_checkpoints_are_listed_where_the_driver_knows_no_times(ftp: FTP) -> None:
    url = f"ftp://alice:{quote(PASSWORD, safe='')}@127.0.0.1:{ftp.port}/run"
    with CheckpointManager(url).save(7) as path:
        Path(path).write_text("content")
    command = [sys.executable, "-m", "polyaxon_tracking", "checkpoints", url]
    printed = [
        subprocess.run([*command, *more], capture_output=True, text=True, check=True).stdout
        for more in ([], ["--json"])
    ]
    assert printed[0].splitlines()[-1].split() == ["1", "7", "0", "7", "bytes", "unknown", "not", "verified"]
    [listed] = json.loads(printed[1])["checkpoints"]
    assert (listed["step"], listed["modified"], listed["age_seconds"]) == (7, None, None)


def test_a_wrong_password_is_reported_before_training_and_not_shown(ftp: FTP) -> None:
    process = train(POLYAXON_RUN_OUTPUTS_PATH=f"ftp://alice:hidden@127.0.0.1:{ftp.port}/run")
    last = process.stderr.splitlines()[-1]
    assert "which could not be used (The request failed: 530 wrong)" in last
    assert last.endswith("See that the store can be reached from here, and that credentials in the URL are right.")
    assert "hidden" not in process.stderr


def test_a_signed_url_is_used_and_never_shown(files: ThreadingHTTPServer, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / "files" / f"{name}.ckpt").write_text(name)
    code = """
import logging, sys
from polyaxon_tracking import cached_path
logging.basicConfig(level="DEBUG")
for name in "ab":
    path = cached_path(f"http://127.0.0.1:{sys.argv[1]}/{name}.ckpt?X-Amz-Expires=9&sig=hidden{name}")
    print(path, open(path).read())
cached_path(f"http://127.0.0.1:{sys.argv[1]}/c.ckpt?sig=hidden")
"""
    process = subprocess.run(
        [sys.executable, "-c", code, str(files.server_address[1])], capture_output=True, text=True, check=False
    )
    assert [line.rpartition("/")[2] for line in process.stdout.splitlines()] == ["a.ckpt a", "b.ckpt b"]
    assert {query for _, query in Files.asked[:2]} == {"X-Amz-Expires=9&sig=hiddena"}
    last = process.stderr.splitlines()[-1]
    assert last.startswith(f"FileNotFoundError: [Errno 2] Not found: http://127.0.0.1:{files.server_address[1]}/c.ckpt")
    assert "hidden" not in process.stdout + process.stderr


def test_the_password_for_a_directory_is_used_for_what_is_in_it(
    files: ThreadingHTTPServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    manager = CheckpointManager(tmp_path / "files" / "run")
    for step in (1, 2):
        with manager.save(step) as path:
            Path(path).write_text(f"step {step}")
    links = [f'<a href="{checkpoint.name}">{checkpoint.step}</a>' for checkpoint in manager.checkpoints()]
    (tmp_path / "files" / "run" / "index.html").write_text("".join(links))
    port = files.server_address[1]
    reader = CheckpointManager(f"http://alice:{quote(PASSWORD, safe='')}@127.0.0.1:{port}/run")
    latest = reader.latest()
    assert latest is not None
    assert latest.source.startswith(f"http://127.0.0.1:{port}/run/step=0000000002")
    assert Path(latest.path).read_text() == "step 2"
    reader.release()
    (tmp_path / "files" / "run" / latest.name).unlink()
    with pytest.raises(FileNotFoundError) as raised:
        cached_path(latest.source)
    assert hides_the_password(repr(reader), str(raised.value), caplog.text)


@pytest.mark.parametrize(
    ("url", "clean", "driver"),
    [
        ("ftp://host/a", "ftp://host/a", "ftp://host/a"),
        ("sftp://u:p%2Fq@host:22/a@b/", "sftp://host:22/a@b", "sftp://u:p%2Fq@host:22/a@b"),
        ("smb://group;u:p@w@host/share/a", "smb://host/share/a", "smb://group;u:p@w@host/share/a"),
        ("webdav://token@host", "webdav://host", "webdav://token@host"),
        ("sftp://u:p@[::1]:22/a@b", "sftp://[::1]:22/a@b", "sftp://u:p@[::1]:22/a@b"),
        ("HTTPS://u:p@host/a?X-Amz-Signature=s&b", "https://host/a", "https://u:p@host/a?X-Amz-Signature=s&b"),
        ("ftp://host/what?.ckpt", "ftp://host/what?.ckpt", "ftp://host/what?.ckpt"),
        ("oci://bucket@space/a", "oci://bucket@space/a", "oci://bucket@space/a"),
        ("hf://user/repo@main/a", "hf://user/repo@main/a", "hf://user/repo@main/a"),
        ("memory://bucket/a", "memory://bucket/a", "memory://bucket/a"),
    ],
)
def test_what_does_not_name_the_place_is_only_for_the_driver(url: str, clean: str, driver: str) -> None:
    found = locate(url)
    assert (found.url, found.secret_url) == (clean, driver)
    assert repr(found) == f"Location({clean!r})"


@pytest.mark.parametrize(
    "url",
    [
        "ftp://alice:hid/xyzzy@host/a",
        "ftp://alice:hid?xyzzy@host/a",
        "ftp://alice:hid#xyzzy@host/a",
        "ftp://alice:hid xyzzy@host/a",
        "https://alice:12?hidden@host/a",
        "simplecache::ftp://alice:hidden@host/a",
        "zip://a::https://alice:hidden@host/b.zip",
        "webdav://host/a?token=hidden",
        "s3://bucket/a?X-Amz-Signature=hidden",
    ],
)
def test_a_url_whose_secrets_cannot_be_distinguished_from_the_place_is_an_error(url: str) -> None:
    with pytest.raises(TrackingError, match=r"^Received the URL '[\w:]+://.*Expected ") as raised:
        locate(url)
    assert not [part for part in ("alice", "hid", "xyzzy") if part in str(raised.value)]


def test_a_directory_has_no_signature() -> None:
    with pytest.raises(TrackingError, match=r"^Received the URL 'https://host/a\?\*\*\*' of a directory. Expected"):
        CheckpointManager("https://host/a?sig=hidden")


# Errors before training starts


def message(store: Store, outputs: str | None = None, **environment: str) -> str:
    process = train(POLYAXON_RUN_OUTPUTS_PATH=outputs or store.url, **environment)
    assert process.returncode == 1
    assert SECRET not in process.stdout + process.stderr
    assert "Starting" not in process.stdout
    return process.stderr.splitlines()[-1]


def test_a_missing_bucket_is_reported_before_training(store: Store) -> None:
    text = message(store, store.url.replace(store.bucket, "bucket-that-is-not-there"), **store.environment)
    url = locate(store.url).url.replace(store.bucket, "bucket-that-is-not-there")
    assert text.startswith(
        f"polyaxon_tracking.errors.TrackingError: Received the URL {url!r} from POLYAXON_RUN_OUTPUTS_PATH"
    )
    assert "which does not exist" in text
    assert text.endswith("Create it, or correct the URL.")


def test_a_missing_bucket_is_not_an_empty_one(store: Store) -> None:
    url = store.url.replace(store.bucket, "bucket-that-is-not-there")
    [bucket] = re.findall(r"\w+://[^/]+", locate(url).url)
    told = re.escape(
        f"Received a URL in the bucket '{bucket}', which does not exist. Expected one that exists: create it, or correct the URL."
    )
    manager = CheckpointManager(f"{url}/checkpoints")
    with pytest.raises(TrackingError, match=told):
        manager.latest()
    with pytest.raises(TrackingError, match=told), manager.save(1):
        pytest.fail("it is told of before anything is written")
    store.server.make_bucket("bucket-that-is-not-there")
    assert manager.latest() is None


def test_a_training_may_be_allowed_to_list_its_own_directory_only(store: Store, proxy: Proxy) -> None:
    refused: list[Request] = []

    def refuse(request: Request) -> int | None:
        if "project" in request.path:  # of store.url
            return None
        refused.append(request)
        return 403

    proxy.answer = refuse
    assert CheckpointManager(store.url).latest() is None
    assert refused


def test_refused_credentials_are_reported_before_training(store: Store, proxy: Proxy) -> None:
    environment = store.environment
    if isinstance(store.server, Azure):
        connection_string = store.server.connection_string(proxy.port, key="AAAA" + SECRET.replace("/", "") + "A==")
        environment = {"AZURE_STORAGE_CONNECTION_STRING": connection_string}
    else:
        proxy.answer = lambda _: 403
    text = message(store, **environment)
    assert f"Received the URL {locate(store.url).url!r} from POLYAXON_RUN_OUTPUTS_PATH" in text
    assert "which this process may not write to" in text
    assert re.search(
        r"Give credentials \(.*POLYSTORES_RUN_STORES_ACCESS_KEYS\) that may write and delete there\.$", text
    )


def test_a_store_that_is_not_reached_is_reported_before_training(store: Store, proxy: Proxy) -> None:
    proxy.answer = lambda _: 505
    text = message(store, **store.environment)
    assert "which could not be used (The request failed: " in text
    assert "See that the store can be reached from here" in text


@pytest.mark.parametrize("store", ["s3", "azure"], indirect=True)  # without any, Google's is anonymous
def test_missing_credentials_are_reported_before_training(store: Store, tmp_path: Path) -> None:
    environment = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{store.server.port}", "AWS_EC2_METADATA_DISABLED": "true"}
    outputs = store.url if store.kind == "s3" else f"abfs://{store.bucket}/run"
    text = message(store, outputs, HOME=str(tmp_path), **environment)
    assert "POLYSTORES_RUN_STORES_ACCESS_KEYS" in text
    if store.kind == "s3":
        assert "which could not be used (No credentials were found: Unable to locate credentials)." in text


def test_a_store_that_is_not_there_is_reported_before_training(store: Store) -> None:
    environment = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "STORAGE_EMULATOR_HOST": "http://127.0.0.1:9"}
    if isinstance(store.server, Azure):
        environment["AZURE_STORAGE_CONNECTION_STRING"] = store.server.connection_string(9)
    text = message(store, **(store.environment | environment))
    assert "which could not be used (The store cannot be reached: " in text


def test_a_missing_driver_names_the_extra(store: Store) -> None:
    driver, extra = {"s3": ("s3fs", "s3"), "gcs": ("gcsfs", "gcs"), "azure": ("adlfs", "azure")}[store.kind]
    code = f"import sys; sys.modules[{driver!r}] = None\n{TRAIN}"
    for missing in (driver, "fsspec"):
        process = subprocess.run(
            [sys.executable, "-c", code.replace(driver, missing)],
            env=os.environ | {"POLYAXON_RUN_OUTPUTS_PATH": store.url},
            capture_output=True,
            text=True,
            check=False,
        )
        last = process.stderr.splitlines()[-1]
        assert last.startswith("ModuleNotFoundError: Received the URL "), process.stderr
        assert last.endswith(f'Install it with: pip install "polyaxon-tracking[{extra}]"')


def test_a_missing_fsspec_is_named_for_any_protocol() -> None:
    code = "import sys; sys.modules['fsspec'] = None; from polyaxon_tracking.cli import main; main()"
    command = [sys.executable, "-c", code, "checkpoints", "ftp://alice:hidden@host/run"]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert re.fullmatch(
        r"Error: Received the URL 'ftp://host', which needs a driver that is not installed: .+\. "
        r"Install it with: pip install fsspec\n",
        process.stderr,
    )


@pytest.mark.parametrize(
    ("keys", "secret", "problem"),
    [
        ("[", "", "Received malformed credentials of a store in the variable POLYSTORES_RUN_STORES_ACCESS_KEYS: it is not JSON"),
        ("[]", "", "it is not an object"),
        ('{"s3://bucket": "KEY"}', "", "the value of 's3://bucket' is no such object"),
        ('{"s3://bucket": {"secret_key": "KEY"}}', "", "the credentials for 's3://bucket' are in the variable KEY, which is not set"),
        ('{"s3://bucket": {"secret_key": "KEY"}}', "s3cr3t", "Received malformed credentials of a store in the variable KEY: it is not JSON"),
        ('{"s3://bucket": {"secret_key": "s3cr3t/+"}}', "", "are in the variable that it names, which is not set"),
        ('{"s3://bucket": {"secret_key": "s3cr3ts3cr3ts3cr3ts3cr3ts3cr3t0123456789"}}', "", "are in the variable that it names, which is not set"),
        ('{"s3://bucket": {"secret_key": "KEY"}}', '{"a": "s3cr3t"}', "it has none of these"),
    ],
)  # fmt: skip
def test_malformed_credentials_are_an_error_that_shows_none(
    keys: str, secret: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLYSTORES_RUN_STORES_ACCESS_KEYS", keys)
    monkeypatch.setenv("KEY", secret)
    with pytest.raises(TrackingError, match=re.escape(problem)) as info:
        CheckpointManager("s3://bucket/run").latest()
    assert "s3cr3t" not in str(info.value)


def test_the_most_specific_credentials_count(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {
        "s3://bucket": {"secret_key": "ONE"},
        "s3://bucket/run": {"secret_key": "TWO"},
        "s3://buck": {"secret_key": "THREE"},
    }
    monkeypatch.setenv("POLYSTORES_RUN_STORES_ACCESS_KEYS", json.dumps(keys))
    for name in ("ONE", "TWO", "THREE"):
        monkeypatch.setenv(name, json.dumps({"AWS_ACCESS_KEY_ID": name}))
    found = {
        url: locate(url).options for url in ("s3://bucket/other", "s3://bucket/run/1", "s3://bucket/runs", "s3://bucke")
    }
    assert found == {
        "s3://bucket/other": {"key": "ONE"},
        "s3://bucket/run/1": {"key": "TWO"},
        "s3://bucket/runs": {"key": "ONE"},
        "s3://bucke": {},
    }


@pytest.mark.parametrize(
    ("url", "clean", "options"),
    [
        ("s3://bucket/run/", "s3://bucket/run", {}),
        ("s3a://bucket/run", "s3://bucket/run", {}),
        ("s3://bucket/user@example.com/run", "s3://bucket/user@example.com/run", {}),
        ("s3://key:a%2Fb@own-bucket/run", "s3://own-bucket/run", {"key": "key", "secret": "a/b"}),
        ("gs://bucket", "gs://bucket", {}),
        ("wasbs://c@account.blob.core.windows.net/", "abfs://c@account.dfs.core.windows.net", {}),
        ("wasbs://c@account.blob.core.windows.net/a/b", "abfs://c@account.dfs.core.windows.net/a/b", {}),
        ("abfss://d@account.dfs.core.windows.net/a?sv=1&sig=x", "abfs://d@account.dfs.core.windows.net/a", {"sas_token": "sv=1&sig=x"}),
        ("abfs://e/a", "abfs://e/a", {}),
    ],
)  # fmt: skip
def test_a_url_is_taken_apart(url: str, clean: str, options: dict[str, str]) -> None:
    found = locate(url)
    assert (found.url, found.options) == (clean, options)
    assert repr(found) == f"Location({clean!r})"


@pytest.mark.parametrize(
    "url",
    ["s3://", "s3:///run", "gs://user:secret@bucket", "s3://bucket/run?versionId=secret", "wasbs://container/a", "wasbs://a:secret@account.blob.core.windows.net"],
)  # fmt: skip
def test_a_malformed_url_is_an_error(url: str) -> None:
    with pytest.raises(TrackingError, match=r"^Received the URL '\w+://.*Expected") as info:
        locate(url)
    assert "secret" not in str(info.value)


def test_an_unknown_protocol_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        TrackingError, match=r"^Received the URL 'nowhere://bucket', which cannot be opened: Protocol not known"
    ):
        CheckpointManager("nowhere://bucket/run").latest()
