"""Import Keras 3, or raise an error that says how to install it."""

__all__ = ["keras"]

try:
    import keras
except ModuleNotFoundError as error:
    if error.name != "keras":  # Keras is installed but its backend is not: Keras's own message is clearer
        raise
    raise ModuleNotFoundError(
        'polyaxon_keras needs Keras 3, which is not installed. Install it with: pip install "polyaxon-tracking[keras]"',
        name="keras",
    ) from None

if keras.version().startswith(("0.", "1.", "2.")):
    raise ModuleNotFoundError(
        f"polyaxon_keras needs Keras 3, and Keras {keras.version()} is installed. Install it with: "
        f'pip install --upgrade "polyaxon-tracking[keras]"',
        name="keras",
    )
