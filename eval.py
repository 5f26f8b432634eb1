"""Test a trained network on CIFAR-10's 10,000 test images, or let it name the classes of pictures.

    python eval.py                               accuracy of weights.pkl, class by class
    python eval.py --confusion confusion.png     and the confusion matrix as a graph
    python eval.py --full                        and how sure, how well calibrated, how robust
    python eval.py --tta                         and the accuracy with ten views of each image
    python eval.py --image cat.jpg ship.png      the three likeliest classes of any picture

Exit status: 0 when the accuracy reaches --min-accuracy, 1 when it does not, 2 for an error.
"""

import argparse
import ctypes
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from data import (
    CLASSES,
    DataError,
    Split,
    batches,
    corruptions,
    default_data_dir,
    load_cifar10,
    read_picture,
    replacing,
)
from model import ModelError, count_parameters, fold_batch_norm, load_weights

BATCH_SIZE = 25  # a layer's output stays in the cache; train.py measures with it too, so both give the same digits


# --- measuring --------------------------------------------------------------------------------


@torch.inference_mode()
def infer(network: nn.Module, split: Split, batch_size: int = BATCH_SIZE) -> torch.Tensor:
    """Log-probabilities (N, 10) of the images of `split`, on its device."""
    folded = fold_batch_norm(network).to(memory_format=torch.channels_last)  # as the batches are
    return torch.cat([folded(images) for images, _ in batches(split, batch_size)])


