"""Speed and memory, on the real data: python tests/benchmark.py

Everything is measured in one run, since the same machine is not equally fast at all hours: compare
the ratios. Nothing else should run meanwhile; it takes about ten minutes on two cores.
"""

import argparse
import math
import os
import resource
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
from train import OPTIMIZERS, RECIPES, Recipe, can_compile, train_epoch  # noqa: E402


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
    optimizer = OPTIMIZERS[recipe.optimizer](network.parameters(), recipe)
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
    optimizer = OPTIMIZERS[recipe.optimizer](network.parameters(), recipe)
    start = time.perf_counter()
    train_epoch(network, optimizer, train, recipe, 0, torch.Generator().manual_seed(0))
    return (time.perf_counter() - start) / math.ceil(len(train.images) / recipe.batch_size)


def command(*words: str) -> tuple[float, float]:
    """Seconds of one run of a script, start-up included, and the largest resident memory so far, in GB."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, kB elsewhere
    return time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default=default_data_dir(), help="where CIFAR-10 is (now %(default)s)")
    parser.add_argument("--rounds", type=int, default=25, help="steps timed of each kind (default: %(default)s)")
    args = parser.parse_args()
    data_dir = os.path.abspath(args.data_dir)
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
