"""Fixtures: a small learnable stand-in for CIFAR-10, a network, and the real data where it is at hand."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402  (the scripts live in the root)
from model import build_network, save_weights  # noqa: E402

SMALL = {"train": 200, "test": 100}


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


def small_arrays() -> dict[str, np.ndarray]:
    """The arrays of a small cifar10.npz."""
    train_images, train_labels = make_arrays(SMALL["train"], 0)
    test_images, test_labels = make_arrays(SMALL["test"], 1)
    return {"train_images": train_images, "train_labels": train_labels,
            "test_images": test_images, "test_labels": test_labels}


@pytest.fixture(scope="session", autouse=True)
def small_is_the_right_size():
    """data.py takes the small data set for whole."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "SIZES", SMALL)
        yield


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """A folder with a small cifar10.npz."""
    folder = tmp_path_factory.mktemp("dataset")
    np.savez(folder / "cifar10.npz", **small_arrays())
    return folder


@pytest.fixture
def weights(tmp_path) -> Path:
    """The weights of an untrained report network."""
    torch.manual_seed(0)
    path = tmp_path / "weights.pkl"
    save_weights(path, build_network("report"), "report", recipe="report", seed=0, accuracy=10.0, epochs=0)
    return path


@pytest.fixture
def real_data(monkeypatch) -> Path:
    """The folder of the real CIFAR-10; tests that need it are skipped where CIFAR10_DIR names none."""
    folder = os.environ.get("CIFAR10_DIR")
    if not folder or not any((Path(folder) / name).exists() for name in (
            "cifar10.npz", "cifar-10-batches-py", "cifar-10-python.tar.gz")):
        pytest.skip("CIFAR10_DIR names no folder with the real CIFAR-10")
    monkeypatch.setattr(data, "SIZES", {"train": 50_000, "test": 10_000})
    return Path(folder)
