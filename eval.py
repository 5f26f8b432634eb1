"""Test a trained network on the 10,000 test images of CIFAR-10, or classify images of your own.

    python eval.py                               accuracy of weights.pkl, class by class
    python eval.py --weights runs/mine.pkl       of other weights
    python eval.py --confusion confusion.png     also draw the confusion matrix
    python eval.py --mistakes mistakes.png       also draw the most confident mistakes
    python eval.py --full                        also confidence interval, calibration, corruptions
    python eval.py --tta                         also the accuracy with test-time augmentation
    python eval.py --image cat.jpg ship.png      the three likeliest classes of any image

Exit status: 0 when the accuracy reaches --min-accuracy, 1 when it does not, 2 for an error.
"""

import argparse
import io
import json
import math
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import model
from data import CLASSES, DEFAULT_DATA_DIR, DataError, Split, load_cifar10, normalize

# --- metrics --------------------------------------------------------------------------------------

def infer(network: nn.Module, images: torch.Tensor, batch_size: int | None = None) -> torch.Tensor:
    """Log-probabilities (N, 10) of uint8 images (N, 32, 32, 3), on their device."""
    network = model.export(network).to(memory_format=torch.channels_last)
    on_cpu = images.device.type == "cpu"
    batch_size = batch_size or (40 if on_cpu else 1000)  # 40: the output of a layer stays in the cache of a CPU
    threads = torch.get_num_threads()

    @torch.inference_mode()
    def infer_batch(batch: torch.Tensor) -> torch.Tensor:
        if on_cpu:  # a thread for each batch is faster than several threads for one batch
            torch.set_num_threads(1)
        return network(normalize(batch))

    with ThreadPoolExecutor(threads if on_cpu else 1) as pool:
        log_probabilities = torch.cat(list(pool.map(infer_batch, images.split(batch_size))))
    torch.set_num_threads(threads)
    return log_probabilities


