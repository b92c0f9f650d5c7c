"""The command as users start it: a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

COMMAND = [sys.executable, "-m", "polyaxon_tracking"]


@pytest.fixture
def command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Start ``polyaxon-tracking`` with arguments, and wait for its end."""

    def start(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
        environment = os.environ | options.pop("env", {})  # type: ignore[operator]
        return subprocess.run(  # type: ignore[call-overload,no-any-return]
            [*COMMAND, *arguments], capture_output=True, text=True, check=False, timeout=120, env=environment, **options
        )

    return start
