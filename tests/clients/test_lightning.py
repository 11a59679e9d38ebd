"""Lightning's Trainer and Fabric with sgdcore.torch.SGD: clipping, precision and accumulation."""

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
from torch import Tensor
from torch.optim.lr_scheduler import ExponentialLR

lightning = pytest.importorskip(
    "lightning", reason="Lightning is not installed: pip install '.[clients]'"
)
from lightning.fabric.plugins.precision import MixedPrecision as FabricPrecision
from lightning.pytorch.plugins.precision import MixedPrecision


class Module(lightning.LightningModule):  # type: ignore[misc]
    """The network as Lightning wants it."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.network = Network()
        self.make = make
        self.losses: list[Tensor] = []
        self.rates: list[float] = []

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        loss = self.network(**batch)["loss"]
        self.losses.append(loss.detach().clone())
        self.rates.append(self.optimizers().param_groups[0]["lr"])
        return loss  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.network.parameters(), **HYPER)
        return [optimizer], [{"scheduler": ExponentialLR(optimizer, 0.95), "interval": "step"}]


def precision_of(precision: str, plugin: Any) -> tuple[dict[str, Any], torch.amp.GradScaler | None]:
    """Return the arguments that choose the precision; on the CPU float16 has to be a plugin."""
    if precision != "16-mixed":
        return {"precision": precision}, None
    scaler = grad_scaler()
    return {"plugins": [plugin("16-mixed", "cpu", scaler)]}, scaler


@combinations
def test_trainer(precision: str, clip: tuple[str, float] | None, accumulate: int) -> None:
    def train(make: Any) -> Run:
        arguments, scaler = precision_of(precision, MixedPrecision)
        if clip is not None:
            arguments |= {"gradient_clip_algorithm": clip[0], "gradient_clip_val": clip[1]}
        module = Module(make)
        lightning.Trainer(
            accelerator="cpu",
            max_epochs=EPOCHS,
            accumulate_grad_batches=accumulate,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **arguments,
        ).fit(module, batches())
        return Run(module.network, scaler, module.losses, module.rates)

    assert_trains_as_torch(precision, train)


@combinations
def test_fabric(precision: str, clip: tuple[str, float] | None, accumulate: int) -> None:
    def train(make: Any) -> Run:
        arguments, scaler = precision_of(precision, FabricPrecision)
        fabric = lightning.Fabric(accelerator="cpu", **arguments)
        network = Network()
        with fabric.init_module():  # which takes the dtype
            network = Network()
        inner = make(network.parameters(), **HYPER)
        scheduler = ExponentialLR(inner, 0.95)
        model, optimizer = fabric.setup(network, inner)
        run = Run(network, scaler)
        for _ in range(EPOCHS):
            for i, batch in enumerate(fabric.setup_dataloaders(batches())):
                loss = model(**batch)["loss"]
                run.losses.append(loss.detach().clone())
                fabric.backward(loss / accumulate)
                if (i + 1) % accumulate:
                    continue
                if clip is not None:
                    limit: dict[str, Any] = {"clip_val": clip[1]}
                    if clip[0] == "norm":  # the scaler looks for what is not finite
                        limit = {"max_norm": clip[1], "error_if_nonfinite": False}
                    fabric.clip_gradients(model, optimizer, **limit)
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
                run.rates.append(scheduler.get_last_lr()[0])
        return run

    assert_trains_as_torch(precision, train)
