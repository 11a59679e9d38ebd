"""accelerate with sgdcore.torch.SGD: clipping, precision and accumulation, and the steps that a scaler leaves out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from clients_support import (
    EPOCHS,
    HYPER,
    Network,
    Run,
    assert_trains_as_torch,
    batches,
    combinations,
    grad_scaler,
)
from torch.optim.lr_scheduler import ExponentialLR

accelerate = pytest.importorskip(
    "accelerate", reason="accelerate is not installed: pip install '.[clients]'"
)
from accelerate.state import AcceleratorState


@combinations
def test_accelerate(precision: str, clip: tuple[str, float] | None, accumulate: int) -> None:
    def train(make: Any) -> Run:
        AcceleratorState._reset_state(reset_partial_state=True)
        mixed = {"bf16-mixed": "bf16", "16-mixed": "fp16"}.get(precision, "no")
        accelerator = accelerate.Accelerator(
            cpu=True, mixed_precision=mixed, gradient_accumulation_steps=accumulate
        )
        if mixed == "fp16":  # which accelerate ignores on the CPU
            accelerator.scaler, accelerator.native_amp = grad_scaler(), True
        network = Network()
        if precision == "bf16-true":
            network.to(torch.bfloat16)
        inner = make(network.parameters(), **HYPER)
        model, optimizer, loader, scheduler = accelerator.prepare(
            network, inner, batches(), ExponentialLR(inner, 0.95)
        )
        run = Run(network, accelerator.scaler)
        left_out = 0
        for _ in range(EPOCHS):
            for batch in loader:
                with accelerator.accumulate(model):
                    loss = model(**batch)["loss"]
                    run.losses.append(loss.detach().clone())
                    accelerator.backward(loss)
                    if accelerator.sync_gradients and clip is not None:
                        limit = getattr(accelerator, f"clip_grad_{clip[0]}_")
                        limit(model.parameters(), clip[1])
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                left_out += optimizer.step_was_skipped
                run.rates.append(scheduler.get_last_lr()[0])
        assert (left_out > 0) == (precision == "16-mixed")
        return run

    assert_trains_as_torch(precision, train)
