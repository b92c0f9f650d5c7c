"""Handwritten digits with Keras 3 on any backend: `KERAS_BACKEND=torch python examples/keras_digits.py`.

In a cluster the data, the outputs and the log level come from the run, and a killed run resumes by itself.
"""

from __future__ import annotations

import keras

from digits import LOCAL, load
from polyaxon_keras import PolyaxonCallback


def main() -> None:
    keras.utils.set_random_seed(0)
    polyaxon = PolyaxonCallback(monitor="val_loss", save_best_only=True, datasets={"digits": LOCAL})
    (x, y), (x_test, y_test) = load(polyaxon.data_path("digits"))
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(128, activation="relu"),
            keras.layers.Dropout(0.2),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile("adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(x, y, epochs=20, validation_split=0.1, verbose=0, callbacks=[polyaxon])
    model.load_weights(polyaxon.filepath)
    accuracy = model.evaluate(x_test, y_test, verbose=0, return_dict=True)["accuracy"]
    print(f"test accuracy {accuracy:.3f}, best model {polyaxon.filepath}")


if __name__ == "__main__":
    main()
