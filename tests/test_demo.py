"""``python -m sgdcore demo``: what it computes, what it prints, and how it ends.

Most tests run it in this process, where training takes under a second; what concerns pipes, signals
and exit codes is also run as a user runs it, in a process of its own.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for module in ("sklearn", "matplotlib", "tqdm"):
    pytest.importorskip(module)

import sgdcore
from sgdcore import demo

PROGRAM = "python -m sgdcore demo"
TEST_ACCURACY = re.compile(r"test accuracy (\d+\.\d) %")


def parse(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=PROGRAM)
    demo.add_arguments(parser)
    return parser.parse_args(options)


def run_here(*options: str) -> int:
    """Run the demo in this process and return its exit code; without a plot unless one is asked for."""
    return demo.main(parse("--no-plot", *options))


def command(*options: str) -> list[str]:
    return [sys.executable, "-m", "sgdcore", "demo", *options]


def headless() -> dict[str, str]:
    """The environment without a display, and with a backend that could not draw without one."""
    displays = ("DISPLAY", "WAYLAND_DISPLAY")
    return {**{k: v for k, v in os.environ.items() if k not in displays}, "MPLBACKEND": "TkAgg"}


def assert_is_plot(path: Path) -> None:
    from matplotlib.image import imread

    image = imread(path)
    assert image.shape[:2] == (480, 1200)
    assert image[..., :3].std() > 0.01, "the image is blank"


class SilentProgress(demo.Progress):
    """Shows nothing, whatever standard error is."""

    def __init__(self) -> None:
        super().__init__(epochs=1, steps=1, quiet=True)


def trained(*options: str) -> demo.History:
    """Train as the demo does with these options."""
    args = parse("--no-plot", *options)
    rng = np.random.default_rng(args.seed)
    data = demo.load_digits(args.dtype, args.seed)
    model = demo.MLP((64, *args.hidden, demo.CLASSES), args.dtype, rng)
    optimizer = sgdcore.SGD(
        model.parameters,
        lr=args.lr,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        nesterov=True,
    )
    history = demo.History()
    demo.train(
        model,
        optimizer,
        data,
        loss_function=demo.LOSSES[args.loss],
        schedule=demo.SCHEDULES[args.lr_decay],
        epochs=args.epochs,
        batch_size=args.batch_size,
        rng=rng,
        history=history,
        progress=SilentProgress(),
    )
    return history


# What it computes


@pytest.mark.parametrize("loss", demo.LOSSES)
@pytest.mark.parametrize("hidden", [(), (5,), (5, 4)], ids=lambda h: f"{len(h)}-hidden")
def test_backward_agrees_with_finite_differences(loss: str, hidden: tuple[int, ...]) -> None:
    rng = np.random.default_rng(7)
    model = demo.MLP((6, *hidden, 3), "float64", rng)
    inputs = rng.standard_normal((8, 6))
    labels = rng.integers(0, 3, 8)
    # The flat arrays: every weight and bias, and every gradient, one after the other.
    values, gradient = model.parameters.data, model.parameters.grad
    values += 0.1 * rng.standard_normal(values.shape)  # no bias stays 0
    gradient[...] = np.nan  # what is there must be overwritten, not added to

    def loss_now() -> float:
        return demo.LOSSES[loss](model.forward(inputs)[-1], labels)[0]

    activations = model.forward(inputs)
    model.backward(activations, demo.LOSSES[loss](activations[-1], labels)[1])
    epsilon = 1e-6
    numeric = np.empty_like(values)
    for index, value in enumerate(values.copy()):
        values[index] = value + epsilon
        above = loss_now()
        values[index] = value - epsilon
        below = loss_now()
        values[index] = value
        numeric[index] = (above - below) / (2 * epsilon)
    np.testing.assert_allclose(gradient, numeric, rtol=1e-6, atol=1e-8)


def test_cross_entropy_of_large_outputs_is_finite() -> None:
    loss, delta = demo.cross_entropy(np.array([[1e4, 0.0], [0.0, -1e4]]), np.array([1, 0]))
    assert loss == pytest.approx(5e3)
    assert np.isfinite(delta).all()


@pytest.mark.parametrize(
    ("name", "factors"),
    [("cosine", (1, 0.5, 0)), ("step", (1, 0.1, 0.01)), ("none", (1, 1, 1))],
)
def test_schedule(name: str, factors: tuple[float, ...]) -> None:
    schedule = demo.SCHEDULES[name]
    assert [schedule(done) for done in (0.0, 0.5, 1.0)] == pytest.approx(list(factors))


def test_digits_are_split_by_class_and_seed() -> None:
    data = demo.load_digits("float32", seed=3)
    assert (len(data.train_labels), len(data.test_labels)) == (1437, 360)
    assert data.train_images.dtype == data.test_images.dtype == np.float32
    np.testing.assert_allclose(data.train_images.mean(axis=0), 0, atol=1e-5)
    counts = np.bincount(data.test_labels)
    assert len(counts) == demo.CLASSES
    assert counts.min() >= 34
    other = demo.load_digits("float32", seed=4)
    assert not np.array_equal(data.test_labels, other.test_labels)


@pytest.mark.parametrize(
    "options",
    [
        ("--loss", "mse"),
        ("--dtype", "float64"),
        ("--hidden", "64", "32"),
        ("--lr-decay", "step"),
        ("--lr-decay", "none", "--lr", "0.05"),
        ("--batch-size", "100000"),
    ],
    ids=" ".join,
)
def test_options_train_too(options: tuple[str, ...]) -> None:
    first, *_, last = trained("--epochs", "10", *options).records
    assert last.epoch == 10
    assert first.test_accuracy < 0.5
    assert last.test_accuracy > (0.6 if "--batch-size" in options else 0.9)
    assert last.train_loss < first.train_loss


def test_same_seed_same_training() -> None:
    first, again, other = (trained("--epochs", "3", "--seed", seed) for seed in ("5", "5", "6"))
    assert first.records == again.records
    assert first.records != other.records


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
        {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
    ],
    ids=lambda options: "+".join(options) or "plain",
)
def test_sgdcore_agrees_with_numpy(options: dict[str, Any], dtype: str) -> None:
    defaults = {"momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False}
    times = demo.compare_steps(
        {"w": (7, 5), "b": (5,)},
        dtype,
        {"lr": 0.1, **defaults, **options},
        np.random.default_rng(0),
    )
    assert min(times.sgdcore, times.numpy, times.numpy_flat) > 0


def test_disagreement_with_numpy_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo.NumpySGD, "step", lambda self: None)
    assert run_here("--epochs", "1") == 1
    assert "sgdcore and NumPy disagree" in capsys.readouterr().err


# What it prints and writes


def test_in_a_pipe_the_defaults_reach_97_percent(tmp_path: Path) -> None:
    done = subprocess.run(
        command(), cwd=tmp_path, env=headless(), capture_output=True, timeout=60, check=False
    )
    out, err = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == 0, err
    for control in ("\r", "\x1b"):
        assert control not in out + err
    lines = err.splitlines()
    assert 5 <= len(lines) <= 12
    assert all(re.match(r"epoch \d+/60: loss \d\.\d+, test accuracy ", line) for line in lines)
    accuracy = TEST_ACCURACY.search(out)
    assert accuracy is not None
    assert float(accuracy[1]) >= 97
    assert re.search(r"^  sgdcore +\d+\.\d\d us$", out, re.MULTILINE)
    assert len(re.findall(r"^  NumPy, .* us +\d+\.\d x sgdcore's time$", out, re.MULTILINE)) == 2
    assert_is_plot(tmp_path / "sgdcore-demo.png")


class Terminal(io.StringIO):
    """Standard error as a terminal."""

    def isatty(self) -> bool:
        return True


def test_in_a_terminal_one_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert run_here("--epochs", "2") == 0
    shown = terminal.getvalue()
    assert shown.count("\n") == 1, "more than one bar, or lines beside it"
    last = shown.split("\r")[-1].rstrip()
    assert len(last) < 80
    assert "90/90" in last
    assert re.search(r"loss \d\.\d+, test accuracy \d+\.\d %", last)
    assert "Trained 2 of 2 epochs (90 steps)" in capsys.readouterr().out


def test_quiet_prints_only_results(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("--epochs", "1", "--quiet") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.startswith("Trained 1 of 1 epochs")


def test_plot_replaces_an_older_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plot.png"
    path.write_text("older")
    assert run_here("--epochs", "1", "--quiet", "--plot", str(path)) == 0
    assert_is_plot(path)
    assert f"Plot: {path}" in capsys.readouterr().out


def test_no_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_here("--epochs", "1", "--quiet") == 0
    assert list(tmp_path.iterdir()) == []


def test_threads_are_set_for_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    before = sgdcore.get_num_threads()
    seen = []

    def train(*args: object, **kwargs: object) -> None:
        seen.append(sgdcore.get_num_threads())
        raise demo.DemoError("enough")

    monkeypatch.setattr(demo, "train", train)
    assert run_here("--threads", "2") == 1
    assert seen == [2]
    assert sgdcore.get_num_threads() == before


# How it ends


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT for a single process")
def test_interrupt_ends_with_summary_and_plot(tmp_path: Path) -> None:
    # A process started in the background may have SIGINT ignored, and its children inherit that; a
    # handler is not inherited, it becomes the default.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            command("--epochs", "160"),
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(signal.SIGINT, handler)
    assert process.stderr is not None
    first = process.stderr.readline()  # after epoch 20
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert first.startswith("epoch 20/160")
    assert process.returncode == 130, err
    assert "Traceback" not in err
    summary = re.search(r"Interrupted after (\d+) of 160 epochs \(\d+ steps\)", out)
    assert summary is not None
    assert 20 <= int(summary[1]) < 160
    assert TEST_ACCURACY.search(out)
    assert "One optimizer step" not in out
    assert_is_plot(tmp_path / "sgdcore-demo.png")


@pytest.mark.parametrize("steps", [1, 100], ids=["first-epoch", "third-epoch"])
def test_interrupt_keeps_finished_epochs(
    steps: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    done = 0

    def step(self: demo.Progress) -> None:
        nonlocal done
        done += 1
        if done == steps:
            raise KeyboardInterrupt

    monkeypatch.setattr(demo.Progress, "step", step)
    assert run_here("--plot", str(tmp_path / "plot.png")) == 130
    epochs = steps // 45
    assert f"Interrupted after {epochs} of 60 epochs ({steps} steps)" in capsys.readouterr().out
    assert_is_plot(tmp_path / "plot.png")


def test_interrupt_of_the_timing_keeps_the_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "compare_steps", interrupted)
    assert run_here("--epochs", "1", "--plot", str(tmp_path / "plot.png")) == 130
    assert "Interrupted while timing" in capsys.readouterr().out
    assert_is_plot(tmp_path / "plot.png")


def test_interrupt_of_the_plot_keeps_the_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_bytes = Path.write_bytes

    def interrupted_once(self: Path, data: bytes) -> int:
        monkeypatch.setattr(Path, "write_bytes", write_bytes)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", interrupted_once)
    assert run_here("--epochs", "1", "--plot", str(tmp_path / "plot.png")) == 130
    assert f"Plot: {tmp_path / 'plot.png'}" in capsys.readouterr().out
    assert_is_plot(tmp_path / "plot.png")


def test_divergence(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("--lr", "1000", "--loss", "mse") == 1
    assert re.search(
        r"error: training diverged: the loss is (inf|nan) in epoch 1 .* try a smaller --lr",
        capsys.readouterr().err,
    )


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("sklearn", "scikit-learn"),
        ("tqdm", "tqdm"),
        ("matplotlib.backends.backend_agg", "matplotlib"),
    ],
)
def test_missing_extra(
    module: str,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert run_here("--plot", str(tmp_path / "plot.png")) == 1
    message = capsys.readouterr().err
    assert message.startswith(f"sgdcore demo: error: the demo needs {name} (")
    assert "): pip install 'sgdcore[demo]', or pip install '.[demo]' in a clone" in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--lr", "-1"), "--lr: must be a finite number of at least 0, got '-1'"),
        (("--lr", "inf"), "--lr: must be a finite number of at least 0, got 'inf'"),
        (("--lr", "fast"), "--lr: must be a finite number of at least 0, got 'fast'"),
        (("--weight-decay", "nan"), "--weight-decay: must be a finite number of at least 0, got"),
        (("--momentum", "1"), "--momentum: must be a number of at least 0 and below 1, got '1'"),
        (("--dampening", "-0.1"), "--dampening: must be a number of at least 0 and below 1, got"),
        (("--batch-size", "0"), "--batch-size: must be a whole number of at least 1, got '0'"),
        (("--epochs", "1.5"), "--epochs: must be a whole number of at least 1, got '1.5'"),
        (("--hidden", "8", "0"), "--hidden: must be a whole number of at least 1, got '0'"),
        (("--threads", "0"), "--threads: must be a whole number of at least 1, got '0'"),
        (("--seed", "-1"), "--seed: must be a whole number from 0 to 4294967295, got '-1'"),
        (("--loss", "hinge"), "--loss: invalid choice: 'hinge'"),
        (("--plot", "plot.pdf"), "--plot: must end in .png, got 'plot.pdf'"),
        (("--plot", "nowhere/plot.png"), "--plot: must be writable, got 'nowhere/plot.png' (No"),
        (("--plot", "directory.png"), "--plot: must be writable, got 'directory.png' (Is a"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_arguments(
    options: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "directory.png").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        parse(*options)
    assert exit_info.value.code == 2
    assert f"{PROGRAM}: error: argument {message}" in capsys.readouterr().err


@pytest.mark.parametrize("options", [("--momentum", "0"), ("--dampening", "0.5")], ids=" ".join)
def test_nesterov_where_it_is_not_defined(
    options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here("--nesterov", *options) == 2
    name, value = options
    message = capsys.readouterr().err
    assert "argument --nesterov: needs --momentum above 0 and --dampening 0, got" in message
    assert f"{name} {float(value)}" in message
    assert run_here(*options, "--epochs", "1", "--quiet") == 0  # the default adapts


def test_checking_the_plot_path_leaves_no_file(tmp_path: Path) -> None:
    assert parse("--plot", str(tmp_path / "plot.png")).plot == tmp_path / "plot.png"
    assert list(tmp_path.iterdir()) == []


def test_plot_that_fails_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert run_here("--epochs", "1", "--quiet", "--plot", str(tmp_path / "plot.png")) == 1
    captured = capsys.readouterr()
    assert "Trained 1 of 1 epochs" in captured.out
    assert "cannot write the plot: [Errno 28] No space left on device" in captured.err


def test_exit_code_of_the_command(tmp_path: Path) -> None:
    done = subprocess.run(
        command("--lr=-1"), cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "error: argument --lr: must be a finite number of at least 0, got '-1'" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="a pipe whose reader has left is POSIX")
def test_reader_of_the_pipe_leaves(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command("--epochs", "5", "--no-plot"),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    err = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(timeout=60) == 1
    assert "Traceback" not in err
    assert "BrokenPipe" not in err
