"""Check that torch is installed, or raise an error that says how to install it."""

import importlib.util

__all__: list[str] = []

if _missing := [name for name in ("torch", "numpy") if importlib.util.find_spec(name) is None]:
    raise ModuleNotFoundError(
        f"polyaxon_torch needs PyTorch, and these packages are not installed: {', '.join(_missing)}. "
        f'Install them with: pip install "polyaxon-tracking[torch]"',
        name=_missing[0],
    )
