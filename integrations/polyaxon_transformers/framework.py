"""Check that the Trainer's packages are installed, or raise an error that says how to install them."""

import importlib.util

__all__: list[str] = []

# Transformers is also installed without PyTorch, and the Trainer needs Accelerate.
_missing = [name for name in ("transformers", "torch", "accelerate") if importlib.util.find_spec(name) is None]
if _missing:
    raise ModuleNotFoundError(
        f"polyaxon_transformers needs Hugging Face's Trainer, and these packages are not installed: "
        f'{", ".join(_missing)}. Install them with: pip install "polyaxon-tracking[transformers]"',
        name=_missing[0],
    )
