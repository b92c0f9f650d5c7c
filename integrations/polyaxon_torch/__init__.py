"""Code that the integrations of PyTorch frameworks share. This package is not an integration itself."""

from polyaxon_torch.lazy import differing_shapes, settle_lazy_layers
from polyaxon_torch.nan import has_nan
from polyaxon_torch.plain_values import (
    check_plain,
    group_options,
    lazy_layers_allowed,
    make_rates_plain,
    plain_hyperparameters,
    plain_numbers,
)
from polyaxon_torch.process_group import TorchProcessGroup
from polyaxon_torch.rng import random_numbers, random_state, set_random_state
from polyaxon_torch.weight_samples import WeightSamples

__all__ = [
    "TorchProcessGroup",
    "WeightSamples",
    "check_plain",
    "differing_shapes",
    "group_options",
    "has_nan",
    "lazy_layers_allowed",
    "make_rates_plain",
    "plain_hyperparameters",
    "plain_numbers",
    "random_numbers",
    "random_state",
    "set_random_state",
    "settle_lazy_layers",
]
