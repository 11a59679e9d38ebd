"""DistributedDataParallel as in PyTorch's own tutorials, with sgdcore's optimizer in it: one line differs.

    torchrun --standalone --nproc-per-node 2 examples/ddp.py

Trains a small network on scikit-learn's digits (``pip install '.[demo,torch]'``). The gradients of all ranks are
averaged in every step; local_sgd.py, beside this, averages parameters now and then instead.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import sgdcore.torch
from sgdcore.demo import load_digits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=20, metavar="N", help="default: 20")
    args = parser.parse_args()

    torch.manual_seed(0)
    digits = load_digits("float32", seed=0)
    train_set = TensorDataset(
        torch.from_numpy(digits.train_images), torch.from_numpy(digits.train_labels)
    )
    test_images = torch.from_numpy(digits.test_images)
    test_labels = torch.from_numpy(digits.test_labels)

    network = torch.nn.Sequential(
        torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10)
    )
    # This was torch.optim.SGD(...).
    optimizer = sgdcore.torch.SGD(network.parameters(), lr=0.1, momentum=0.9)
    # After the optimizer, which imports torch's compiler: a group from before that outlives its end, and gloo may
    # abort.
    dist.init_process_group("gloo")  # torchrun has told rank, size and address in the environment
    model = DistributedDataParallel(network)
    sampler = DistributedSampler(train_set, seed=0)
    loader = DataLoader(train_set, batch_size=16, sampler=sampler)

    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        for images, labels in loader:
            optimizer.zero_grad()
            cross_entropy(model(images), labels).backward()  # averages the gradients on the way
            optimizer.step()

    with torch.no_grad():
        accuracy = (network(test_images).argmax(dim=1) == test_labels).double().mean().item()
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} ranks, {args.epochs} epochs: test accuracy {accuracy:.1%}")
    # Or the group would end with the model, later, and while it waits for gloo's threads they may wait for Python
    # (torch 2.13).
    del model
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
