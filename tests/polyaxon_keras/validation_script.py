"""Train with all that a validation decides; the environment says how and when a validation is cut off."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import faults
import keras
import numpy as np
from keras_script import data, digest, model

from polyaxon_keras import PolyaxonCallback


class CutOff(keras.callbacks.Callback):
    """Cut off the end of an epoch: in the second batch of its validation, or in a callback's hook after that."""

    epoch = -1

    def on_epoch_begin(self, epoch: int, logs: object = None) -> None:
        self.epoch = epoch

    def on_test_batch_begin(self, batch: int, logs: object = None) -> None:
        if batch == 1 and "AT_THE_END" not in os.environ:
            self.cut_off()

    def on_epoch_end(self, epoch: int, logs: object = None) -> None:
        if "AT_THE_END" in os.environ:
            self.cut_off()

    def cut_off(self) -> None:
        if str(self.epoch) != os.environ.get("EPOCH", "2"):
            return
        if os.environ["CUT_OFF"] == "exception":
            raise RuntimeError("mine")
        faults.die(os.environ["CUT_OFF"])


class Halves(keras.callbacks.Callback):
    """Swap other weights in for the validation, as a user's callback may."""

    weights: list[np.ndarray] = []  # noqa: RUF012  # never changed in place

    def on_test_begin(self, logs: object = None) -> None:
        self.weights = self.model.get_weights()
        self.model.set_weights([weight / 2 for weight in self.weights])

    def on_test_end(self, logs: object = None) -> None:
        self.model.set_weights(self.weights)


class Curves(keras.callbacks.Callback):
    """Append what is logged to a file."""

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        with Path(os.environ["CURVES"]).open("a") as file:
            logged = {name: float(value) for name, value in (logs or {}).items()}
            file.write(json.dumps([epoch, float(self.model.optimizer.learning_rate), logged]) + "\n")


def main() -> None:
    keras.utils.set_random_seed(0)
    x, y = data()
    swap = os.environ.get("SWAP", "")
    use_ema = swap in ("test", "epoch")
    network = model(
        os.environ.get("KIND", "subclassed"),
        optimizer=keras.optimizers.Adam(0.01, use_ema=use_ema, ema_momentum=0.9),
        metrics=["accuracy"],
        jit_compile=False,
    )
    early_stopping = keras.callbacks.EarlyStopping("val_loss", min_delta=0.5, patience=4)
    plateau = keras.callbacks.ReduceLROnPlateau("val_loss", min_delta=0.2, patience=2)
    polyaxon = PolyaxonCallback(
        save_best_only=True, restore=[early_stopping, plateau], background="FOREGROUND" not in os.environ
    )
    schedule = keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.95 * rate)
    callbacks = [polyaxon, Curves(), early_stopping, plateau, schedule]
    if use_ema:
        callbacks.insert(1, keras.callbacks.SwapEMAWeights(swap_on_epoch=swap == "epoch"))
    if swap == "own":
        callbacks.append(Halves())
    if "CUT_OFF" in os.environ:
        callbacks.append(CutOff())
    history = network.fit(
        x[:64],
        y[:64],
        batch_size=16,
        epochs=8,
        validation_data=(x[:48], y[:48]),
        validation_batch_size=16,
        verbose=0,
        callbacks=callbacks,
    )
    trained = {
        "steps": int(network.optimizer.iterations),
        "epochs": history.epoch[-1],
        "weights": digest(network),
        "averages": [float(np.sum(keras.ops.convert_to_numpy(variable))) for variable in _averages(network)],
        "early stopping": [early_stopping.wait, early_stopping.stopped_epoch, float(early_stopping.best)],
        "plateau": [plateau.wait, float(network.optimizer.learning_rate)],
        "best": [float(polyaxon.best), digest(keras.saving.load_model(polyaxon.filepath))],
    }
    sys.stdout.write(f"{json.dumps(trained)}\n")


def _averages(network: keras.Model) -> list[keras.Variable]:
    return getattr(network.optimizer, "_model_variables_moving_average", [])


if __name__ == "__main__":
    main()
