"""What tests of the callback for Hugging Face's Trainer share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def new_process(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """To call where a process would be started again: it does not know which trainings have come to their end."""

    def forget() -> None:
        monkeypatch.setattr("polyaxon_tracking.run._finished", {})
        monkeypatch.setattr("polyaxon_transformers.callback._finished", {})

    return forget
