"""Train a small classifier with Keras on two devices; the environment says how they share it, and when it dies."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

import faults
import keras
import numpy as np
import tensorflow as tf

from polyaxon_keras import PolyaxonCallback

RANK = int(os.environ.get("RANK", "0"))
ROWS = 64


def of_tensorflow() -> Any:
    """Return a scope in which variables are on two logical devices."""
    [cpu] = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope()


def of_jax(how: str) -> None:
    """Use two devices in this process, or one in each of two processes."""
    import jax

    if "COORDINATOR" in os.environ:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        # As keras.distribution.initialize does, which has no option for the time after which a silent process is dead.
        # On a busy machine a process that lives may be silent for seconds: 100 is JAX's default.
        seconds = int(os.environ.get("HEARTBEAT_SECONDS", "100"))
        jax.distributed.initialize(os.environ["COORDINATOR"], 2, RANK, heartbeat_timeout_seconds=seconds)
    else:
        jax.config.update("jax_num_cpu_devices", 2)
    if how == "DataParallel":
        keras.distribution.set_distribution(keras.distribution.DataParallel(auto_shard_dataset=False))
        return
    mesh = keras.distribution.DeviceMesh((1, 2), ["batch", "model"], keras.distribution.list_devices())
    layout = keras.distribution.LayoutMap(mesh)
    layout[".*kernel"] = (None, "model")
    keras.distribution.set_distribution(
        keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch", auto_shard_dataset=False)
    )


class AtBatch(keras.callbacks.Callback):
    """Count this process's batches, and do what the environment says before one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.batches = 0

    def asked_for(self, what: str) -> bool:
        return os.environ.get("ON_RANK", str(RANK)) == str(RANK) and os.environ.get(what) == str(self.batches)

    def on_train_batch_begin(self, batch: int, logs: object = None) -> None:
        if self.asked_for("DIE_AFTER"):
            faults.die()
        if self.asked_for("NO_ROOM_AFTER"):
            faults.fill_disk()
        self.batches += 1

    def on_test_batch_begin(self, batch: int, logs: object = None) -> None:
        if batch == 0 and self.asked_for("DIE_IN_VALIDATION_AFTER"):
            faults.die()


def digest(network: keras.Model) -> str:
    weights = [weight.value for weight in network.weights]
    if "COORDINATOR" in os.environ:
        from jax.experimental import multihost_utils

        weights = [multihost_utils.process_allgather(weight, tiled=True) for weight in weights]
    return faults.digest_of(map(keras.ops.convert_to_numpy, weights))


def main() -> None:
    how = os.environ["DISTRIBUTION"]
    scope = contextlib.nullcontext()
    if how == "MirroredStrategy":
        scope = of_tensorflow()
    else:
        of_jax(how)
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).normal(size=(ROWS, 4)).astype("float32")
    y = (x.sum(1) > 0).astype("int32")
    size = 16
    if how == "DataParallel" and "COORDINATOR" in os.environ:  # each process gives its part of every batch
        x, y, size = x[RANK::2], y[RANK::2], size // 2
    with scope:
        network = keras.Sequential(
            [keras.Input((4,)), keras.layers.Dense(8, "relu"), keras.layers.Dropout(0.2), keras.layers.Dense(2)]
        )
        network.compile(keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        polyaxon = PolyaxonCallback(monitor="loss", save_best_only=True, background="FOREGROUND" not in os.environ)
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(size)  # of several processes, Keras 3.10 takes nothing else
    validation = data if "DIE_IN_VALIDATION_AFTER" in os.environ else None
    network.fit(data, epochs=6, verbose=0, validation_data=validation, callbacks=[polyaxon, AtBatch()])
    print("trained", digest(network))


if __name__ == "__main__":
    sys.exit(main())
