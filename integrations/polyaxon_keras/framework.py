"""Import Keras 3, or raise an error that says how to install it or its backend."""

__all__ = ["keras"]

_BACKENDS = ("tensorflow", "torch", "jax")

try:
    import keras
except ModuleNotFoundError as error:
    if error.name in _BACKENDS:
        raise ModuleNotFoundError(
            f"Keras needs a backend, and {error.name} is not installed, which the environment variable KERAS_BACKEND "
            f"or Keras's default chooses. Install it with: pip install {error.name}, or set KERAS_BACKEND to one that "
            f"is installed: tensorflow, torch or jax",
            name=error.name,
        ) from None
    if error.name != "keras":
        raise
    raise ModuleNotFoundError(
        "polyaxon_keras needs Keras 3, which is not installed. Install it with: pip install "
        '"polyaxon-tracking[keras]", and one of the backends tensorflow, torch and jax, which the environment variable '
        "KERAS_BACKEND chooses",
        name="keras",
    ) from None

if keras.version().startswith(("0.", "1.", "2.")):
    raise ModuleNotFoundError(
        f"polyaxon_keras needs Keras 3, and Keras {keras.version()} is installed. Install it with: "
        f'pip install --upgrade "polyaxon-tracking[keras]"',
        name="keras",
    )
