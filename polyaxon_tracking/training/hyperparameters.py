"""Compare the hyperparameters in the script with those of the training that it is about to resume."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from polyaxon_tracking.errors import TrackingError
from polyaxon_tracking.redaction import mask_secrets

if TYPE_CHECKING:
    from polyaxon_tracking.training.session import TrainingSession

__all__ = ["Hyperparameters", "IfChanged", "accept_hyperparameters"]

_logger = logging.getLogger("polyaxon_tracking")

IfChanged = Literal["warn", "raise", "restart"]

# A training may be continued with more epochs.
_LENGTH_OF_TRAINING = {
    *("epochs", "max_epochs", "n_epochs", "num_epochs", "num_train_epochs"),
    *("max_steps", "max_train_steps", "total_steps", "T_max", "total_iters"),
}


class Hyperparameters:
    """The hyperparameters of one training, as the script makes them: only plain values, under dotted names.

    Anything else, and the number of epochs or steps to train, is left out.

    Args:
        restored: the hyperparameters that the framework restores from a checkpoint, such as those of the optimizer.
        script: the hyperparameters that come from the script also in a resumed training, such as the batch size.

    Examples:
        >>> saved = Hyperparameters(restored={"lr": 0.1}, script={"batch": {"size": 8}}).as_saved()
        >>> for change in Hyperparameters(restored={"lr": 0.2}, script={"batch": {"size": 16}}).changes(saved):
        ...     print(change)
        lr: 0.1 -> 0.2 (0.1 is used, from the checkpoint)
        batch.size: 8 -> 16 (16 is used, from the script)
    """

    def __init__(self, *, restored: Mapping[str, Any], script: Mapping[str, Any]) -> None:
        self._restored = _plain_values(restored)
        self._script = _plain_values(script)

    def changes(self, saved: Mapping[str, Any]) -> list[str]:
        """Return one text for each value that differs from `saved`, the result of an earlier `as_saved`."""
        texts = []
        for name, value in (self._restored | self._script).items():
            if name in saved and _differ(value, saved[name]):
                before, now = _shown(name, saved[name]), _shown(name, value)
                used, source = (now, "script") if name in self._script else (before, "checkpoint")
                texts.append(f"{name}: {before} -> {now} ({used} is used, from the {source})")
        return texts

    def as_saved(self, resumed: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return what to save with a training state: the values that training uses.

        Args:
            resumed: the hyperparameters saved with the checkpoint that training resumed from.
        """
        return self._restored | dict(resumed or {}) | self._script


def accept_hyperparameters(
    session: TrainingSession, source: str, saved: Mapping[str, Any] | None, current: Hyperparameters
) -> bool:
    """Return whether to resume, or to start from scratch because hyperparameters have changed.

    This is a collective. The option `if_changed` of the run decides.

    Args:
        session: the session of the training.
        source: the path or URL of the checkpoint that training is about to resume from.
        saved: the hyperparameters saved with it; ``None`` if an earlier version saved none.
        current: the hyperparameters in the script.

    Raises:
        TrackingError: hyperparameters have changed, and ``if_changed="raise"``.
    """
    changes, if_changed = current.changes(saved or {}), session.run.if_changed
    if if_changed == "raise":
        with session.process_group.share_errors():
            if changes:
                raise TrackingError(
                    f"Received other hyperparameters than those saved with {source}: {'; '.join(changes)}. "
                    f"Expected the same, because of if_changed='raise'. Undo the change, or pass resume=False or "
                    f"another outputs path to start from scratch; the checkpoint stays as it is."
                )
    restarts = if_changed == "restart" and any(session.process_group.gather(bool(changes)))
    if changes and session.is_writer:
        _logger.warning(
            "The hyperparameters in the script have changed since %s was saved: %s. %s",
            source,
            "; ".join(changes),
            "Training starts from scratch because of if_changed='restart', and the checkpoint is kept"
            if restarts
            else "To start from scratch with those in the script, pass if_changed='restart'",
        )
    return not restarts


def check_if_changed(value: object) -> None:
    """Raise a `TrackingError` unless `value` is one of the values of the option `if_changed`."""
    if value not in ("warn", "raise", "restart"):
        raise TrackingError(f"Received if_changed={value!r}. Expected 'warn', 'raise' or 'restart'.")


def _plain_values(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the plain values among `values`, with those of nested mappings under dotted names."""
    plain: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            plain |= _plain_values(value, f"{prefix}{key}.")
        elif str(key) not in _LENGTH_OF_TRAINING:
            items = [_number(item) for item in (value if isinstance(value, list | tuple) else [value])]
            if all(isinstance(item, bool | int | float | str | None) for item in items):
                plain[f"{prefix}{key}"] = items if isinstance(value, list | tuple) else items[0]
    return plain


def _number(value: Any) -> Any:
    """Return the number in a NumPy number or a tensor without dimensions; anything else unchanged."""
    return value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value


def _differ(value: Any, saved: Any) -> bool:
    return bool(value != saved) and repr(value) != repr(saved)  # NaN does not equal itself


def _shown(name: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = repr(value)
    is_secret = isinstance(value, str) and mask_secrets(f"{name}={value}") != f"{name}={value}"
    return "***" if is_secret else text
