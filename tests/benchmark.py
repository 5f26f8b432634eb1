"""Speed and memory, on the real data: python tests/benchmark.py

Everything is measured in one run, since the same machine is not equally fast at all hours: compare
the ratios. Nothing else should run meanwhile; it takes about ten minutes on two cores.
"""

import argparse
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

from data import batches, default_data_dir, load_cifar10  # noqa: E402
from eval import infer  # noqa: E402
from model import build_network  # noqa: E402
from train import OPTIMIZERS, RECIPES, can_compile  # noqa: E402


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


def training_step(recipe, images: torch.Tensor, labels: torch.Tensor, compiled: bool) -> Callable[[], None]:
    torch.manual_seed(0)
    network = build_network(recipe.network, dropout=recipe.dropout)
    optimizer = OPTIMIZERS[recipe.optimizer](network.parameters(), recipe)
    forward = torch.compile(network, dynamic=False) if compiled else network

    def step() -> None:
        loss = F.nll_loss(forward(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def command(*words: str) -> tuple[float, float]:
    """Seconds of one run of a script, start-up included, and the largest resident memory so far, in GB."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, kB elsewhere
    return time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default=default_data_dir(), help="where CIFAR-10 is (now %(default)s)")
    parser.add_argument("--rounds", type=int, default=25, help="training steps timed of each kind (default: %(default)s)")
    args = parser.parse_args()
    data_dir = os.path.abspath(args.data_dir)
    recipe = RECIPES["report"]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, recipe report, batch {recipe.batch_size}")

    train, test = load_cifar10(data_dir)
    images, labels = next(batches(train, recipe.batch_size))
    kinds = {
        "plain (eager, NCHW)": training_step(recipe, images.contiguous(), labels, compiled=False),
        "eager, channels_last": training_step(recipe, images, labels, compiled=False),
    }
    if can_compile(torch.device("cpu")):
        kinds["compiled, channels_last"] = training_step(recipe, images, labels, compiled=True)
    step_seconds = interleaved(kinds, args.rounds)
    plain = step_seconds["plain (eager, NCHW)"]
    print("\ntraining step, forward + backward + optimiser")
    for name, seconds in step_seconds.items():
        print(f"  {name:26}{1000 * seconds:7.0f} ms  {recipe.batch_size / seconds:7.0f} images/s  {plain / seconds:5.2f} x plain")

    start = time.perf_counter()
    count = sum(1 for _ in batches(train, recipe.batch_size, torch.Generator().manual_seed(0)))
    batch = (time.perf_counter() - start) / count
    share = batch / (batch + min(step_seconds.values()))
    print(f"\nmaking a batch: {1000 * batch:.2f} ms, {100 * share:.1f} % of a step")

    network = build_network("report").eval()
    kinds = {
        "batch norm as it is": lambda: [network(images) for images, _ in batches(test, recipe.batch_size)],
        "folded": lambda: infer(network, test),
    }
    with torch.inference_mode():
        inference_seconds = interleaved(kinds, 3)
    print("\ntesting 10,000 images")
    for name, seconds in inference_seconds.items():
        print(f"  {name:26}{seconds:7.2f} s   {len(test.labels) / seconds:7.0f} images/s")

    with tempfile.TemporaryDirectory() as folder:
        weights = str(Path(folder) / "weights.pkl")
        evaluation = ["eval.py", "--data-dir", data_dir, "--device", "cpu", "--min-accuracy", "0"]
        seconds = [command(*evaluation) for _ in range(3)]
        print(f"\neval.py, start-up included: {statistics.median(s for s, _ in seconds):.1f} s, peak {seconds[-1][1]:.2f} GB")
        seconds, memory = command("train.py", "--recipe", "report", "--epochs", "1", "--device", "cpu", "--data-dir",
                                  data_dir, "--run-dir", folder, "--out", weights)
        print(f"train.py --epochs 1, start-up included: {seconds:.0f} s, peak {memory:.2f} GB")


if __name__ == "__main__":
    main()