def accuracy_and_loss(log_probabilities: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """The accuracy in percent and the mean negative log-likelihood of (N, 10) against (N,)."""
    correct = (log_probabilities.argmax(dim=1) == labels).sum().item()
    return 100 * correct / len(labels), F.nll_loss(log_probabilities, labels).item()


def evaluate(network: nn.Module, split: Split) -> tuple[float, float]:
    """The accuracy in percent and the mean negative log-likelihood of `network` on `split`."""
    return accuracy_and_loss(infer(network, split), split.labels)


def confidence_interval(accuracy: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval, in percent, for an accuracy in percent that was measured on n images."""
    p, z = accuracy / 100, 1.96
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return 100 * (centre - half), 100 * (centre + half)


def calibration_error(log_probabilities: torch.Tensor, labels: torch.Tensor, bins: int = 15) -> float:
    """The expected calibration error in percent: by how much confidence and accuracy differ (arXiv 1706.04599).

    The images are binned by their likeliest class's probability; each bin counts by its number of images.
    """
    confidence, guess = log_probabilities.exp().max(dim=1)
    bin_of = (confidence * bins).ceil().long().clamp(1, bins) - 1
    excess = torch.zeros(bins, device=labels.device).index_add_(0, bin_of, confidence - (guess == labels).float())
    return 100 * excess.abs().sum().item() / len(labels)


def augmented_infer(network: nn.Module, split: Split, batch_size: int = BATCH_SIZE) -> torch.Tensor:
    """Test-time augmentation: log-probabilities (N, 10) of each image's mean over ten views.

    The image, and it shifted by one pixel along both diagonals; each as it is and mirrored.
    """
    padded = F.pad(split.images, (0, 0, 1, 1, 1, 1))
    shifted = [padded[:, row : row + 32, column : column + 32]
               for row, column in ((1, 1), (0, 0), (0, 2), (2, 0), (2, 2))]
    views = shifted + [images.flip(2) for images in shifted]
    probabilities = [infer(network, Split(images, split.labels), batch_size).exp() for images in views]
    return torch.stack(probabilities).mean(dim=0).log()


def robustness(network: nn.Module, split: Split, batch_size: int = BATCH_SIZE) -> dict[str, float]:
    """The accuracy in percent under each of data.corruptions."""
    accuracies = {}
    for name, spoil in corruptions().items():
        spoilt = Split(spoil(split.images.cpu()).to(split.images.device), split.labels)
        accuracies[name], _ = accuracy_and_loss(infer(network, spoilt, batch_size), split.labels)
    return accuracies


def confusion_matrix(log_probabilities: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Counts (10, 10): images of class `row` that were taken for class `column`."""
    cells = labels * len(CLASSES) + log_probabilities.argmax(dim=1)
    return torch.bincount(cells, minlength=len(CLASSES) ** 2).view(len(CLASSES), len(CLASSES)).cpu()


def precision_and_recall(confusion: torch.Tensor) -> tuple[list[float], list[float]]:
    """Both in percent, a class each; 0 for a class that was never predicted or has no image."""
    hits = 100.0 * confusion.diagonal()
    return (hits / confusion.sum(dim=0).clamp(min=1)).tolist(), (hits / confusion.sum(dim=1).clamp(min=1)).tolist()


def frequent_confusions(confusion: torch.Tensor, most: int = 5) -> list[tuple[int, str, str]]:
    """The `most` commonest mistakes, as (count, class, what it was taken for)."""
    mistakes = [
        (int(confusion[true, guess]), CLASSES[true], CLASSES[guess])
        for true in range(len(CLASSES)) for guess in range(len(CLASSES)) if true != guess
    ]
    return [mistake for mistake in sorted(mistakes, reverse=True)[:most] if mistake[0] > 0]


# --- showing ----------------------------------------------------------------------------------


def describe(network: nn.Module, facts: dict) -> str:
    """One line on what the weights file holds."""
    trainable, total = count_parameters(network)
    return (
        f"{type(network).__name__}, {trainable:,} trainable of {total:,} parameters; "
        f"recipe {facts.get('recipe', '?')}, seed {facts.get('seed', '?')}, {facts.get('epochs', math.nan):g} epochs"
    )


def class_table(confusion: torch.Tensor) -> str:
    rows = [f"{'class':12}{'precision':>10}{'recall':>9}"]
    for name, precision, recall in zip(CLASSES, *precision_and_recall(confusion)):
        rows.append(f"{name:12}{precision:9.1f}%{recall:8.1f}%")
    return "\n".join(rows)


def plot_confusion(confusion: torch.Tensor, title: str, path: Path) -> None:
    import matplotlib  # slow to import, and needed only here

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(figsize=(6.4, 5.6), layout="constrained")
    axes.imshow(confusion.numpy(), cmap="Blues")
    axes.set_xticks(range(len(CLASSES)), CLASSES, rotation=45, ha="right")
    axes.set_yticks(range(len(CLASSES)), CLASSES)
    axes.set(xlabel="taken for", ylabel="class", title=title)
    dark = confusion.max() / 2
    for true, row in enumerate(confusion.tolist()):
        for guess, count in enumerate(row):
            axes.text(guess, true, count, ha="center", va="center", fontsize=8,
                      color="white" if count > dark else "black")
    with replacing(path) as part:
        fig.savefig(part, dpi=120, format="png")
    plt.close(fig)


# --- shared with train.py ---------------------------------------------------------------------


def pick_device(name: str) -> torch.device:
    """The device that `--device` names: cpu, cuda, mps, or auto for the fastest that is there.

    Raises:
        ModelError: the named device is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, available in there.items() if available)
    elif not there[name]:
        raise ModelError(f"PyTorch finds no {name} device on this machine: leave --device away")
    return torch.device(name)


def positive(kind: type) -> Callable[[str], int | float]:
    """A parser of numbers of this kind above zero, for argparse."""

    def parse(text: str) -> int | float:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not above zero")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


def command_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options that both commands have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default=default_data_dir(), metavar="DIR",
                        help="where CIFAR-10 is or goes (default: $CIFAR10_DIR, else data; now %(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto",
                        help="where to compute; auto takes the fastest there is (default: %(default)s)")
    return parser


def exit_status(run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """What `run(args)` returns, or 2 and one sentence on stderr when it meets an error."""
    try:
        return run(args)
    except (DataError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"error: {error}: mend that, or name another place for the file", file=sys.stderr)
    return 2


# --- the command ------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--weights", default="weights.pkl", metavar="FILE", help="what train.py wrote (default: %(default)s)")
    add("--batch-size", type=positive(int), default=BATCH_SIZE, metavar="N",
        help="images at a time (default: %(default)s)")
    add("--min-accuracy", type=float, default=80.0, metavar="PERCENT",
        help="the bar for exit status 0 (default: %(default)s)")
    add("--json", action="store_true", help="print one JSON object instead of the report (default: off)")
    add("--confusion", type=Path, metavar="FILE.png", help="draw the confusion matrix there (default: not drawn)")
    add("--full", action="store_true",
        help="also the accuracy's 95 %% interval, calibration, accuracy on spoilt images (default: off)")
    add("--tta", action="store_true",
        help="also the accuracy of ten views of each image, shifted and mirrored (default: off)")
    add("--image", nargs="+", metavar="FILE", help="classify these pictures; needs no data set (default: none)")
    return parser


def classify_pictures(network: nn.Module, paths: list[str], device: torch.device, as_json: bool) -> None:
    """Print the three likeliest classes of each picture."""
    images = torch.cat([read_picture(path) for path in paths])
    unknown = torch.zeros(len(paths), dtype=torch.long)
    probabilities, classes = infer(network, Split(images, unknown).to(device)).exp().cpu().topk(3)
    guesses = {
        path: {CLASSES[k]: round(100 * p, 1) for k, p in zip(ks, ps)}
        for path, ks, ps in zip(paths, classes.tolist(), probabilities.tolist())
    }
    if as_json:
        print(json.dumps(guesses))
    else:
        for path, guess in guesses.items():
            print(f"{path}: " + ", ".join(f"{name} {percent:.1f} %" for name, percent in guess.items()))


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next tensors; handed back, the kernel clears each page of it anew.

    Does nothing where the C library is another.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, in bytes
        libc.mallopt(-3, 2**30)      # M_MMAP_THRESHOLD


def run(args: argparse.Namespace) -> int:
    device = pick_device(args.device)
    network, facts = load_weights(args.weights)
    network = network.to(device)
    if args.image:
        classify_pictures(network, args.image, device, args.json)
        return 0

    (test,) = load_cifar10(args.data_dir, ("test",))
    test = test.to(device)
    start = time.perf_counter()
    log_probabilities = infer(network, test, args.batch_size)
    accuracy, loss = accuracy_and_loss(log_probabilities, test.labels)
    seconds = time.perf_counter() - start
    confusion = confusion_matrix(log_probabilities, test.labels)
    passed = accuracy >= args.min_accuracy
    more = {}
    if args.full:
        more["interval"] = confidence_interval(accuracy, len(test.labels))
        more["calibration_error"] = calibration_error(log_probabilities, test.labels)
        more["corrupted"] = robustness(network, test, args.batch_size)
    if args.tta:
        more["tta_accuracy"], _ = accuracy_and_loss(augmented_infer(network, test, args.batch_size), test.labels)
    if args.confusion:
        plot_confusion(confusion, f"CIFAR-10 test set: {accuracy:.2f} %", args.confusion)
    if args.json:
        precision, recall = precision_and_recall(confusion)
        trainable, total = count_parameters(network)
        print(json.dumps({
            "network": type(network).__name__, "parameters": total, "trainable": trainable, "trained": facts,
            "images": len(test.labels), "accuracy": accuracy, "loss": loss,
            "precision": dict(zip(CLASSES, precision)), "recall": dict(zip(CLASSES, recall)),
            "images_per_second": len(test.labels) / seconds, "passed": passed, **more,
        }, default=str))
        return 0 if passed else 1

    print(describe(network, facts))
    print(f"{len(test.labels):,} test images: accuracy {accuracy:.2f} %, loss {loss:.4f} "
          f"({len(test.labels) / seconds:,.0f} images per second on {device})\n")
    print(class_table(confusion) + "\n")
    for count, name, guess in frequent_confusions(confusion):
        print(f"{count:5} times {name} was taken for {guess}")
    if args.full:
        low, high = more["interval"]
        print(f"\n95 % interval of the accuracy    {low:.2f} to {high:.2f} %")
        print(f"expected calibration error      {more['calibration_error']:6.2f} %")
        for name, percent in more["corrupted"].items():
            print(f"accuracy under {name:16} {percent:6.2f} %")
    if args.tta:
        print(f"\nwith test-time augmentation, ten views an image: {more['tta_accuracy']:.2f} %")
    print(f"\n{'PASSED' if passed else 'FAILED'}: {accuracy:.2f} % is "
          f"{'at least' if passed else 'below'} the bar of {args.min_accuracy:g} %")
    return 0 if passed else 1


def main(argv: list[str] | None = None) -> int:
    keep_freed_memory()
    try:
        return exit_status(run, make_parser().parse_args(argv))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
