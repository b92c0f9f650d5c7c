"""Train a small classifier with Keras; the environment says how and when it dies."""

from __future__ import annotations

import os
import sys
import time

import faults
import keras
import numpy as np

from polyaxon_keras import PolyaxonCallback

WEIGHTS_OF_DENSE = (4, 8)


@keras.saving.register_keras_serializable()
class Subclassed(keras.Model):
    def __init__(self, width: int = 8, **options: object) -> None:
        super().__init__(**options)
        self.width = width
        self.hidden = keras.layers.Dense(width, activation="relu")
        self.dropout = keras.layers.Dropout(0.2)
        self.out = keras.layers.Dense(2)

    def call(self, inputs: object, training: bool = False) -> object:
        return self.out(self.dropout(self.hidden(inputs), training=training))

    def get_config(self) -> dict[str, object]:
        return {**super().get_config(), "width": self.width}


class Adversaries(keras.Model):
    """Two optimizers by hand, which build themselves in the first step; that of ``compile`` is not used."""

    def __init__(self, optimizer: type[keras.optimizers.Optimizer] = keras.optimizers.Adam) -> None:
        super().__init__()
        self.generator, self.critic = (
            keras.Sequential([keras.Input((4,)), keras.layers.Dense(4), keras.layers.Dense(outputs)])
            for outputs in (4, 2)
        )
        self.of_generator, self.of_others = optimizer(0.01), [optimizer(0.02)]
        self.loss_of_critic = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.built = True
        self.compile()

    def train_step(self, batch: tuple[object, object]) -> dict[str, object]:
        inputs, labels = batch
        for optimizer, network in ((self.of_others[0], self.critic), (self.of_generator, self.generator)):
            weights = network.trainable_weights
            if keras.backend.backend() == "tensorflow":
                with sys.modules["tensorflow"].GradientTape() as tape:
                    loss = self.loss_of_critic(labels, self.critic(self.generator(inputs)))
                optimizer.apply(tape.gradient(loss, weights), weights)
            else:
                self.zero_grad()
                loss = self.loss_of_critic(labels, self.critic(self.generator(inputs)))
                loss.backward()
                with sys.modules["torch"].no_grad():
                    optimizer.apply([weight.value.grad for weight in weights], weights)
        return {"loss": loss}


def model(kind: str = "subclassed", width: int = 8, **compiled: object) -> keras.Model:
    """Return a compiled classifier: ``functional``, ``sequential``, ``unbuilt`` or ``subclassed`` (the last two: unbuilt)."""
    layers = [keras.layers.Dense(width, activation="relu"), keras.layers.Dropout(0.2), keras.layers.Dense(2)]
    if kind == "functional":
        inputs = outputs = keras.Input((4,))
        for layer in layers:
            outputs = layer(outputs)
        network = keras.Model(inputs, outputs)
    elif kind == "sequential":
        network = keras.Sequential([keras.Input((4,)), *layers])
    elif kind == "unbuilt":
        network = keras.Sequential(layers)
    else:
        network = Subclassed(width)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    network.compile(**{"optimizer": keras.optimizers.Adam(0.01), "loss": loss, **compiled})
    return network


def data() -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(0).normal(size=(72, 4)).astype("float32")
    return x, (x.sum(1) > 0).astype("int32")


def digest(network: keras.Model) -> str:
    return faults.digest_of(network.get_weights())


class DieAtStep(keras.callbacks.Callback):
    def on_train_batch_begin(self, batch: int, logs: object = None) -> None:
        if faults.is_due("DIE_AT_STEP", int(self.model.optimizer.iterations)):
            faults.die()


class Slow(keras.callbacks.Callback):
    def on_train_batch_end(self, batch: int, logs: object = None) -> None:
        time.sleep(float(os.environ.get("SECONDS_PER_BATCH", "0")))

    def on_test_batch_begin(self, batch: int, logs: object = None) -> None:
        if "SECONDS_PER_VALIDATION_BATCH" in os.environ:
            print("validating after", int(self.model.optimizer.iterations), flush=True)
            time.sleep(float(os.environ["SECONDS_PER_VALIDATION_BATCH"]))


class Late(keras.callbacks.Callback):
    """Send the signal when the last batch is done."""

    def on_train_end(self, logs: object = None) -> None:
        faults.die(os.environ["SIGNAL_AT_THE_END"])


class Raise(keras.callbacks.Callback):
    """Raise in the hook that is named."""

    def __init__(self, hook: str) -> None:
        super().__init__()
        setattr(self, hook, self.fail)

    def fail(self, *_: object, logs: object = None) -> None:
        if int(self.model.optimizer.iterations) >= 6:
            raise RuntimeError("mine")


class FailingData(keras.utils.PyDataset):
    """Raise where the third batch of the second epoch is read; Keras also reads the first ones before training."""

    thirds = 0

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        self.thirds += index == 2
        if self.thirds > 1:
            raise RuntimeError("mine")
        x, y = data()
        return x[16 * index : 16 * index + 16], y[16 * index : 16 * index + 16]


class FailingOptimizer(keras.optimizers.SGD):
    """Raise when it has updated the first variable of a step and not the others."""

    updated = 0

    def update_step(self, gradient: object, variable: object, learning_rate: object) -> None:
        self.updated += 1
        if self.updated > 6 * 4 + 1:
            raise RuntimeError("mine")
        super().update_step(gradient, variable, learning_rate)


def main() -> None:
    faults.prepare_process()
    keras.utils.set_random_seed(0)
    x, y = data()
    network = model(os.environ.get("KIND", "subclassed"))
    polyaxon = PolyaxonCallback(save_best_only=True, background="FOREGROUND" not in os.environ)
    callbacks: list[keras.callbacks.Callback] = [polyaxon, Slow()]
    if "DIE_AT_STEP" in os.environ:
        callbacks.append(DieAtStep())
    if "SIGNAL_AT_THE_END" in os.environ:
        callbacks.insert(0, Late())
    fails = os.environ.get("FAILS", "")
    if fails.startswith("on_"):
        callbacks.insert(0, Raise(fails))
    if fails == "optimizer":
        network.compile(FailingOptimizer(0.01), "sparse_categorical_crossentropy", run_eagerly=True)
    if fails == "data":
        network.fit(FailingData(), epochs=6, shuffle=False, verbose=0, callbacks=callbacks)
    network.fit(x, y, batch_size=16, epochs=6, validation_split=0.1, verbose=0, callbacks=callbacks)
    print("trained", int(network.optimizer.iterations), digest(network))


if __name__ == "__main__":
    sys.exit(main())
