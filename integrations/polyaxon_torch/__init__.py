"""Loops of one's own on torch, and the code that the integrations of frameworks on torch share."""

from polyaxon_torch import framework as _framework  # noqa: F401  # first: its error names the extra to install

# isort: split
from polyaxon_torch.data_order import (
    IndexBatches,
    OrderGenerators,
    draw_again,
    has_state,
    index_batches,
    reads_items,
)
from polyaxon_torch.data_position import DataPosition
from polyaxon_torch.lazy import differing_shapes, settle_lazy_layers
from polyaxon_torch.nan import has_nan
from polyaxon_torch.plain_values import (
    check_plain,
    check_weights_only,
    how_to_allow,
    load_state,
    make_rates_plain,
    optimizer_options,
    plain_hyperparameters,
    plain_numbers,
    refused_state,
    scheduler_options,
)
from polyaxon_torch.process_group import TorchProcessGroup
from polyaxon_torch.rng import (
    random_numbers,
    random_state,
    set_random_state,
    set_torch_random_state,
    torch_random_state,
)
from polyaxon_torch.training_loop import TrainingLoop
from polyaxon_torch.weight_samples import WeightSamples

__all__ = [
    "DataPosition",
    "IndexBatches",
    "OrderGenerators",
    "TorchProcessGroup",
    "TrainingLoop",
    "WeightSamples",
    "check_plain",
    "check_weights_only",
    "differing_shapes",
    "draw_again",
    "has_nan",
    "has_state",
    "how_to_allow",
    "index_batches",
    "load_state",
    "make_rates_plain",
    "optimizer_options",
    "plain_hyperparameters",
    "plain_numbers",
    "random_numbers",
    "random_state",
    "reads_items",
    "refused_state",
    "scheduler_options",
    "set_random_state",
    "set_torch_random_state",
    "settle_lazy_layers",
    "torch_random_state",
]
