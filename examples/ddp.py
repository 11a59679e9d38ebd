"""DistributedDataParallel as in PyTorch's own tutorials, with sgdcore's optimizer in it: one line differs.

    torchrun --standalone --nproc-per-node 2 examples/ddp.py
    torchrun --standalone --nproc-per-node 2 examples/ddp.py --compress bfloat16

Trains a small network on scikit-learn's digits (``pip install '.[demo,torch]'``). DistributedDataParallel averages the
gradients of all ranks in every step, while the backward pass still computes; one of torch's communication hooks may
compress them. local_sgd.py, beside this, averages parameters now and then instead.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
    bf16_compress_hook,
    fp16_compress_hook,
)
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import sgdcore.torch
from sgdcore.demo import load_digits


def bfloat16_hook(group, bucket):  # torch refuses annotations that are strings, as they are here
    """Torch's bf16_compress_hook. By that name torch takes it for NCCL only, but gloo adds bfloat16 up as well."""
    return bf16_compress_hook(group, bucket)


def compress(model: DistributedDataParallel, how: str, group: dist.ProcessGroup) -> None:
    """Have the gradients travel in fewer bytes. The optimizer gets their mean in float32 as before."""
    if how == "bfloat16":
        model.register_comm_hook(None, bfloat16_hook)
    elif (
        how == "float16"
    ):  # three more bits of each number than bfloat16, but what is above 65504 overflows
        model.register_comm_hook(None, fp16_compress_hook)
    elif how == "powersgd":
        # Two thin matrices travel in place of each large one, once the first steps have been averaged exactly. Under
        # gloo this hook hangs where there are several buckets (torch 2.13): raise bucket_cap_mb until there is one.
        state = PowerSGDState(group, matrix_approximation_rank=4, start_powerSGD_iter=100)
        model.register_comm_hook(state, powerSGD_hook)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=20, metavar="N", help="default: 20")
    parser.add_argument(
        "--compress", choices=["none", "bfloat16", "float16", "powersgd"], default="none"
    )
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
    group = dist.group.WORLD
    # gradient_as_bucket_view saves a copy of the gradients.
    model = DistributedDataParallel(network, process_group=group, gradient_as_bucket_view=True)
    compress(model, args.compress, group)
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
    # The group has to end here, on this thread: on a thread of gloo, or while gloo's threads wait for Python, its end
    # aborts the process or hangs (torch 2.13). The model refers to the group, and so do the communication hooks' last
    # calls, which gloo's threads release: the barrier lets them, and `group` outlives them.
    dist.barrier(group)
    del model
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
