"""The notices that only a cloud's metadata server gives: a spot machine is about to be taken back."""

from __future__ import annotations

import json
import logging
import os
import threading
from typing import TYPE_CHECKING

from polyaxon_tracking.environment import value_of
from polyaxon_tracking.errors import TrackingError, closest
from polyaxon_tracking.redaction import shown_value

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["PREEMPTION_NOTICES", "CloudNotices", "cloud_to_ask"]

_logger = logging.getLogger("polyaxon_tracking")

PREEMPTION_NOTICES = "POLYAXON_PREEMPTION_NOTICES"

# The address on every machine of AWS and of Azure.
_LINK_LOCAL = "http://169.254.169.254"
_SECONDS_BETWEEN = 5.0  # which AWS recommends
_SECONDS_PER_REQUEST = 2.0


class CloudNotices:
    """Ask the cloud that ``POLYAXON_PREEMPTION_NOTICES`` names, every five seconds, whether it takes this machine back.

    The variable is ``aws`` (``spot/instance-action`` of the instance metadata service, version 2), ``google``
    (``instance/preempted`` of the metadata server) or ``azure`` (scheduled events of the type ``Preempt``). If it is
    not set, nothing is asked.

    Args:
        request: called with the reason, each time that the cloud answers that it takes this machine back.

    Raises:
        TrackingError: the variable names no such cloud.

    Examples:
        >>> os.environ["POLYAXON_PREEMPTION_NOTICES"] = "amazon"
        >>> CloudNotices(print)
        Traceback (most recent call last):
            ...
        polyaxon_tracking.errors.TrackingError: POLYAXON_PREEMPTION_NOTICES was received as 'amazon'. ...
    """

    def __init__(self, request: Callable[[str], None]) -> None:
        self._cloud = cloud_to_ask()
        self._request = request
        self._stopped = threading.Event()

    def start(self) -> None:
        """Start asking, in a thread that does not keep the process alive."""
        if self._cloud is not None:
            self._stopped = threading.Event()
            arguments = (_ASK[self._cloud], self._stopped)
            threading.Thread(target=self._ask_until, args=arguments, daemon=True, name=PREEMPTION_NOTICES).start()

    def stop(self) -> None:
        """Stop asking."""
        self._stopped.set()

    def _ask_until(self, ask: Callable[[], str | None], stopped: threading.Event) -> None:
        is_warned = False
        while not stopped.is_set():
            try:
                reason = ask()
            except (OSError, ValueError, LookupError, TypeError) as error:  # no server, or one that answers otherwise
                if not is_warned:
                    is_warned = True
                    _logger.warning(
                        "The metadata server did not answer, so notices are not read as long as this lasts "
                        "(%s=%s): %s: %s",
                        PREEMPTION_NOTICES,
                        self._cloud,
                        type(error).__name__,
                        error,
                    )
            else:
                if reason and not stopped.is_set():
                    self._request(reason)
            stopped.wait(_SECONDS_BETWEEN)


def cloud_to_ask() -> str | None:
    """Return the cloud that the environment names, or ``None`` if it names none.

    Raises:
        TrackingError: it names no cloud that can be asked.
    """
    cloud = (value_of(PREEMPTION_NOTICES) or "").strip().lower()
    if cloud and cloud not in _ASK:
        raise TrackingError(
            f"{PREEMPTION_NOTICES} was received as {shown_value(cloud)}. Expected one of {', '.join(_ASK)}."
            f"{closest(cloud, list(_ASK))} Correct the variable, or unset it: then no cloud is asked."
        )
    return cloud or None


def _get(url: str, headers: dict[str, str], method: str = "GET") -> str:
    """Return the answer, without asking a proxy.

    Raises:
        OSError: there is no answer, or only a part of it.
    """
    from http.client import HTTPException  # here and not above: it takes 30 ms, and only this needs it
    from urllib.request import ProxyHandler, Request, build_opener

    request = Request(url, headers=headers, method=method)  # noqa: S310  # http
    try:
        with build_opener(ProxyHandler({})).open(request, timeout=_SECONDS_PER_REQUEST) as answer:
            return str(answer.read().decode())
    except HTTPException as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def _of_aws() -> str | None:
    """Return why AWS interrupts this spot instance, if so: there is no such path until two minutes before."""
    from urllib.error import HTTPError  # here, as above

    server = (os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or _LINK_LOCAL).rstrip("/")
    token = _get(f"{server}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, "PUT")
    try:
        text = _get(f"{server}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token})
    except HTTPError as error:
        if error.code == 404:  # noqa: PLR2004  # Not Found
            return None
        raise
    notice = json.loads(text)
    return f"AWS will {notice['action']} this machine at {notice['time']}"


def _of_google() -> str | None:
    server = os.environ.get("GCE_METADATA_HOST") or "metadata.google.internal"
    answer = _get(f"http://{server}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
    return "Google Cloud preempts this machine" if answer.strip() == "TRUE" else None


def _of_azure() -> str | None:
    """Return why Azure preempts this machine, if so: events of the other machines of a scale set are listed too."""
    answer = _get(f"{_LINK_LOCAL}/metadata/scheduledevents?api-version=2020-07-01", {"Metadata": "true"})
    preempted = [event for event in json.loads(answer)["Events"] if event["EventType"] == "Preempt"]
    if not preempted:
        return None
    url = f"{_LINK_LOCAL}/metadata/instance/compute/name?api-version=2021-02-01&format=text"
    name = _get(url, {"Metadata": "true"}).strip()
    own = [event for event in preempted if name in event["Resources"]]
    return f"Azure preempts this machine (not before {own[0]['NotBefore']})" if own else None


_ASK = {"aws": _of_aws, "google": _of_google, "azure": _of_azure}
