"""Test a trained network on the 10,000 test images of CIFAR-10, or classify images of your own.

    python eval.py                               accuracy of weights.pkl, class by class
    python eval.py --weights runs/mine.pkl       of other weights
    python eval.py --confusion confusion.png     also draw the confusion matrix
    python eval.py --mistakes mistakes.png       also draw the most confident mistakes
    python eval.py --full                        also confidence interval, calibration, corruptions
    python eval.py --tta                         also the accuracy with test-time augmentation
    python eval.py --image cat.jpg ship.png      the three likeliest classes of any image

Exit status: 0; 1 if the accuracy is below --min-accuracy; 2 for an error, or an image that cannot be read.
"""

import argparse
import contextlib
import copy
import ctypes
import io
import json
import math
import os
import platform
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps  # torchvision brings Pillow
from torch import nn

import data
import model
from data import CLASSES, Split, UserError, normalize, say

# --- the machine ----------------------------------------------------------------------------------

def pick_device(name: str) -> torch.device:
    """The device named cpu, cuda or mps, or the fastest one available for auto. UserError if there is none."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, is_available in available.items() if is_available)
    elif not available[name]:
        raise UserError(f"PyTorch finds no {name} device on this machine: leave out --device")
    return torch.device(name)


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16; emulated, it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    features = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}  # from PyTorch 2.10
    return any(features.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def describe_machine(device: torch.device) -> dict:
    """What a run computes on and with, for result.json."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = re.findall(r"model name\s*: (.*)", cpuinfo) or [platform.processor() or platform.machine()]
    return {"device": device.type, "processor": torch.cuda.get_device_name() if device.type == "cuda" else names[0],
            "threads": torch.get_num_threads(), "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "torchvision", "numpy")}}


def run_script(command: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Run a script's command and return its exit status; an error that the user can correct is one line, status 2."""
    os.environ["MPLBACKEND"] = "agg"  # files need no display; a notebook names a backend that may not be there
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None where standard output is closed
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="backslashreplace")  # for file names that the terminal cannot show
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    reuse_freed_memory()
    try:
        return command(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"error: {error}: correct that, or name another place", file=sys.stderr)
    except (MemoryError, RuntimeError) as error:  # PyTorch raises RuntimeError for most things
        if not is_out_of_memory(error):
            raise
        print("error: there is not enough memory: close other programs, or give train.py a smaller --batch-size",
              file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 2


def is_out_of_memory(error: Exception) -> bool:
    return bool(re.search("MemoryError|out of memory|not enough memory|allocate", repr(error)))


def reuse_freed_memory() -> None:
    """Have glibc keep freed memory for the next tensor, rather than have the kernel clear new pages for it."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, bytes
        libc.mallopt(-3, 2**30) or libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD; older versions take 32 MB at most


# --- metrics --------------------------------------------------------------------------------------

def infer(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (N, 10) of uint8 images (N, 32, 32, 3), on their device."""
    network = model.export(network)
    on_cpu = images.device.type == "cpu"
    batch_size = 40 if on_cpu else 1000  # 40: the output of a layer stays in the cache of a CPU
    threads, local = torch.get_num_threads(), threading.local()
    local.network = network

    def start_thread() -> None:
        torch.set_num_threads(1)
        local.network = copy.deepcopy(network)  # it may keep an input for a later layer in an attribute

    @torch.inference_mode()
    def infer_batch(batch: torch.Tensor) -> torch.Tensor:
        return F.log_softmax(local.network(normalize(batch)).float(), dim=1)

    if not on_cpu:  # in this thread, where cuDNN has its plans
        return torch.cat([infer_batch(batch) for batch in images.split(batch_size)])
    # on a CPU, a thread for each batch is faster than several threads for one batch
    with ThreadPoolExecutor(threads, initializer=start_thread) as pool:
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


def fit_temperature(log_probabilities: torch.Tensor, labels: torch.Tensor) -> float:
    """The temperature, from 0.1 to 10, with the least loss (temperature scaling, arXiv 1706.04599)."""
    return min((n / 100 for n in range(10, 1001)), key=lambda t: F.cross_entropy(log_probabilities / t, labels).item())


def confusion_matrix(log_probabilities: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Counts (10, 10): images of class `row` that were predicted as class `column`."""
    cells = labels * len(CLASSES) + log_probabilities.argmax(dim=1)
    return torch.bincount(cells, minlength=len(CLASSES) ** 2).view(len(CLASSES), len(CLASSES)).cpu()


def confident_mistakes(log_probabilities: torch.Tensor, labels: torch.Tensor, n: int = 24) -> list[dict]:
    """The misclassified images with the highest probability of the predicted class, in percent, highest first."""
    confidence, predicted = log_probabilities.exp().max(dim=1)
    confidence = confidence.masked_fill(predicted == labels, -1)
    wrong = confidence.argsort(descending=True, stable=True)[: min(n, (predicted != labels).sum())].tolist()
    return [{"image": i, "class": CLASSES[labels[i]], "predicted": CLASSES[predicted[i]],
             "probability": round(100 * confidence[i].item(), 2)} for i in wrong]


def tta_infer(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (N, 10) of the mean probability over ten views: the image and its shifts by one pixel along
    both diagonals, each with its mirror image."""
    padded = F.pad(images, (0, 0, 1, 1, 1, 1))
    corners = ((1, 1), (0, 0), (0, 2), (2, 0), (2, 2))
    shifted = [padded[:, row : row + 32, column : column + 32] for row, column in corners]
    views = shifted + [view.flip(2) for view in shifted]
    return torch.stack([infer(network, view).exp() for view in views]).mean(dim=0).log()


def corruptions(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Images uint8 (N, 32, 32, 3), on the CPU, under four of CIFAR-10-C's corruptions, at the third of its five
    severities (Hendrycks & Dietterich 2019, arXiv 1903.12261)."""
    from torchvision.transforms.v2 import functional

    def jpeg(image: np.ndarray) -> torch.Tensor:
        Image.fromarray(image).save(file := io.BytesIO(), "JPEG", quality=58)
        return torch.from_numpy(np.array(Image.open(file)))

    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    mean = images.float().mean(dim=(1, 2), keepdim=True)
    blurred = functional.gaussian_blur(images.permute(0, 3, 1, 2), kernel_size=5, sigma=0.7)
    return {
        "gaussian noise": (images + 0.08 * 255 * noise).round().clamp(0, 255).byte(),
        "gaussian blur": blurred.permute(0, 2, 3, 1),
        "jpeg": torch.stack([jpeg(image) for image in images.numpy()]),
        "contrast": (mean + 0.4 * (images - mean)).round().byte(),
    }


# --- images of your own ---------------------------------------------------------------------------

def load_image(path: Path) -> torch.Tensor:
    """The central square of any image file, as uint8 (1, 32, 32, 3): upright, and on white where it is transparent.

    Raises UserError for a file that is no image, is larger than 500 megapixels, or has values of an unknown range.
    """
    Image.MAX_IMAGE_PIXELS = None
    try:
        with Image.open(path) as image:
            if image.width * image.height > 500_000_000:
                raise ValueError("it has more than 500 megapixels")
            is_deep = ";16" in f"{image.mode} {image.tile}" and image.format != "BMP"  # 16 bits a value, not a pixel
            is_inverted = getattr(image, "tag_v2", {}).get(262) == 0  # a TIFF file whose 0 is white
            image.draft(None, (2048, 2048))  # a large JPEG is read at a fraction of its size
            with contextlib.suppress(Exception):  # odd metadata
                image.getexif()
                for key in ("exif", "Raw profile type exif"):  # which exif_transpose would write again
                    image.info.pop(key, None)
                image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):  # convert() would clip it to white
                if is_inverted or "transparency" in image.info:
                    raise ValueError("it has 16 bits with transparency, or with white as 0")
                image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
            elif image.mode in ("I", "F"):
                raise ValueError("the range of its values is not known")
            image = image.convert("RGBA")
            if is_deep and np.asarray(image)[:, :, :3].max() < 128:  # values of 14 bits, say
                raise ValueError("its 16-bit values leave the upper half of their range unused")
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise UserError(f"{path} cannot be read as an image ({error}): name an 8-bit JPEG or PNG file") from error
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    image = ImageOps.fit(image, (32, 32), method=Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image))[None]


def classify(network: nn.Module, paths: list[Path], device: torch.device) -> dict[Path, dict[str, float]]:
    """The three likeliest classes of each image file, with their probabilities in percent. A file that cannot be read
    is left out, with a line on standard error."""
    images = {}
    for path in paths:
        try:
            images[path] = load_image(path)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
    if not images:
        return {}
    probabilities, classes = infer(network, torch.cat(list(images.values())).to(device)).exp().cpu().topk(3)
    return {
        path: {CLASSES[k]: round(100 * p, 1) for k, p in zip(ks, ps, strict=True)}
        for path, ks, ps in zip(images, classes.tolist(), probabilities.tolist(), strict=True)
    }


# --- the report -----------------------------------------------------------------------------------

def make_report(network: nn.Module, split: Split, *, full: bool = False, tta: bool = False) -> dict:
    """Everything that is measured, under the names that --json prints."""
    start = time.perf_counter()
    log_probabilities = infer(network, split.images)
    accuracy, loss = accuracy_and_loss(log_probabilities, split.labels)
    seconds = time.perf_counter() - start
    confusion = confusion_matrix(log_probabilities, split.labels)
    hits = 100.0 * confusion.diagonal()
    precision, recall = ((hits / confusion.sum(dim=dim).clamp(min=1)).tolist() for dim in (0, 1))  # 0 for 0 of 0
    report = {
        "parameters": model.count_parameters(network), "images": len(split.labels), "accuracy": accuracy, "loss": loss,
        "images_per_second": len(split.labels) / seconds,
        "precision": dict(zip(CLASSES, precision, strict=True)), "recall": dict(zip(CLASSES, recall, strict=True)),
        "confusion": confusion.tolist(), "confident_mistakes": confident_mistakes(log_probabilities, split.labels),
    }
    if full:
        report["interval"] = confidence_interval(accuracy, len(split.labels))
        report["calibration_error"] = calibration_error(log_probabilities, split.labels)
        report["corruption_accuracy"] = {
            name: accuracy_and_loss(infer(network, images.to(split.images.device)), split.labels)[0]
            for name, images in corruptions(split.images.cpu()).items()}
    if tta:
        report["tta_accuracy"], _ = accuracy_and_loss(tta_infer(network, split.images), split.labels)
    return report


def print_report(report: dict, device: torch.device, min_accuracy: float) -> None:
    say(f"{model.describe_training(report['trained'])}: {report['parameters']:,} parameters")
    say(f"{report['images']:,} test images: accuracy {report['accuracy']:.2f} %, loss {report['loss']:.4f} "
        f"({report['images_per_second']:,.0f} images per second on {device})")
    say(f"\n{'class':12}{'precision':>10}{'recall':>9}")
    for name in CLASSES:
        say(f"{name:12}{report['precision'][name]:9.1f}%{report['recall'][name]:8.1f}%")
    say()
    mistakes = [(count, CLASSES[i], CLASSES[j]) for i, row in enumerate(report["confusion"])
                for j, count in enumerate(row) if i != j and count]
    for count, name, predicted in sorted(mistakes, reverse=True)[:5]:
        say(f"{count:5} images of class {name} were classified as {predicted}")
    if "interval" in report:
        low, high = report["interval"]
        say(f"\n95 % confidence interval        {low:.2f} to {high:.2f} %")
        say(f"expected calibration error      {report['calibration_error']:6.2f} %")
        for name, percent in report["corruption_accuracy"].items():
            say(f"accuracy under {name:16} {percent:6.2f} %")
    if "tta_accuracy" in report:
        say(f"\nwith test-time augmentation, ten views per image: {report['tta_accuracy']:.2f} %")
    say(f"\n{'PASSED' if report['passed'] else 'FAILED'}: {report['accuracy']:.2f} % is "
        f"{'at least' if report['passed'] else 'below'} the bar of {min_accuracy:g} %")


# --- graphs ---------------------------------------------------------------------------------------

TRAIN_SAMPLE = 5_000  # training images, not augmented, that train.py measures the network on after each epoch


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1):
    from matplotlib.figure import Figure  # slow to import, and needed only here

    figure = Figure(figsize=(width, height), layout="constrained")  # inches
    return figure, figure.subplots(rows, columns)


def png(figure) -> bytes:
    figure.savefig(file := io.BytesIO(), dpi=120)
    return file.getvalue()


def plot_history(history: list[dict], quantity: str, title: str) -> bytes:
    """A PNG file of the "accuracy" or the "loss" per epoch, for rows as in metrics.csv."""
    figure, axes = new_figure(6.4, 4.0)
    labels = {"train": f"{TRAIN_SAMPLE:,} training images", "val": "held-out images", "test": "test set"}
    for prefix, label in labels.items():
        if history and f"{prefix}_{quantity}" in history[0]:
            values = [row[f"{prefix}_{quantity}"] for row in history]
            axes.plot([row["epoch"] for row in history], values, ".-", label=label)
            axes.legend()
    axes.set_title(title, parse_math=False)  # a directory's name may have dollars
    axes.set(xlabel="epoch (values at its end)",
             ylabel={"accuracy": "accuracy (%)", "loss": "loss (cross-entropy)"}[quantity])
    axes.locator_params(axis="x", integer=True)
    axes.grid(alpha=0.3)
    return png(figure)


def plot_confusion(report: dict) -> bytes:
    """The confusion matrix as a PNG file."""
    figure, axes = new_figure(6.4, 5.6)
    confusion = np.array(report["confusion"])
    axes.imshow(confusion, cmap="Blues")
    axes.set_xticks(range(len(CLASSES)), CLASSES, rotation=45, ha="right")
    axes.set_yticks(range(len(CLASSES)), CLASSES)
    axes.set(xlabel="predicted class", ylabel="class", title=f"CIFAR-10 test set: {report['accuracy']:.2f} %")
    for (row, column), count in np.ndenumerate(confusion):
        axes.text(column, row, count, ha="center", va="center", fontsize=8,
                  color="white" if count > confusion.max() / 2 else "black")
    return png(figure)


def plot_mistakes(report: dict, test: Split) -> bytes:
    """The most confident mistakes as a PNG file, each with its class and the class and probability predicted."""
    figure, grid = new_figure(9.6, 8.0, 4, 6)
    figure.suptitle("CIFAR-10 test set, most confident mistakes: class, then predicted class and its probability")
    for axes in grid.flat:
        axes.axis("off")
    for axes, mistake in zip(grid.flat, report["confident_mistakes"], strict=False):
        axes.imshow(test.images[mistake["image"]].cpu().numpy())
        axes.set_title("{class}\n{predicted} {probability:.1f} %".format(**mistake), fontsize=9)
    return png(figure)


# --- the command ----------------------------------------------------------------------------------

def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, path = parser.add_argument, data.path_option
    add("--weights", type=path, default="weights.pkl", metavar="FILE", help="from train.py (default: %(default)s)")
    add("--data-dir", type=path, default=data.DEFAULT_DATA_DIR, metavar="DIR", help="default: $CIFAR10_DIR, or data")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute (default: fastest)")
    add("--min-accuracy", type=float, default=80.0, metavar="PERCENT",
        help="exit with status 1 below this accuracy (default: 80)")
    add("--json", action="store_true", help="print one JSON object instead of text")
    add("--confusion", type=path, metavar="FILE.png", help="draw the confusion matrix")
    add("--mistakes", type=path, metavar="FILE.png", help="draw the most confident mistakes")
    add("--full", action="store_true", help="also confidence interval, calibration error, accuracy on corrupted images")
    add("--tta", action="store_true", help="also the accuracy with test-time augmentation, ten views per image")
    add("--image", type=path, nargs="+", action="extend", metavar="FILE",
        help="classify these images instead; needs no data set")
    return parser


def evaluate_weights(args: argparse.Namespace) -> int:
    """Print what is measured of a weights file, or the classes of image files, and return the exit status."""
    if args.image and (args.confusion or args.mistakes or args.full or args.tta):
        raise UserError("--image needs no test set: leave out --confusion, --mistakes, --full and --tta")
    graphs = [path for path in (args.confusion, args.mistakes) if path]
    files = [args.weights, *graphs]
    if len({path.resolve() for path in files}) < len(files):
        raise UserError("a graph would replace the weights or the other graph: name another file for it")
    for path in graphs:
        if path.suffix.lower() not in (".png", ""):
            raise UserError(f"{path} would be a PNG file: give it a name that ends in .png")
        data.check_writable(path)
    device = pick_device(args.device)
    network, metadata = model.load_weights(args.weights)
    network = network.to(device)
    if args.image:
        guesses = classify(network, args.image, device)
        if args.json:
            say(json.dumps({str(path): guess for path, guess in guesses.items()}))
        else:
            for path, guess in guesses.items():
                say(f"{path}: " + ", ".join(f"{name} {percent:.1f} %" for name, percent in guess.items()))
        return 0 if len(guesses) == len(set(args.image)) else 2
    test = data.load_split(args.data_dir, "test")
    report = {"trained": metadata, **make_report(network, test.to(device), full=args.full, tta=args.tta)}
    report["passed"] = report["accuracy"] >= args.min_accuracy
    if args.json:
        say(json.dumps(report))
    else:
        print_report(report, device, args.min_accuracy)
    if args.confusion:
        data.atomic_write(args.confusion, plot_confusion(report))
    if args.mistakes:
        data.atomic_write(args.mistakes, plot_mistakes(report, test))
    return 0 if report["passed"] else 1


def main(argv: list[str] | None = None) -> int:
    return run_script(evaluate_weights, make_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
