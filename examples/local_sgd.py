"""Local SGD: each rank takes 16 steps on its own shard, then the parameters are averaged; otherwise as ddp.py.

    torchrun --standalone --nproc-per-node 2 examples/local_sgd.py

`LocalSGD` takes the place of DistributedDataParallel, around the optimizer instead of the model. The first steps of the
training, the warm-up, average in every step.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import sgdcore.torch
from sgdcore.demo import load_digits
from sgdcore.distributed import LocalSGD, Stagewise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=20, metavar="N", help="default: 20")
    parser.add_argument("--sync-every", type=int, default=16, metavar="H", help="default: 16")
    args = parser.parse_args()

    torch.manual_seed(0)
    digits = load_digits("float32", seed=0)
    train_set = TensorDataset(
        torch.from_numpy(digits.train_images), torch.from_numpy(digits.train_labels)
    )
    test_images = torch.from_numpy(digits.test_images)
    test_labels = torch.from_numpy(digits.test_labels)

    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    sgd = sgdcore.torch.SGD(model.parameters(), lr=0.1, momentum=0.9)
    dist.init_process_group("gloo")  # after the first optimizer: see ddp.py
    # After each step at first, then every so many steps.
    schedule = Stagewise({2 * args.sync_every: args.sync_every})
    optimizer = LocalSGD(sgd, sync_every=schedule)
    sampler = DistributedSampler(train_set, seed=0)
    loader = DataLoader(train_set, batch_size=16, sampler=sampler)

    with optimizer:  # averages once more at the end, so that all ranks have the same model
        for epoch in range(args.epochs):
            sampler.set_epoch(epoch)
            for images, labels in loader:
                optimizer.zero_grad()
                cross_entropy(model(images), labels).backward()
                optimizer.step()

    with torch.no_grad():
        accuracy = (model(test_images).argmax(dim=1) == test_labels).double().mean().item()
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} ranks, {args.epochs} epochs: test accuracy {accuracy:.1%}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
