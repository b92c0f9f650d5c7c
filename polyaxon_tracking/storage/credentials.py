"""Credentials for an object store: from the URL, from the platform, or found by the driver itself."""

from __future__ import annotations

import json
import os
import re
from typing import Any, NamedTuple
from urllib.parse import unquote

from polyaxon_tracking.errors import TrackingError
from polyaxon_tracking.redaction import shown_value

__all__ = ["Location", "locate", "locate_directory"]

# Polyaxon 0.4-0.6, polypod/templates/env_vars.py and stores/service.py.
ACCESS_KEYS = "POLYSTORES_RUN_STORES_ACCESS_KEYS"

_PROTOCOLS = {"s3a": "s3", "s3n": "s3", "gcs": "gs", "wasb": "abfs", "wasbs": "abfs", "abfss": "abfs", "az": "abfs"}

# In URLs of these protocols, the text before the "@" names a repository or a bucket, not a user.
_NAMES_BEFORE_AT = ("git", "github", "hf", "oci")

# Only a "?" with an option after it starts a query, because a name may contain a "?".
_QUERY = re.compile(r"\?[^/=]+=")

_AZURE_ACCOUNT = re.compile(r"([^@]+)@([^./@]+)\.(?:blob|dfs)\.core\.windows\.net")

# The names of the platform's keys, by the names of the drivers' arguments.
_S3_KEYS = {
    "key": "AWS_ACCESS_KEY_ID",
    "secret": "AWS_SECRET_ACCESS_KEY",
    "token": "AWS_SECURITY_TOKEN",
    "endpoint_url": "AWS_ENDPOINT_URL",
}
_AZURE_KEYS = {
    "account_name": "AZURE_ACCOUNT_NAME",
    "account_key": "AZURE_ACCOUNT_KEY",
    "connection_string": "AZURE_CONNECTION_STRING",
}

# `Location.options` and `Location.user_info` of the URLs that this process has seen, by bucket (or host). These secrets
# are stored nowhere else.
_seen: dict[str, tuple[dict[str, Any], str]] = {}


class Location(NamedTuple):
    """A location in an object store, with its credentials."""

    url: str
    """The URL without secrets, in the form that fsspec accepts."""
    protocol: str
    """The driver's protocol: ``s3``, ``gs``, ``abfs``, or another one that fsspec knows."""
    options: dict[str, Any]
    """Arguments for the driver; empty if the driver finds its credentials itself."""
    source: str | None
    """The environment variable that the credentials came from, or ``None``."""
    user_info: str = ""
    """The user and password in the URL, including the ``@``."""
    query: str = ""
    """The query of an HTTP URL, including the ``?``. It is secret if the URL is signed, because it grants access."""

    @property
    def secret_url(self) -> str:
        """The whole URL with its secrets, only for the driver."""
        scheme, _, rest = self.url.partition("://")
        return f"{scheme}://{self.user_info}{rest}{self.query}"

    def __repr__(self) -> str:
        return f"Location({self.url!r})"


def locate(url: str) -> Location:
    """Split `url` into the URL that may be shown and its secrets.

    Raises:
        TrackingError: the URL is malformed, or the platform's credentials for its store are.
    """
    scheme, _, rest = url.partition("://")
    protocol = _PROTOCOLS.get(scheme.lower(), scheme.lower())
    options: dict[str, Any] = {}
    user_info = query = ""
    if protocol == "abfs":
        rest, options = _split_azure_url(url, rest)
    elif protocol in ("s3", "gs"):
        rest, options = _split_bucket_url(url, rest, protocol)
    elif protocol not in _NAMES_BEFORE_AT:
        rest, user_info, query = _split_url(url, rest, protocol)
    if protocol in ("s3", "gs", "abfs") and not rest.partition("/")[0]:
        raise TrackingError(
            f"Received the URL {shown_value(url)}. Expected a bucket in it, such as {scheme}://bucket/path."
        )
    clean = f"{protocol}://{rest.rstrip('/')}"
    bucket = "/".join(clean.split("/", 3)[:3])
    if options or user_info:
        _seen[bucket] = options, user_info
    source = None
    if bucket in _seen:
        options, user_info = _seen[bucket]
    elif given := _platform_options(clean, protocol):
        options, source = given, ACCESS_KEYS
    return Location(clean, protocol, options, source, user_info, query)


def locate_directory(url: str) -> Location:
    """Split the `url` of a directory as `locate` does.

    Raises:
        TrackingError: the URL has a query, which belongs to a single object; or as `locate`.
    """
    location = locate(url)
    if location.query:
        raise TrackingError(
            f"Received the URL {shown_value(url)} of a directory. Expected one without a query: what is signed is one "
            f"object."
        )
    return location


def _split_azure_url(url: str, rest: str) -> tuple[str, dict[str, Any]]:
    """Convert Polyaxon's ``wasbs://container@account.blob.core.windows.net/path`` to the form that adlfs accepts."""
    rest, _, query = rest.partition("?")
    host, slash, path = rest.partition("/")
    if "@" in host:
        match = _AZURE_ACCOUNT.fullmatch(host)
        if match is None or ":" in host:
            raise TrackingError(
                f"Received the URL {shown_value(url)}. Expected container@account.blob.core.windows.net after the "
                f"'://', and the key of the account in AZURE_STORAGE_ACCOUNT_KEY or {ACCESS_KEYS}."
            )
        host = f"{match[1]}@{match[2]}.dfs.core.windows.net"
    elif url.startswith("wasb"):
        raise TrackingError(
            f"Received the URL {shown_value(url)}. Expected wasbs://container@account.blob.core.windows.net/path."
        )
    return host + slash + path, {"sas_token": query} if query else {}


