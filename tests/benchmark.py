"""Speed, memory and accuracy for the time spent, on the real data: python tests/benchmark.py

Everything is measured in one run, since the same machine is not equally fast at all hours: compare
the ratios. Nothing else should run meanwhile. With --steps-only it takes about ten minutes on two
cores; the trainings take as long as the sum of their minutes says (docs/benchmark.txt).
"""

import argparse
import json
import math
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from data import Split, batches, default_data_dir, load_cifar10  # noqa: E402
from eval import BATCH_SIZE, infer  # noqa: E402
from model import build_network, save_weights  # noqa: E402
from train import OPTIMIZERS, RECIPES, Recipe, can_compile, train_epoch, write_csv  # noqa: E402


def interleaved(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each step, the steps taking turns; two rounds of warm-up (and compiling) first."""
    seconds = {name: [] for name in steps}
    for i in range(rounds + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if i >= 2:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def training_step(
    recipe: Recipe, images: torch.Tensor, labels: torch.Tensor,
    compiled: bool = False, fused: bool = False, threads: int = torch.get_num_threads(),
) -> Callable[[], None]:
    """One step of `recipe` on this batch: forward, backward, optimiser."""
    torch.manual_seed(0)
    network = build_network(recipe.network, dropout=recipe.dropout)
    (optimizer,) = OPTIMIZERS[recipe.optimizer](network, recipe)
    for group in optimizer.param_groups:
        group["fused"] = fused
    forward = torch.compile(network, dynamic=False) if compiled else network

    def step() -> None:
        torch.set_num_threads(threads)
        loss = F.nll_loss(forward(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


class NoNetwork(torch.nn.Module):
    """Gives the same answer to every image: what is left of an epoch is all that is not the network."""

    def __init__(self):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(10))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits.log_softmax(dim=0).expand(len(images), 10)


def seconds_around_a_step(recipe: Recipe, train: Split) -> float:
    """Seconds a step that train_epoch spends on batches, schedule and sums (and on stepping ten numbers)."""
    network = NoNetwork()
    optimizers = OPTIMIZERS[recipe.optimizer](network, recipe)
    start = time.perf_counter()
    train_epoch(network, optimizers, train, recipe, 0, torch.Generator().manual_seed(0))
    return (time.perf_counter() - start) / math.ceil(len(train.images) / recipe.batch_size)


def command(*words: str) -> tuple[float, float]:
    """Seconds of one run of a script, start-up included, and its largest resident memory in GB."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"{' '.join(words)} failed")
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, kB elsewhere
    return time.perf_counter() - start, usage.ru_maxrss * unit / 1e9


def plain_epoch(recipe: Recipe, data_dir: str) -> float:
    """Seconds of one epoch of `recipe` with none of the speed-ups: eager PyTorch, NCHW, float32."""
    (train,) = load_cifar10(data_dir, ("train",))
    train = Split(train.images.repeat(3, 1, 1, 1), train.labels.repeat(3))  # as many as enlarged: that takes as long
    torch.manual_seed(0)
    network = build_network(recipe.network, dropout=recipe.dropout)
    optimizers = OPTIMIZERS[recipe.optimizer](network, recipe)
    start = time.perf_counter()
    train_epoch(lambda images: network(images.contiguous()), optimizers, train, recipe, 0, torch.Generator())
    return time.perf_counter() - start


def plain_epoch_of_its_own(recipe: Recipe, data_dir: str) -> float:
    """`plain_epoch` in a process of its own: a later child would be charged with the memory it takes here."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(plain_epoch, (recipe, data_dir))


def trainings(recipe: str, epochs: list[float], seeds: int, data_dir: str, folder: Path) -> list[dict]:
    """Train `recipe` for each number of epochs, and with each seed for the recipe's own number.

    Each run leaves its log, result.json and weights in a directory of its own under `folder`.

    Returns:
        A row a run: epochs, seed, the accuracy at the last epoch, seconds from the start of the process to
        weights.pkl on disk, the largest resident memory in GB.
    """
    rows = []
    for n in epochs:
        for seed in range(seeds if n == RECIPES[recipe].epochs else 1):
            run_dir = folder / f"epochs{n:g}-seed{seed}"
            shutil.rmtree(run_dir, ignore_errors=True)
            start = time.time()
            _, memory = command(
                "train.py", "--recipe", recipe, "--epochs", str(n), "--seed", str(seed), "--device", "cpu",
                "--data-dir", data_dir, "--run-dir", str(run_dir), "--out", str(run_dir / "weights.pkl"))
            result = json.loads((run_dir / "result.json").read_text())
            seconds = (run_dir / "weights.pkl").stat().st_mtime - start
            rows.append({"epochs": n, "seed": seed, "accuracy": result["accuracy"], "seconds": round(seconds, 1),
                         "memory_gb": round(memory, 2)})
            print(f"  {n:4g} epochs, seed {seed}: {result['accuracy']:.2f} % in {seconds:.0f} s, {memory:.2f} GB",
                  flush=True)
    return rows


def plot_curve(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    axes.plot([row["seconds"] / 60 for row in rows], [row["accuracy"] for row in rows], "o")
    axes.set(xscale="log", xlabel="minutes on two CPU cores", ylabel="test accuracy (%)",
             title="CIFAR-10: python train.py --epochs N")
    for row in rows:
        if row["seed"] == 0:
            axes.annotate(f"N = {row['epochs']:g}", (row["seconds"] / 60, row["accuracy"]), xytext=(6, -10),
                          textcoords="offset points", fontsize=9)
    ticks = [1, 2, 5, 10, 20, 50, 100]
    axes.set_xticks(ticks, ticks)
    axes.set_xticks([], minor=True)
    axes.set_xlim(0.8, max(2 * max(row["seconds"] for row in rows) / 60, 6))
    axes.grid(alpha=0.3)
    fig.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default=default_data_dir(), help="where CIFAR-10 is (now %(default)s)")
    parser.add_argument("--rounds", type=int, default=25, help="steps timed of each kind (default: %(default)s)")
    parser.add_argument("--epochs", type=float, nargs="+", default=[0.8, 1.25, 2.5, 8, 48], metavar="N",
                        help="train recipe fast for these (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="of fast with its own epochs (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark"),
                        help="where the trainings, curve.csv and curve.png go (default: %(default)s)")
    parser.add_argument("--steps-only", action="store_true", help="no trainings (default: off)")
    args = parser.parse_args()
    data_dir = os.path.abspath(args.data_dir)
    args.folder = args.folder.resolve()
    recipe = RECIPES["report"]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, recipe report, batch {recipe.batch_size}")

    # first, while this process is small: a child is charged with its parent's memory at the fork
    with tempfile.TemporaryDirectory() as folder:
        weights = str(Path(folder) / "weights.pkl")
        save_weights(weights, build_network("report"), "report")  # untrained: that takes as long
        evaluation = ["eval.py", "--weights", weights, "--data-dir", data_dir, "--device", "cpu", "--min-accuracy", "0"]
        seconds = [command(*evaluation) for _ in range(3)]
        median = statistics.median(s for s, _ in seconds)
        print(f"\neval.py, start-up included: {median:.1f} s, peak {seconds[-1][1]:.2f} GB")
        seconds, memory = command("train.py", "--recipe", "report", "--epochs", "1", "--device", "cpu", "--data-dir",
                                  data_dir, "--run-dir", folder, "--out", weights)
        print(f"train.py --epochs 1, start-up and compiling included: {seconds:.0f} s, peak {memory:.2f} GB")

    if not args.steps_only:
        print("\ntrain.py --recipe fast --epochs N, from the start of the process to weights.pkl on disk", flush=True)
        before = plain_epoch_of_its_own(recipe, data_dir)
        rows = trainings("fast", args.epochs, args.seeds, data_dir, args.folder)
        both = [before * recipe.epochs, plain_epoch_of_its_own(recipe, data_dir) * recipe.epochs]
        whole = min(both)  # the machine is not equally fast all the time: the one that flatters less
        print(f"\nR, {recipe.epochs} times one epoch of recipe report in its plain form, before and after them: "
              f"{both[0] / 60:.1f} and {both[1] / 60:.1f} min")
        write_csv(args.folder / "curve.csv", [{**row, "share_of_R": round(row["seconds"] / whole, 4)} for row in rows])
        plot_curve(rows, args.folder / "curve.png")
        for n in args.epochs:
            runs = [row for row in rows if row["epochs"] == n]
            accuracies = [row["accuracy"] for row in runs]
            seconds = max(row["seconds"] for row in runs)
            print(f"  {n:4g} epochs: at most {seconds:5.0f} s = R/{whole / seconds:.1f}, "
                  f"{statistics.mean(accuracies):.2f} % "
                  f"(mean of {len(runs)}, {min(accuracies):.2f} to {max(accuracies):.2f})")

    train, test = load_cifar10(data_dir)
    images, labels = next(batches(train, recipe.batch_size))
    kinds = {
        "plain (eager, NCHW)": training_step(recipe, images.contiguous(), labels),
        "channels_last": training_step(recipe, images, labels),
        "channels_last, fused SGD": training_step(recipe, images, labels, fused=True),
        "channels_last, 1 thread": training_step(recipe, images, labels, threads=1),
    }
    if can_compile(torch.device("cpu")):
        kinds["channels_last, compiled"] = training_step(recipe, images, labels, compiled=True)
    step_seconds = interleaved(kinds, args.rounds)
    plain = step_seconds["plain (eager, NCHW)"]
    print("\ntraining step, forward + backward + optimiser")
    for name, seconds in step_seconds.items():
        speed = recipe.batch_size / seconds
        print(f"  {name:26}{1000 * seconds:7.0f} ms  {speed:7.0f} images/s  {plain / seconds:5.2f} x plain")

    around = seconds_around_a_step(recipe, train)
    share = around / (around + min(step_seconds.values()))
    print(f"\naround a step (batches, schedule, sums): {1000 * around:.2f} ms, {100 * share:.1f} % of the epoch")

    network = build_network("report").eval()  # untrained: that takes as long
    kinds = {
        "channels_last, as trained": lambda: [network(images) for images, _ in batches(test, BATCH_SIZE)],
        "channels_last, folded": lambda: infer(network, test),
    }
    with torch.inference_mode():
        inference_seconds = interleaved(kinds, 3)
    print("\ntesting 10,000 images")
    for name, seconds in inference_seconds.items():
        print(f"  {name:26}{seconds:7.2f} s   {len(test.labels) / seconds:7.0f} images/s")


if __name__ == "__main__":
    main()
