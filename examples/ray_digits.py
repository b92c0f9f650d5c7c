"""The digits in two workers of Ray Train: `pip install "ray[train]"`, then `python examples/ray_digits.py`.

A worker that dies ends the others. Ray starts all again, here or on other machines, and they resume from the newest
training state. On spot machines, POLYAXON_PREEMPTION_NOTICES=aws (or google, or azure) makes them save before they end.
"""

from __future__ import annotations

import os

import ray
from lightning.pytorch import Trainer, seed_everything
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment, prepare_trainer
from ray.train.torch import TorchTrainer

from digits import LOCAL
from lightning_digits import Classifier, Digits
from polyaxon_lightning import PolyaxonCallback


def train() -> None:
    """Train in one worker."""
    seed_everything(0, workers=True)
    polyaxon = PolyaxonCallback(datasets={"digits": LOCAL})
    trainer = prepare_trainer(
        Trainer(
            max_epochs=20,
            accelerator="cpu",
            strategy=RayDDPStrategy(),
            plugins=[RayLightningEnvironment()],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[polyaxon],
        )
    )
    data = Digits(polyaxon.data_path("digits"))
    model = Classifier()
    trainer.fit(model, data)
    [metrics] = trainer.test(model, data)
    if trainer.is_global_zero:
        print(f"test accuracy {metrics['test_accuracy']:.3f}", flush=True)


def main() -> None:
    # Workers, on any machine, have the run's variables, and import what this script does.
    variables = {name: value for name, value in os.environ.items() if name.startswith(("POLYAXON_", "POLYSTORES_"))}
    variables["PYTHONPATH"] = os.path.dirname(os.path.abspath(__file__))
    ray.init(runtime_env={"env_vars": variables})
    trainer = TorchTrainer(
        train,
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=3)),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
