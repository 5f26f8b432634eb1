"""Fixtures: a small learnable stand-in for CIFAR-10, a network, and the real data where it is at hand."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model import build_network, save_weights  # noqa: E402  (the scripts live in the root)


def make_arrays(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """n images of ten classes: each class has its own colour and its own stripe, under noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 10
    colours = np.random.default_rng(1234).integers(40, 216, (10, 3))
    images = np.broadcast_to(colours[labels][:, None, None], (n, 32, 32, 3)).copy()
    for image, label in zip(images, labels):
        image[3 * label : 3 * label + 4] = 255 - image[3 * label : 3 * label + 4]
    images = images + rng.normal(0, 25, images.shape)
    return images.clip(0, 255).astype(np.uint8), labels.astype(np.uint8)


def write_dataset(folder: Path, n_train: int = 200, n_test: int = 100) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    train_images, train_labels = make_arrays(n_train, 0)
    test_images, test_labels = make_arrays(n_test, 1)
    np.savez(folder / "cifar10.npz", train_images=train_images, train_labels=train_labels,
             test_images=test_images, test_labels=test_labels)
    return folder


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """A folder with a small cifar10.npz."""
    return write_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture
def weights(tmp_path) -> Path:
    """The weights of an untrained report network."""
    torch.manual_seed(0)
    path = tmp_path / "weights.pkl"
    save_weights(path, build_network("report"), "report", recipe="report", seed=0, accuracy=10.0, epochs=0)
    return path


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of the real CIFAR-10; tests that need it are skipped where CIFAR10_DIR names none."""
    folder = os.environ.get("CIFAR10_DIR")
    if not folder or not any((Path(folder) / name).exists() for name in (
            "cifar10.npz", "cifar-10-batches-py", "cifar-10-python.tar.gz")):
        pytest.skip("CIFAR10_DIR names no folder with the real CIFAR-10")
    return Path(folder)
