"""Does averaging rarely cost accuracy? Local SGD beside synchronous SGD on scikit-learn's digits, 4 ranks.

    python benchmarks/local_sgd_digits.py --json benchmarks/results/distributed/local-sgd-digits.json
    python benchmarks/local_sgd_digits.py --draw benchmarks/results/distributed/local-sgd-digits.json

The first trains every row of METHODS, for each seed, once on shards that are drawn anew each epoch (iid), once on
shards sorted by label, where a rank sees three or four of the ten digits; all start from the same weights and see the
same batches. The second writes the plot and the table of docs/distributed-measurements.md from the file. Both do the
same for a network with batch norm with --network batch-norm, but for the plot. Needs torch, for gloo.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

RANKS = 4
STEPS = 1600
BATCH = 8
SIZES = (64, 64, 10)
SEEDS = {"mlp": 10, "batch-norm": 5}
LR = 0.1
MOMENTUM = 0.9
SHARDS = ("iid", "sorted by label")
ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs/distributed-measurements.md"
PLOT = ROOT / "docs/images/local-sgd-digits.png"
STARTS = {
    "mlp": "<!-- table of local_sgd_digits.py -->",
    "batch-norm": "<!-- table of local_sgd_digits.py --network batch-norm -->",
}
END = "<!-- end of table -->"


@dataclass(frozen=True)
class Method:
    """A row of the table: how it is called, and what `LocalSGD` is given; synchronous SGD if nothing."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    outer: tuple[str, dict[str, Any]] | None = None
    own_statistics: bool = False  # batch norm's stay each rank's own


