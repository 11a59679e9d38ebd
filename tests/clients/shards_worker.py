"""One rank of test_shards.py, started by torchrun: python shards_worker.py CLIENT FOLDER.

Writes which samples this rank was given in each epoch, or the error, to FOLDER/RANK.json.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from sgdcore.distributed import ShardSampler

EPOCHS = 2
SAMPLES = TensorDataset(torch.arange(100))
RANK, RANKS = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

Seen = list[list[int]]


def loader(ranks: int | None = RANKS, rank: int | None = RANK) -> DataLoader[Any]:
    sampler = ShardSampler(SAMPLES, ranks, rank, seed=3)
    return DataLoader(SAMPLES, batch_size=5, sampler=sampler)


def seen_in(batches: Any) -> Seen:
    return [[int(i) for (batch,) in batches for i in batch] for _ in range(EPOCHS)]


def fabric() -> Seen:
    from lightning.fabric import Fabric

    client = Fabric(accelerator="cpu", devices=RANKS, strategy="ddp")
    client.launch()
    return seen_in(client.setup_dataloaders(loader(None, None)))


def trainer() -> Seen:
    from lightning.pytorch import LightningModule, Trainer

    class Module(LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))
            self.seen: Seen = [[] for _ in range(EPOCHS)]

        def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
            self.seen[self.current_epoch] += batch[0].tolist()
            return self.weight.sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Module()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    client = Trainer(
        accelerator="cpu",
        devices=RANKS,
        strategy="ddp",
        max_epochs=EPOCHS,
        barebones=False,
        **quiet,
    )
    client.fit(module, loader())
    return module.seen


def accelerate(loader: Callable[[], DataLoader[Any]]) -> Seen:
    from accelerate import Accelerator

    return seen_in(Accelerator(cpu=True).prepare(loader()))


CLIENTS: dict[str, Callable[[], Seen]] = {
    "fabric": fabric,
    "trainer": trainer,
    "accelerate": lambda: accelerate(loader),
    "accelerate, one rank": lambda: accelerate(lambda: loader(1, 0)),
}


def main(client: str, folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the libraries'
    result: Any
    try:
        result = CLIENTS[client]()
    except RuntimeError as error:
        result = str(error)
    (folder / f"{RANK}.json").write_text(json.dumps(result))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    # Not by sys.exit: now and then gloo aborts a process that is on its way out (torch 2.13).
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