def _split_bucket_url(url: str, rest: str, protocol: str) -> tuple[str, dict[str, Any]]:
    options: dict[str, Any] = {}
    # A bucket has no ":", so an "@" without a ":" before it is part of the path.
    if "@" in rest and ":" in rest.partition("/")[0]:
        if protocol != "s3":
            raise TrackingError(
                f"Received the URL {shown_value(url)}. Expected no credentials in it: use {ACCESS_KEYS}."
            )
        user_info, _, rest = rest.partition("@")
        key, _, secret = user_info.partition(":")
        options = {"key": unquote(key), "secret": unquote(secret)}
    if "?" in rest.partition("/")[0] or _QUERY.search(rest):
        raise TrackingError(f"Received the URL {shown_value(url)}. Expected only a bucket and a path, without a query.")
    return rest, options


def _split_url(url: str, rest: str, protocol: str) -> tuple[str, str, str]:
    """Split `rest` of `url` into the rest, the user info and the query. This is for protocols of no known store."""
    if re.search(r"::\w+://", url) and re.search(r"[@?]", rest):
        raise TrackingError(
            f"Received the URL {shown_value(url)}, in which '::' chains one to another. Expected no credentials in "
            f"such a URL: give the last one by itself."
        )
    authority, slash, path = rest.partition("/")
    user_info, at, host = authority.rpartition("@")
    # In "user:p/ss@host", the second half of the password is part of `path`.
    in_path = "@" in path and re.search(r":(?!\d*$)[^]]*$", host)
    if in_path or re.search(r"[\s?#[\]]", user_info):
        raise TrackingError(
            f"Received the URL {shown_value(url)}, whose user or password holds white space or one of /?#[]. Expected "
            f"these percent-encoded, such as %2F for /."
        )
    rest, query = f"{host}{slash}{path}", ""
    if protocol in ("http", "https"):
        rest, mark, query = rest.partition("?")
        query = mark + query
    elif _QUERY.search(rest):
        raise TrackingError(
            f"Received the URL {shown_value(url)}. Expected no query in it: give the options of the driver in the "
            f"variables or the file from which fsspec reads its configuration."
        )
    return rest, user_info + at, query


def access_keys() -> dict[str, str | None]:
    """Return the stores for which Polyaxon 0.x gives a run credentials, each with the variable that holds them.

    Raises:
        TrackingError: ``POLYSTORES_RUN_STORES_ACCESS_KEYS`` is malformed.
    """
    text = os.environ.get(ACCESS_KEYS, "").strip()
    if text in ("", "null"):
        return {}
    expected = '{"s3://bucket": {"store": "s3", "secret_key": "NAME_OF_A_VARIABLE"}}'
    stores = _json_object(text, ACCESS_KEYS, expected)
    for path, entry in stores.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("secret_key"), str | None):
            raise _malformed(ACCESS_KEYS, f"the value of {shown_value(path)} is no such object", expected)
    return {path: entry.get("secret_key") for path, entry in stores.items()}


def _platform_options(url: str, protocol: str) -> dict[str, Any]:
    """Return the driver's arguments for `url` from the credentials that Polyaxon 0.x gives a run."""
    found: tuple[str, str] | None = None
    for path, variable in access_keys().items():
        root = path.rstrip("/")
        if "://" in root:
            scheme, _, rest = root.partition("://")
            root = f"{_PROTOCOLS.get(scheme, scheme)}://{rest.replace('.blob.core.', '.dfs.core.', 1)}"
        if variable and f"{url}/".startswith(f"{root}/"):
            found = max(found or ("", ""), (root, variable), key=lambda known: len(known[0]))
    if found is None:
        return {}
    name = found[1]
    if not os.environ.get(name, "").strip():
        raise TrackingError(
            f"{ACCESS_KEYS} says that the credentials for {shown_value(found[0])} are in {variable_shown(name)}, which "
            f"is not set. Expected them there, as JSON. Have the secret of the store passed to the run, or unset "
            f"{ACCESS_KEYS} to use the driver's own credentials."
        )
    return _options(protocol, name, os.environ[name])


def _options(protocol: str, name: str, text: str) -> dict[str, Any]:
    if protocol == "gs":
        return {"token": _json_object(text, name, "the JSON of a service account's key file")}
    keys = {"s3": _S3_KEYS, "abfs": _AZURE_KEYS}.get(protocol)
    if keys is None:
        return {}
    expected = "JSON with " + ", ".join(keys.values())
    secrets = _json_object(text, name, expected)
    options: dict[str, Any] = {option: secrets[key] for option, key in keys.items() if secrets.get(key)}
    if not options:
        raise _malformed(name, "it has none of these", expected)
    if protocol == "s3" and secrets.get("AWS_REGION"):
        options["client_kwargs"] = {"region_name": secrets["AWS_REGION"]}
    return options


def _json_object(text: str, name: str, expected: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        # `from None`: the error holds the text, and the text holds secrets
        raise _malformed(name, "it is not JSON", expected) from None
    if not isinstance(value, dict):
        raise _malformed(name, "it is not an object", expected)
    return value


def _malformed(name: str, problem: str, expected: str) -> TrackingError:
    return TrackingError(
        f"Received malformed credentials of a store in {variable_shown(name)}: {problem}. Expected {expected}. "
        f"Correct it, or unset {ACCESS_KEYS} to use the driver's own credentials."
    )


def variable_shown(name: str) -> str:
    """Return `name` for a message, unless it may be a secret that was given in place of a name."""
    is_name = re.fullmatch(r"[\w.-]{1,63}", name) and not re.fullmatch(r"[A-Za-z0-9]{20,}", name)
    return f"the variable {name}" if is_name else "the variable that it names"
