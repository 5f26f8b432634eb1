"""Seconds of a training step, of the augmentation and of inference, on the real data.

    python tests/benchmark.py

Let nothing else run meanwhile, and compare the ratios within one run: a machine is not equally fast at all hours.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

import eval
import model
from data import DEFAULT_DATA_DIR, Split, TrainLoader, load_training_data, normalize, path_option
from train import RECIPES, Recipe, build_optimizers, make_step, train_one_epoch


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


def training_step(recipe: Recipe, train: Split, size: int = 32, has_teachers: bool = False) -> Callable[[], None]:
    """One step of `recipe` on images of this size, as train.py takes it; an untrained teacher has all turns."""
    torch.manual_seed(0)
    network = model.build_network(recipe.network)
    optimizers = build_optimizers(network, recipe)
    teachers = has_teachers * [model.export(network)]
    batch = normalize(train.images[: recipe.batch_size]), train.labels[: recipe.batch_size]
    step = make_step(network, teachers, optimizers, recipe, [(size, 1.0)])
    return lambda: train_one_epoch(network, step, [batch], range(1))


def print_steps(train: Split, rounds: int) -> None:
    steps = {}
    for amp_bf16 in (False, True) if eval.has_bf16(torch.device("cpu")) else (False,):
        precision = "bfloat16" if amp_bf16 else "float32"
        report, fast, best = (
            dataclasses.replace(RECIPES[name], amp_bf16=amp_bf16) for name in ("report", "fast", "best"))
        plain = dataclasses.replace(fast, network="plain")
        for name, recipe in {"report": report, "plain": plain, "fast": fast, "best": best}.items():
            steps[f"{name}, {precision}"] = recipe, training_step(recipe, train)
        for size in (24, 16):
            steps[f"best, {precision}, {size}x{size}"] = best, training_step(best, train, size)
        steps[f"best, {precision}, with teachers"] = best, training_step(best, train, has_teachers=True)
    print("\ntraining step at 32x32: forward, backward, optimizer")
    seconds = alternate({name: step for name, (_, step) in steps.items()}, rounds)
    for name, (recipe, _) in steps.items():
        print(f"  {name:36}{1000 * seconds[name]:7.0f} ms  {recipe.batch_size / seconds[name]:7.0f} images per second")


def print_loader(train: Split) -> None:
    """The seconds that train.py spends outside the network in an epoch of "fast"."""
    loader = TrainLoader(train, RECIPES["fast"])
    start = time.perf_counter()
    next(iter(loader))  # draws the random versions
    augmented = time.perf_counter()
    for _ in loader:
        pass
    print(f"\nan epoch of fast outside the network: augmentation {augmented - start:.1f} s, "
          f"{len(loader)} batches {time.perf_counter() - augmented:.1f} s")


def print_inference(test: Split) -> None:
    network = model.build_network(RECIPES["best"].network).eval()  # untrained: that takes as long

    @torch.inference_mode()
    def as_trained() -> None:
        for images in test.images.split(40):
            network(normalize(images))

    seconds = alternate({"as trained": as_trained, "as eval.py does": lambda: eval.infer(network, test.images)}, 3)
    print(f"\ninference on the {len(test.images):,} test images, network of best")
    for name, value in seconds.items():
        print(f"  {name:36}{value:7.2f} s   {len(test.images) / value:7.0f} images per second")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25, metavar="N", help="steps timed of each kind (default: 25)")
    parser.add_argument("--data-dir", type=path_option, default=DEFAULT_DATA_DIR, metavar="DIR")
    args = parser.parse_args(argv)
    eval.reuse_freed_memory()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    train, test = load_training_data(args.data_dir)
    print_steps(train, args.rounds)
    print_loader(train)
    print_inference(test)


if __name__ == "__main__":
    main()
