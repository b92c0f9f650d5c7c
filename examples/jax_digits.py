"""Handwritten digits with JAX, in a loop that resumes after a kill: `python examples/jax_digits.py`.

Two functions save and load the state, so that a loop on NumPy or anything else looks the same.
"""

from __future__ import annotations

import logging

import jax
import jax.numpy as jnp
import numpy as np

from digits import LOCAL, load
from polyaxon_tracking import StepLoop, get_log_level

STEPS, BATCH_SIZE, LEARNING_RATE, MOMENTUM = 1000, 64, 0.05, 0.9


def loss(weights: dict[str, jax.Array], images: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the cross-entropy of a network with one hidden layer."""
    return -jax.nn.log_softmax(logits(weights, images))[jnp.arange(len(labels)), labels].mean()


def logits(weights: dict[str, jax.Array], images: jax.Array) -> jax.Array:
    """Return the scores of the classes, of shape (images, 10)."""
    hidden = jax.nn.relu(images @ weights["hidden"] + weights["hidden_bias"])
    return hidden @ weights["output"] + weights["output_bias"]


@jax.jit
def update(
    state: dict[str, dict[str, jax.Array]], images: jax.Array, labels: jax.Array
) -> dict[str, dict[str, jax.Array]]:
    """Return the state after one step of gradient descent with momentum."""
    gradients = jax.grad(loss)(state["weights"], images, labels)
    velocity = jax.tree.map(lambda v, g: MOMENTUM * v - LEARNING_RATE * g, state["velocity"], gradients)
    return {"weights": jax.tree.map(jnp.add, state["weights"], velocity), "velocity": velocity}


def main() -> None:
    logging.basicConfig(level=get_log_level() or "INFO")
    logging.getLogger("jax").setLevel("WARNING")
    key, hidden_key, output_key = jax.random.split(jax.random.key(0), 3)
    weights = {
        "hidden": jax.random.normal(hidden_key, (64, 128)) / 8,
        "hidden_bias": jnp.zeros(128),
        "output": jax.random.normal(output_key, (128, 10)) / 11,
        "output_bias": jnp.zeros(10),
    }
    state = {"weights": weights, "velocity": jax.tree.map(jnp.zeros_like, weights)}

    def save_state(path: str) -> None:
        np.savez(path, *jax.tree.leaves(state))

    def load_state(path: str) -> None:
        nonlocal state
        with np.load(path) as saved:
            state = jax.tree.unflatten(jax.tree.structure(state), [jnp.asarray(saved[name]) for name in saved.files])

    with StepLoop(
        save_state, load_state, suffix=".npz", datasets={"digits": LOCAL}, every_n_train_steps=100
    ) as training:
        (x, y), (x_test, y_test) = load(training.data_path("digits"))
        for step in training.steps(STEPS):
            # The batch depends only on the step, so that a resumed training continues with the batches that are left.
            rows = np.asarray(jax.random.choice(jax.random.fold_in(key, step), len(x), (BATCH_SIZE,), replace=False))
            state = update(state, x[rows], y[rows])

    accuracy = (logits(state["weights"], x_test).argmax(1) == y_test).mean()
    print(f"test accuracy {accuracy:.3f}, outputs {training.outputs_path}")


if __name__ == "__main__":
    main()
