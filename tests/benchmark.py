"""Speed, memory and accuracy for the time spent, on the real data.

    python tests/benchmark.py                trainings too: an hour and a half on two cores
    python tests/benchmark.py --steps-only   about five minutes

Let nothing else run meanwhile, and compare the ratios within one run: a machine is not equally fast at all hours.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

import model
from data import DEFAULT_DATA_DIR, Split, TrainLoader, load_cifar10, normalize
from eval import infer
from train import RECIPES, Recipe, build_optimizers, train_one_epoch

PYTHON = [sys.executable]
TRAININGS = [  # options of train.py
    *[f"--recipe quick --seed {seed}" for seed in range(5)],
    "--recipe quick --epochs 2",
    *[f"--recipe fast --seed {seed}" for seed in range(5)],
    "--recipe fast --epochs 8",
]


def alternate(functions: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """The median seconds of each function, called in turn `rounds` times after one call that does not count."""
    seconds = {name: [] for name in functions}
    for round in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if round:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure_process(*words: str, python: list[str] | None = None) -> tuple[float, float]:
    """The seconds that one run of Python takes with these arguments, start-up included, and its peak memory in GB."""
    start = time.perf_counter()
    process = subprocess.Popen([*(python or PYTHON), *words], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"failed: {' '.join(words)}")
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    return time.perf_counter() - start, usage.ru_maxrss * unit / 1e9


def training_step(
    recipe: Recipe, images: torch.Tensor, labels: torch.Tensor, *, teachers: int = 0, threads: int = 2,
) -> Callable[[], None]:
    """One step of `recipe` on this batch, as train.py takes it, on `threads` threads; with untrained teachers."""
    torch.manual_seed(0)
    network = model.build_network(recipe.network, dropout=recipe.dropout)
    optimizers = build_optimizers(network, recipe)
    exported = [model.export(network).to(memory_format=torch.channels_last) for _ in range(teachers)]
    recipe = dataclasses.replace(recipe, low_resolution_share=0.0)

    def step() -> None:
        torch.set_num_threads(threads)
        train_one_epoch(network, exported, [(images, labels)], optimizers, recipe, range(1), 1)

    return step


def print_steps(train: Split, rounds: int) -> None:
    report, fast, best = RECIPES["report"], RECIPES["fast"], RECIPES["best"]
    images, labels = normalize(train.images[: report.batch_size]), train.labels[: report.batch_size]
    small, small_labels = images[: fast.batch_size], labels[: fast.batch_size]
    plain = "report, float32, contiguous memory"
    steps = {plain: (report, training_step(dataclasses.replace(report, amp_bf16=False), images.contiguous(), labels))}
    for amp_bf16 in (False, True) if model.has_bf16(torch.device("cpu")) else (False,):
        report, fast, best = (dataclasses.replace(recipe, amp_bf16=amp_bf16) for recipe in (report, fast, best))
        name = "bfloat16" if amp_bf16 else "float32"
        steps |= {
            f"report, {name}": (report, training_step(report, images, labels)),
            f"fast, {name}": (fast, training_step(fast, small, small_labels)),
            f"fast, {name}, one thread": (fast, training_step(fast, small, small_labels, threads=1)),
            f"best, {name}": (best, training_step(best, small, small_labels)),
            f"best, {name}, with a teacher": (best, training_step(best, small, small_labels, teachers=1)),
        }
    print("\ntraining step at 32x32: forward, backward, optimizer")
    seconds = alternate({name: step for name, (_, step) in steps.items()}, rounds)
    for name, (recipe, _) in steps.items():
        print(f"  {name:36}{1000 * seconds[name]:7.0f} ms  {recipe.batch_size / seconds[name]:7.0f} images per second")
    minutes = report.epochs * 3 * len(train.images) / report.batch_size * seconds[plain] / 60
    print(f"all steps of the report's recipe, in contiguous memory: {minutes:.1f} minutes")


def print_loader(train: Split) -> None:
    """The seconds that train.py spends outside the network in an epoch of "fast"."""
    recipe = RECIPES["fast"]
    loader = TrainLoader(
        train, batch_size=recipe.batch_size, resample=True, autoaugment_group_size=recipe.autoaugment_group_size,
        crop_padding=recipe.crop_padding)
    start = time.perf_counter()
    next(iter(loader))  # draws the random forms
    augmented = time.perf_counter()
    for _ in loader:
        pass
    print(f"\nan epoch of fast outside the network: augmentation {augmented - start:.1f} s, "
          f"{len(loader)} batches {time.perf_counter() - augmented:.1f} s")


def print_inference(test: Split) -> None:
    network = model.build_network(RECIPES["best"].network).eval()  # untrained: that takes as long

    @torch.inference_mode()
    def infer_as_trained() -> None:
        for images in test.images.split(25):
            network(normalize(images))

    functions = {"as trained, batches of 25": infer_as_trained} | {
        f"exported, batches of {size}": lambda size=size: infer(network, test.images, size) for size in (25, 250, 1000)}
    print(f"\ninference on the {len(test.images):,} test images, network of best")
    for name, seconds in alternate(functions, 3).items():
        print(f"  {name:36}{seconds:7.2f} s   {len(test.images) / seconds:7.0f} images per second")


def print_trainings(trainings: list[str], data_dir: str, folder: Path) -> None:
    """Run train.py with each of these options."""
    print("\ntrain.py, start-up included")
    for options in trainings:
        run_dir = folder / options.replace("--", "").replace(" ", "-")
        seconds, memory = measure_process(
            str(ROOT / "train.py"), *options.split(), "--data-dir", data_dir, "--run-dir", str(run_dir),
            "--out", str(run_dir / "weights.pkl"), "--device", "cpu", "--overwrite")
        accuracy = json.loads((run_dir / "result.json").read_text())["accuracy"]
        print(f"  {options:28} {accuracy:.2f} % in {seconds:4.0f} s, {memory:.2f} GB", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--steps-only", action="store_true", help="no trainings")
    add("--rounds", type=int, default=25, metavar="N", help="steps timed of each kind (default: %(default)s)")
    add("--trainings", nargs="+", default=TRAININGS, metavar="OPTIONS", help="of train.py (default: %(default)s)")
    add("--folder", type=Path, default=Path("runs/benchmark"), metavar="DIR", help="for them (default: %(default)s)")
    add("--data-dir", default=DEFAULT_DATA_DIR, metavar="DIR", help="the data set (default: $CIFAR10_DIR, or data)")
    args = parser.parse_args(argv)
    data_dir = os.path.abspath(args.data_dir)
    model.reuse_freed_memory()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")

    # first, while this process is small: the memory of a child starts with that of its parent
    evaluation = [str(ROOT / "eval.py"), "--weights", str(ROOT / "weights.pkl"), "--data-dir", data_dir,
                  "--device", "cpu", "--min-accuracy", "0"]
    importing = [sys.executable, "-c", "import torch"]
    runs = [(*measure_process(python=importing), *measure_process(*evaluation)) for _ in range(5)]
    ratio = statistics.median(seconds / import_seconds for import_seconds, _, seconds, _ in runs)
    print(f"eval.py: {statistics.median(run[2] for run in runs):.1f} s, {ratio:.2f} times as long as import torch, "
          f"peak memory {runs[0][3]:.2f} GB")
    with tempfile.TemporaryDirectory() as folder:
        seconds, memory = measure_process(
            str(ROOT / "train.py"), "--epochs", "0.1", "--validate", "--run-dir", folder, "--data-dir", data_dir)
    print(f"train.py --epochs 0.1 --validate: {seconds:.1f} s, peak memory {memory:.2f} GB", flush=True)
    if not args.steps_only:
        print_trainings(args.trainings, data_dir, args.folder)
    train, test = load_cifar10(data_dir)
    print_steps(train, args.rounds)
    print_loader(train)
    print_inference(test)


if __name__ == "__main__":
    main()