METHODS = (
    Method("synchronous"),
    Method("H=4", {"sync_every": 4}),
    Method("H=16", {"sync_every": 16}),
    Method("H=16, momentum averaged", {"sync_every": 16, "momentum_sync": "average"}),
    Method("H=16, momentum reset", {"sync_every": 16, "momentum_sync": "reset"}),
    Method("H=64", {"sync_every": 64}),
    Method("H=64, momentum averaged", {"sync_every": 64, "momentum_sync": "average"}),
    Method("H=64 after 800 synchronous steps", {"sync_every": {STEPS // 2: 64}}),
    Method(
        "H=16, SlowMo 0.5",
        {"sync_every": 16},
        ("SlowMo", {"momentum": 0.5}),
    ),
    Method(
        "H=16, outer Nesterov 0.7 / 0.9",
        {"sync_every": 16},
        ("OuterSGD", {"lr": 0.7, "momentum": 0.9, "nesterov": True}),
    ),
)

BATCH_NORM_METHODS = (
    Method("synchronous"),
    Method("synchronous, each rank's own statistics", own_statistics=True),
    Method("H=16", {"sync_every": 16}),
    Method("H=16, each rank's own statistics", {"sync_every": 16}, own_statistics=True),
    Method("H=64", {"sync_every": 64}),
    Method("H=64, each rank's own statistics", {"sync_every": 64}, own_statistics=True),
)
NETWORKS = {"mlp": METHODS, "batch-norm": BATCH_NORM_METHODS}


class Mlp:
    """The demo's network, in NumPy."""

    def __init__(self, seed: int, lr: float) -> None:
        import sgdcore
        from sgdcore.demo import MLP

        self._model = MLP(SIZES, "float32", np.random.default_rng(seed))
        self.optimizer: Any = sgdcore.SGD(self._model.parameters, lr=lr, momentum=MOMENTUM)
        self.elements = self._model.parameters.data.size
        self.buffers: list[Any] = []

    def differentiate(self, images: NDArray[Any], labels: NDArray[Any]) -> None:
        from sgdcore.demo import cross_entropy

        activations = self._model.forward(images)
        self._model.backward(activations, cross_entropy(activations[-1], labels)[1])

    def evaluate(self, digits: Any) -> tuple[float, float]:
        """Return the training loss and the validation accuracy."""
        from sgdcore.demo import cross_entropy, evaluate

        record = evaluate(self._model, digits, cross_entropy, epoch=0)
        return record.train_loss, record.test_accuracy


class BatchNormNetwork:
    """The same with batch norm behind the first layer, in torch."""

    def __init__(self, seed: int, lr: float) -> None:
        import torch

        import sgdcore.torch

        torch.manual_seed(seed)
        inputs, hidden, outputs = SIZES
        self._torch = torch
        self._model = torch.nn.Sequential(
            torch.nn.Linear(inputs, hidden),
            torch.nn.BatchNorm1d(hidden),
            torch.nn.ReLU(),
            torch.nn.Linear(hidden, outputs),
        )
        self.optimizer: Any = sgdcore.torch.SGD(self._model.parameters(), lr=lr, momentum=MOMENTUM)
        self.elements = sum(p.numel() for p in self._model.parameters())
        self.buffers = list(self._model.buffers())

    def differentiate(self, images: NDArray[Any], labels: NDArray[Any]) -> None:
        self.optimizer.zero_grad()
        self._loss(images, labels)[0].backward()

    def evaluate(self, digits: Any) -> tuple[float, float]:
        """Return the training loss and the validation accuracy, by the running statistics."""
        self._model.eval()
        with self._torch.no_grad():
            loss, _ = self._loss(digits.train_images, digits.train_labels)
            _, accuracy = self._loss(digits.test_images, digits.test_labels)
        return float(loss), accuracy

    def _loss(self, images: NDArray[Any], labels: NDArray[Any]) -> tuple[Any, float]:
        outputs = self._model(self._torch.from_numpy(images))
        targets = self._torch.from_numpy(labels)
        accuracy = float((outputs.argmax(dim=1) == targets).double().mean())
        return self._torch.nn.functional.cross_entropy(outputs, targets), accuracy


class CountingGroup:
    """A process group that counts the all-reduces of whole sets of parameters."""

    def __init__(self, group: Any, elements: int) -> None:
        self._group, self._elements = group, elements
        self.reductions = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)

    def all_reduce(self, array: Any) -> Any:
        size = array.size if isinstance(array, np.ndarray) else array.numel()
        self.reductions += size >= self._elements
        return self._group.all_reduce(array)


def batches(labels: NDArray[Any], shards: str, rank: int, seed: int) -> Iterator[NDArray[Any]]:
    """Yield the indices of this rank's mini-batches, without end."""
    from sgdcore.distributed import ShardSampler

    if shards == "iid":
        shard = np.arange(len(labels))
        sampler = ShardSampler(shard, RANKS, rank, seed=seed)
    else:
        shard = np.array_split(np.argsort(labels, kind="stable"), RANKS)[rank]
        sampler = ShardSampler(shard, 1, 0, seed=seed)
    for epoch in count():
        sampler.set_epoch(epoch)
        for batch in sampler.batches(BATCH):
            yield shard[batch]


def train(network: str, method: Method, shards: str, seed: int, lr: float) -> dict[str, Any]:
    """Train once, on all ranks together, and return what it came to."""
    from sgdcore import distributed
    from sgdcore.demo import load_digits

    digits = load_digits("float32", seed)
    model: Mlp | BatchNormNetwork
    model = Mlp(seed, lr) if network == "mlp" else BatchNormNetwork(seed, lr)
    group = CountingGroup(distributed.as_process_group(None), model.elements)
    buffers = [] if method.own_statistics else model.buffers
    workers: Any
    if method.options:
        outer = None
        if method.outer is not None:
            name, options = method.outer
            outer = getattr(distributed, name)(**options)
        every = method.options["sync_every"]
        if isinstance(every, dict):
            every = distributed.Stagewise(every)
        workers = distributed.LocalSGD(
            model.optimizer,
            group,
            outer=outer,
            buffers=buffers,
            **{**method.options, "sync_every": every},
        )
    else:
        workers = distributed.DataParallel(model.optimizer, group, buffers=buffers)
    reductions = group.reductions  # none yet, unless the wrapper needs some to begin
    source = batches(digits.train_labels, shards, group.rank, seed)
    for batch, _ in zip(source, range(STEPS), strict=False):
        model.differentiate(digits.train_images[batch], digits.train_labels[batch])
        workers.step()
    workers.finish()
    train_loss, accuracy = model.evaluate(digits)
    return {
        "method": method.name,
        "shards": shards,
        "seed": seed,
        "train_loss": train_loss,
        "validation_accuracy": accuracy,
        "reductions": group.reductions - reductions,
    }


def worker(
    rank: int,
    rendezvous: str,
    network: str,
    seeds: int,
    lr: float,
    names: list[str],
    output: str,
) -> None:
    import torch
    import torch.distributed as dist

    import sgdcore

    sgdcore.set_num_threads(1)
    warnings.filterwarnings(
        "ignore", "the model has batch norm"
    )  # rows that leave its statistics alone
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS)
    runs = []
    for shards in SHARDS:
        for method in NETWORKS[network]:
            if names and method.name not in names:
                continue
            runs += [train(network, method, shards, seed, lr) for seed in range(seeds)]
            if rank == 0:
                print(row(shards, method.name, runs), flush=True)
    if rank == 0:
        Path(output).write_text(json.dumps(runs))
    dist.destroy_process_group()


def measure(network: str, seeds: int, lr: float, names: list[str]) -> list[dict[str, Any]]:
    """Start the ranks and return what each training came to."""
    import torch.multiprocessing

    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        output = str(Path(folder, "runs.json"))
        args = (str(Path(folder, "rendezvous")), network, seeds, lr, names, output)
        spawn: Any = torch.multiprocessing.spawn  # type: ignore[attr-defined]
        spawn(worker, args, nprocs=RANKS)
        runs: list[dict[str, Any]] = json.loads(Path(output).read_text())
        return runs


def summary(shards: str, method: str, runs: list[dict[str, Any]]) -> dict[str, float]:
    """Return means over the seeds."""
    chosen = [run for run in runs if (run["shards"], run["method"]) == (shards, method)]
    accuracies = [100 * run["validation_accuracy"] for run in chosen]
    return {
        "loss": statistics.mean(run["train_loss"] for run in chosen),
        "accuracy": statistics.mean(accuracies),
        "error": statistics.stdev(accuracies) / len(accuracies) ** 0.5 if len(chosen) > 1 else 0.0,
        "reductions": statistics.mean(run["reductions"] for run in chosen),
    }


def row(shards: str, method: str, runs: list[dict[str, Any]]) -> str:
    s = summary(shards, method, runs)
    return (
        f"{shards:<16} {method:<34} loss {s['loss']:.4f}  validation {s['accuracy']:.2f} +- {s['error']:.2f} %  "
        f"{s['reductions']:g} reductions"
    )


def table(document: dict[str, Any]) -> str:
    """Return the table of the guide, in Markdown."""
    runs = document["runs"]
    head = (
        "| | reductions | iid shards: training loss | validation accuracy, % "
        "| sorted by label: training loss | validation accuracy, % |"
    )
    lines = [head, "|---|---|---|---|---|---|"]
    for method in dict.fromkeys(run["method"] for run in runs):
        cells = [summary(shards, method, runs) for shards in SHARDS]
        results = " | ".join(
            f"{s['loss']:.4f} | {s['accuracy']:.2f} ± {s['error']:.2f}" for s in cells
        )
        lines.append(f"| {method} | {cells[0]['reductions']:g} | {results} |")
    return "\n".join(lines)


def write_table(document: dict[str, Any], guide: Path) -> None:
    """Put the table between its marks in the guide."""
    text = guide.read_text()
    start = STARTS[document["network"]]
    before, rest = text.split(start)
    _, after = rest.split(END, 1)
    guide.write_text(f"{before}{start}\n\n{table(document)}\n\n{END}{after}")


def draw(document: dict[str, Any], path: Path) -> None:
    """Write a PNG: validation accuracy and training loss over the number of reductions."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    runs = document["runs"]
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"Local SGD on the digits: {RANKS} ranks, {STEPS} steps, means of {document['seeds']} seeds"
    )
    panels = figure.subplots(2, 2, sharex=True, sharey="row")
    methods = list(dict.fromkeys(run["method"] for run in runs))
    for column, shards in enumerate(SHARDS):
        upper, lower = panels[:, column]
        for number, method in enumerate(methods):
            s = summary(shards, method, runs)
            look: dict[str, Any] = {
                "color": f"C{number}",
                "marker": "os^vD*PX<>"[number],
                "markersize": 8,
                "linestyle": "none",
                "label": method,
            }
            upper.errorbar(s["reductions"], s["accuracy"], yerr=s["error"], capsize=3, **look)
            lower.plot(s["reductions"], s["loss"], **look)
        reference = summary(shards, "synchronous", runs)
        upper.axhline(reference["accuracy"], color="C0", linewidth=0.8)
        lower.axhline(reference["loss"], color="C0", linewidth=0.8)
        upper.set_title(f"{shards} shards" if shards == "iid" else f"shards {shards}")
        upper.set_ylabel("validation accuracy, %")
        lower.set(ylabel="training loss", yscale="log", xscale="log", xlabel="reductions")
        lower.set_xticks([25, 50, 100, 200, 400, 800, 1600])
        lower.xaxis.set_major_formatter("{x:g}")
        lower.minorticks_off()
        for axes in (upper, lower):
            axes.grid(alpha=0.3)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize="small")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument(
        "--draw", type=Path, metavar="JSON", help="draw this file, and measure nothing"
    )
    parser.add_argument("--network", choices=list(NETWORKS), default="mlp")
    parser.add_argument("--seeds", type=int, help=f"default: {SEEDS}")
    parser.add_argument("--lr", type=float, default=LR, help="default: %(default)s")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="methods to train")
    args = parser.parse_args()
    if args.draw is not None:
        document = json.loads(args.draw.read_text())
        write_table(document, GUIDE)
        if document["network"] == "mlp":
            draw(document, PLOT)
        return
    seeds = SEEDS[args.network] if args.seeds is None else args.seeds
    runs = measure(args.network, seeds, args.lr, args.only)
    if args.json is not None:
        document = {
            "ranks": RANKS,
            "steps": STEPS,
            "batch": BATCH,
            "network": args.network,
            "sizes": SIZES,
            "lr": args.lr,
            "momentum": MOMENTUM,
            "seeds": seeds,
            "runs": runs,
        }
        args.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
