"""A script that is started again with other hyperparameters: Hugging Face's Trainer."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
from restarts import forget_trainings
from transformers import set_seed
from transformers_script import digest, tiny, trainer

from polyaxon_tracking import TrackingError
from polyaxon_transformers import PolyaxonCallback

if TYPE_CHECKING:
    from transformers import Trainer

QUIET: dict[str, Any] = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}


def start(epochs: int, if_changed: Any = "warn", *, name: str | None = None, **options: Any) -> Trainer:
    """Train until `epochs`, as the next start of the script."""
    forget_trainings()
    set_seed(0)
    polyaxon = PolyaxonCallback(resume=True, if_changed=if_changed, name=name)
    training = trainer(polyaxon, num_train_epochs=epochs, lr_scheduler_type="constant", **QUIET | options)
    training.train()
    return training


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    caplog.clear()
    return [message for message in found if "hyperparameters" in message]


def test_the_same_script_with_more_epochs_warns_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    for epochs in (1, 2):
        assert start(epochs).state.global_step == 4 * epochs
    assert warnings(caplog) == []


def test_a_warning_names_what_changed_and_what_is_used(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny()
    start(1, model=model)
    model = tiny()
    model.config.classifier_dropout = 0.5
    for epochs in (2, 3):
        training = start(epochs, model=model, learning_rate=1.0, weight_decay=0.1, max_grad_norm=2.0)
        (message,) = warnings(caplog)
        optimizer: Any = training.optimizer
        assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.01]
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.0]
        assert "learning_rate: 0.01 -> 1 (0.01 is used, from the checkpoint)" in message
        assert "weight_decay: 0 -> 0.1 (0 is used, from the checkpoint)" in message
        assert ("max_grad_norm: 1 -> 2 (2 is used, from the script)" in message) == (epochs == 2)


def test_raise_ends_before_a_batch_is_trained() -> None:
    start(1)
    model = tiny()
    before = digest(model)
    with pytest.raises(TrackingError, match=r"learning_rate: 0\.01 -> 1 .*if_changed='raise'"):
        start(2, "raise", model=model, learning_rate=1.0)
    assert digest(model) == before


@pytest.mark.parametrize("change", [{"learning_rate": 0.1}, {"max_grad_norm": 2.0}, {"optim": "sgd"}], ids=str)
def test_restart_starts_from_scratch_and_then_resumes_what_it_started(
    change: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    start(2)
    training = start(1, "restart", **change)
    assert training.state.global_step == 4
    assert "starts from scratch because of if_changed='restart'" in warnings(caplog)[0]
    assert digest(training.model) == digest(start(1, name="alone", **change).model)
    caplog.clear()
    assert start(3, "restart", **change).state.global_step == 12
    assert warnings(caplog) == []
