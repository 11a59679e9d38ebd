"""Local SGD on NumPy arrays over MPI, without torch.

    mpiexec -n 2 python -m mpi4py examples/local_sgd_mpi.py

``-m mpi4py`` ends all ranks where one fails. Needs mpi4py and an MPI (``pip install '.[demo,mpi]' mpich`` brings
both), and scikit-learn for the digits. The network and its backward pass are the demo's, in plain NumPy.
"""

from __future__ import annotations

import argparse

import numpy as np
from mpi4py import MPI

import sgdcore
from sgdcore.demo import MLP, cross_entropy, load_digits
from sgdcore.distributed import LocalSGD, ShardSampler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=20, metavar="N", help="default: 20")
    parser.add_argument("--sync-every", type=int, default=16, metavar="H", help="default: 16")
    args = parser.parse_args()

    digits = load_digits("float32", seed=0)
    model = MLP((64, 128, 10), "float32", np.random.default_rng(0))
    optimizer = LocalSGD(
        sgdcore.SGD(model.parameters, lr=0.1, momentum=0.9),
        MPI.COMM_WORLD,
        sync_every=args.sync_every,
    )
    sampler = ShardSampler(digits.train_images, group=MPI.COMM_WORLD)

    with optimizer:  # averages once more at the end, so that all ranks have the same model
        for epoch in range(args.epochs):
            sampler.set_epoch(epoch)
            for batch in sampler.batches(16):
                activations = model.forward(digits.train_images[batch])
                _, delta = cross_entropy(activations[-1], digits.train_labels[batch])
                model.backward(activations, delta)
                optimizer.step()

    predicted = model.forward(digits.test_images)[-1].argmax(axis=1)
    accuracy = np.mean(predicted == digits.test_labels)
    if MPI.COMM_WORLD.Get_rank() == 0:
        size = MPI.COMM_WORLD.Get_size()
        print(f"{size} ranks, {args.epochs} epochs: test accuracy {accuracy:.1%}")


if __name__ == "__main__":
    main()
