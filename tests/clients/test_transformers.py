"""transformers' Trainer with sgdcore.torch.SGD: clipping, precision and accumulation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from clients_support import (
    EPOCHS,
    HYPER,
    Network,
    Run,
    assert_trains_as_torch,
    combinations,
    examples,
    grad_scaler,
)
from torch import Tensor

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install '.[clients]'"
)
pytest.importorskip("accelerate", reason="accelerate is not installed: pip install '.[clients]'")
from accelerate.state import AcceleratorState


class Trainer(transformers.Trainer):  # type: ignore[misc]
    """Takes the examples in their order, and keeps the losses."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses: list[Tensor] = []

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.losses.append(loss.detach().clone())
        return loss


class ClipByValue(transformers.TrainerCallback):  # type: ignore[misc]
    """What Trainer has no argument for. Trainer unscaled the gradients before, to log their norm."""

    def __init__(self, limit: float) -> None:
        self.limit = limit

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        torch.nn.utils.clip_grad_value_(model.parameters(), self.limit)


class Rates(transformers.TrainerCallback):  # type: ignore[misc]
    """Keeps the learning rate after each step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_step_end(self, *_: Any, optimizer: Any, **__: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


@combinations
def test_trainer(
    precision: str, clip: tuple[str, float] | None, accumulate: int, tmp_path: Path
) -> None:
    def train(make: Any) -> Run:
        AcceleratorState._reset_state(reset_partial_state=True)
        network = Network()
        if precision == "bf16-true":
            network.to(torch.bfloat16)
        rates = Rates()
        callbacks: list[Any] = [rates]
        if clip is not None and clip[0] == "value":
            callbacks.append(ClipByValue(clip[1]))
        trainer = Trainer(
            network,
            transformers.TrainingArguments(
                output_dir=str(tmp_path),
                use_cpu=True,
                bf16=precision == "bf16-mixed",
                max_grad_norm=clip[1] if clip is not None and clip[0] == "norm" else 0.0,
                gradient_accumulation_steps=accumulate,
                num_train_epochs=EPOCHS,
                per_device_train_batch_size=8,
                weight_decay=HYPER["weight_decay"],
                learning_rate=HYPER["lr"],
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=examples(),
            optimizer_cls_and_kwargs=(make, HYPER),
            callbacks=callbacks,
        )
        scaler = None
        if precision == "16-mixed":  # which accelerate ignores on the CPU
            accelerator = trainer.accelerator
            accelerator.state._mixed_precision = "fp16"
            scaler = grad_scaler()
            accelerator.scaler, accelerator.native_amp = scaler, True
        trainer.train()
        return Run(network, scaler, trainer.losses, rates.rates)

    assert_trains_as_torch(precision, train)
