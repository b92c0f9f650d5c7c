"""Handwritten digits with Hugging Face's Trainer: `python examples/transformers_digits.py`.

A small vision transformer learns them. In a cluster the data, the outputs and the log level come from the run, and a
killed run resumes by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import EvalPrediction, Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

from digits import LOCAL, load
from polyaxon_transformers import PolyaxonCallback

if TYPE_CHECKING:
    import numpy as np


def rows(images: np.ndarray, labels: np.ndarray) -> list[dict[str, np.ndarray]]:
    """Return each image as one channel of 8 x 8 pixels, and its class."""
    return [
        {"pixel_values": image.reshape(1, 8, 8), "labels": label} for image, label in zip(images, labels, strict=True)
    ]


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main() -> None:
    set_seed(0)
    polyaxon = PolyaxonCallback(datasets={"digits": LOCAL})
    (images, labels), test = load(polyaxon.data_path("digits"))
    model = ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=4,
            num_channels=1,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            num_labels=10,
        )
    )
    trainer = Trainer(
        model,
        TrainingArguments(
            "vit",
            num_train_epochs=12,
            per_device_train_batch_size=32,
            learning_rate=1e-3,
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=1,
            load_best_model_at_end=True,
            logging_steps=10,
            report_to=[],
            use_cpu=True,
        ),
        train_dataset=rows(images[:1350], labels[:1350]),
        eval_dataset=rows(images[1350:], labels[1350:]),
        compute_metrics=accuracy,
        callbacks=[polyaxon],
    )
    trainer.train()
    found = trainer.evaluate(rows(*test))["eval_accuracy"]
    print(f"test accuracy {found:.3f}, best model {trainer.state.best_model_checkpoint}")


if __name__ == "__main__":
    main()