def accuracy_and_loss(log_probabilities: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """The accuracy in percent and the mean negative log-likelihood of (N, 10) against (N,)."""
    correct = (log_probabilities.argmax(dim=1) == labels).sum().item()
    return 100 * correct / len(labels), F.nll_loss(log_probabilities, labels).item()


def evaluate(network: nn.Module, split: Split) -> tuple[float, float]:
    """The accuracy in percent and the mean negative log-likelihood of `network` on `split`."""
    return accuracy_and_loss(infer(network, split.images), split.labels)


def confidence_interval(accuracy: float, n: int) -> tuple[float, float]:
    """The 95 % Wilson interval, in percent, of an accuracy in percent on n images."""
    p, z = accuracy / 100, 1.96
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return 100 * (centre - half), 100 * (centre + half)


def calibration_error(log_probabilities: torch.Tensor, labels: torch.Tensor, bins: int = 15) -> float:
    """The expected calibration error in percent (Guo et al. 2017, arXiv 1706.04599).

    Images are binned by the probability of their likeliest class, their confidence. The result is the mean over
    the bins, weighted by their images, of the absolute difference between mean confidence and accuracy.
    """
    confidence, predicted = log_probabilities.exp().max(dim=1)
    bin_of = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gap = torch.zeros(bins, device=labels.device)
    gap.index_add_(0, bin_of, confidence - (predicted == labels).float())
    return 100 * gap.abs().sum().item() / len(labels)


def confusion_matrix(log_probabilities: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Counts (10, 10): images of class `row` that were predicted as class `column`."""
    cells = labels * len(CLASSES) + log_probabilities.argmax(dim=1)
    return torch.bincount(cells, minlength=len(CLASSES) ** 2).view(len(CLASSES), len(CLASSES)).cpu()


def precision_and_recall(confusion: torch.Tensor) -> tuple[list[float], list[float]]:
    """Both in percent for each class; 0 for a class that was never predicted or has no images."""
    hits = 100.0 * confusion.diagonal()
    return (hits / confusion.sum(dim=0).clamp(min=1)).tolist(), (hits / confusion.sum(dim=1).clamp(min=1)).tolist()


def confident_mistakes(log_probabilities: torch.Tensor, labels: torch.Tensor, n: int = 24) -> list[dict]:
    """The misclassified images with the highest probability of the predicted class, in percent, highest first."""
    confidence, predicted = log_probabilities.exp().max(dim=1)
    confidence = confidence.masked_fill(predicted == labels, -1)
    wrong = confidence.argsort(descending=True, stable=True)[: min(n, (predicted != labels).sum())].tolist()
    return [{"image": i, "class": CLASSES[labels[i]], "predicted": CLASSES[predicted[i]],
             "probability": round(100 * confidence[i].item(), 2)} for i in wrong]


def tta_infer(network: nn.Module, images: torch.Tensor, batch_size: int | None = None) -> torch.Tensor:
    """Log-probabilities (N, 10) of the mean probability over ten views: the image and its shifts by one pixel along
    both diagonals, each with its mirror image."""
    padded = F.pad(images, (0, 0, 1, 1, 1, 1))
    corners = ((1, 1), (0, 0), (0, 2), (2, 0), (2, 2))
    shifted = [padded[:, row : row + 32, column : column + 32] for row, column in corners]
    views = shifted + [view.flip(2) for view in shifted]
    probabilities = [infer(network, view, batch_size).exp() for view in views]
    return torch.stack(probabilities).mean(dim=0).log()


def corruptions() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Four of CIFAR-10-C's corruptions, each uint8 (N, 32, 32, 3) -> the same, on the CPU, at the third of
    its five severities (Hendrycks & Dietterich 2019, arXiv 1903.12261)."""
    from PIL import Image  # torchvision brings Pillow
    from torchvision.transforms.v2 import functional

    def gaussian_noise(images: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        return (images + 0.08 * 255 * noise).round().clamp(0, 255).byte()

    def gaussian_blur(images: torch.Tensor) -> torch.Tensor:
        return functional.gaussian_blur(images.permute(0, 3, 1, 2), kernel_size=5, sigma=0.7).permute(0, 2, 3, 1)

    def jpeg(images: torch.Tensor) -> torch.Tensor:
        corrupted = torch.empty_like(images)
        for i, image in enumerate(images.numpy()):
            Image.fromarray(image).save(file := io.BytesIO(), "JPEG", quality=58)
            corrupted[i] = torch.from_numpy(np.array(Image.open(file)))
        return corrupted

    def contrast(images: torch.Tensor) -> torch.Tensor:
        mean = images.float().mean(dim=(1, 2), keepdim=True)
        return (mean + 0.4 * (images - mean)).round().byte()

    return {"gaussian noise": gaussian_noise, "gaussian blur": gaussian_blur, "jpeg": jpeg, "contrast": contrast}


def corruption_accuracy(network: nn.Module, split: Split, batch_size: int | None = None) -> dict[str, float]:
    """The accuracy in percent under each of the corruptions."""
    images, device, accuracies = split.images.cpu(), split.images.device, {}
    for name, corrupt in corruptions().items():
        log_probabilities = infer(network, corrupt(images).to(device), batch_size)
        accuracies[name], _ = accuracy_and_loss(log_probabilities, split.labels)
    return accuracies


# --- images of your own ---------------------------------------------------------------------------

def load_image(path: str) -> torch.Tensor:
    """The central square of any image file, as uint8 (1, 32, 32, 3): upright, and on white where it is transparent."""
    from PIL import Image, ImageOps  # torchvision brings Pillow

    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip to white
                image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
            image = image.convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as an image ({error}): name a JPEG or PNG file") from None
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    image = ImageOps.fit(image, (32, 32), method=Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image))[None]


def classify(network: nn.Module, paths: list[str], device: torch.device) -> dict[str, dict[str, float]]:
    """The three likeliest classes of each image file, with their probabilities in percent."""
    images = torch.cat([load_image(path) for path in paths]).to(device)
    probabilities, classes = infer(network, images).exp().cpu().topk(3)
    return {
        path: {CLASSES[k]: round(100 * p, 1) for k, p in zip(ks, ps, strict=True)}
        for path, ks, ps in zip(paths, classes.tolist(), probabilities.tolist(), strict=True)
    }


# --- the report -----------------------------------------------------------------------------------

def make_report(network: nn.Module, metadata: dict, test: Split, args: argparse.Namespace) -> dict:
    """Everything that is measured, under the names that --json prints."""
    start = time.perf_counter()
    log_probabilities = infer(network, test.images, args.batch_size)
    seconds = time.perf_counter() - start
    accuracy, loss = accuracy_and_loss(log_probabilities, test.labels)
    confusion = confusion_matrix(log_probabilities, test.labels)
    precision, recall = precision_and_recall(confusion)
    report = {
        "trained": metadata, "parameters": model.count_parameters(network),
        "images": len(test.labels), "accuracy": accuracy, "loss": loss, "passed": accuracy >= args.min_accuracy,
        "images_per_second": len(test.labels) / seconds,
        "precision": dict(zip(CLASSES, precision, strict=True)), "recall": dict(zip(CLASSES, recall, strict=True)),
        "confusion": confusion.tolist(), "confident_mistakes": confident_mistakes(log_probabilities, test.labels),
    }
    if args.full:
        report["interval"] = confidence_interval(accuracy, len(test.labels))
        report["calibration_error"] = calibration_error(log_probabilities, test.labels)
        report["corruption_accuracy"] = corruption_accuracy(network, test, args.batch_size)
    if args.tta:
        report["tta_accuracy"], _ = accuracy_and_loss(tta_infer(network, test.images, args.batch_size), test.labels)
    return report


def print_report(report: dict, device: torch.device, min_accuracy: float) -> None:
    print(f"{model.describe_training(report['trained'])}: {report['parameters']:,} parameters")
    print(f"{report['images']:,} test images: accuracy {report['accuracy']:.2f} %, loss {report['loss']:.4f} "
          f"({report['images_per_second']:,.0f} images per second on {device})")
    print(f"\n{'class':12}{'precision':>10}{'recall':>9}")
    for name in CLASSES:
        print(f"{name:12}{report['precision'][name]:9.1f}%{report['recall'][name]:8.1f}%")
    print()
    mistakes = [(count, CLASSES[i], CLASSES[j]) for i, row in enumerate(report["confusion"])
                for j, count in enumerate(row) if i != j and count]
    for count, name, predicted in sorted(mistakes, reverse=True)[:5]:
        print(f"{count:5} images of class {name} were classified as {predicted}")
    if "interval" in report:
        low, high = report["interval"]
        print(f"\n95 % confidence interval        {low:.2f} to {high:.2f} %")
        print(f"expected calibration error      {report['calibration_error']:6.2f} %")
        for name, percent in report["corruption_accuracy"].items():
            print(f"accuracy under {name:16} {percent:6.2f} %")
    if "tta_accuracy" in report:
        print(f"\nwith test-time augmentation, ten views per image: {report['tta_accuracy']:.2f} %")
    print(f"\n{'PASSED' if report['passed'] else 'FAILED'}: {report['accuracy']:.2f} % is "
          f"{'at least' if report['passed'] else 'below'} the bar of {min_accuracy:g} %")


def plot_confusion(report: dict, path: Path) -> None:
    """Draw the confusion matrix as a PNG file."""
    from matplotlib.figure import Figure  # slow to import, and needed only here

    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    axes = figure.subplots()
    confusion = np.array(report["confusion"])
    axes.imshow(confusion, cmap="Blues")
    axes.set_xticks(range(len(CLASSES)), CLASSES, rotation=45, ha="right")
    axes.set_yticks(range(len(CLASSES)), CLASSES)
    axes.set(xlabel="predicted class", ylabel="class", title=f"CIFAR-10 test set: {report['accuracy']:.2f} %")
    for (row, column), count in np.ndenumerate(confusion):
        axes.text(column, row, count, ha="center", va="center", fontsize=8,
                  color="white" if count > confusion.max() / 2 else "black")
    figure.savefig(path, dpi=120, format="png")


def plot_mistakes(report: dict, test: Split, path: Path) -> None:
    """Draw the most confident mistakes, each with its class and the class and probability that were predicted."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 8.0), layout="constrained")
    figure.suptitle("CIFAR-10 test set, most confident mistakes: class, then predicted class and its probability")
    for axes in figure.subplots(4, 6).flat:
        axes.axis("off")
    for axes, mistake in zip(figure.axes, report["confident_mistakes"], strict=False):
        axes.imshow(test.images[mistake["image"]].cpu().numpy())
        axes.set_title("{class}\n{predicted} {probability:.1f} %".format(**mistake), fontsize=9)
    figure.savefig(path, dpi=120, format="png")


# --- the command ----------------------------------------------------------------------------------

def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--weights", default="weights.pkl", metavar="FILE", help="written by train.py (default: %(default)s)")
    add("--data-dir", default=DEFAULT_DATA_DIR, metavar="DIR", help="the data set (default: $CIFAR10_DIR, or data)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute (default: fastest)")
    add("--batch-size", type=int, metavar="N", help="images at a time (default: 40 on a CPU, 1,000 elsewhere)")
    add("--min-accuracy", type=float, default=80.0, metavar="PERCENT",
        help="the bar for exit status 0 (default: %(default)s)")
    add("--json", action="store_true", help="print one JSON object instead of text (default: off)")
    add("--confusion", type=Path, metavar="FILE.png", help="draw the confusion matrix (default: not drawn)")
    add("--mistakes", type=Path, metavar="FILE.png", help="draw the most confident mistakes (default: not drawn)")
    add("--full", action="store_true", help="also confidence interval, calibration error, accuracy on corrupted images")
    add("--tta", action="store_true", help="also the accuracy with test-time augmentation, ten views per image")
    add("--image", nargs="+", metavar="FILE", help="classify these images instead; needs no data set")
    return parser


def run(args: argparse.Namespace) -> int:
    device = model.pick_device(args.device)
    network, metadata = model.load_weights(args.weights)
    network = network.to(device)
    if args.image:
        guesses = classify(network, args.image, device)
        if args.json:
            print(json.dumps(guesses))
        else:
            for path, guess in guesses.items():
                print(f"{path}: " + ", ".join(f"{name} {percent:.1f} %" for name, percent in guess.items()))
        return 0
    (test,) = load_cifar10(args.data_dir, ("test",))
    report = make_report(network, metadata, test.to(device), args)
    if args.confusion:
        plot_confusion(report, args.confusion)
    if args.mistakes:
        plot_mistakes(report, test, args.mistakes)
    if args.json:
        print(json.dumps(report))
    else:
        print_report(report, device, args.min_accuracy)
    return 0 if report["passed"] else 1


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.batch_size is not None and args.batch_size < 1:
        parser.error(f"--batch-size is {args.batch_size}: it must be above 0")
    model.reuse_freed_memory()
    try:
        return run(args)
    except (DataError, model.ModelError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
