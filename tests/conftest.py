"""Fixtures: a small data set that can be learned, untrained weights, and the real CIFAR-10 where it is available."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data
import model
import train

SMALL = {"train": 200, "test": 100}
METADATA = {"network": "report", "recipe": "report", "seed": 0, "epochs": 20.0, "validate": False, "accuracy": 10.0}


def make_arrays(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """n images of ten classes: each class has its own colour and its own stripe, under noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 10
    colours = np.random.default_rng(1234).integers(40, 216, (10, 3))
    images = np.broadcast_to(colours[labels][:, None, None], (n, 32, 32, 3)).copy()
    for image, label in zip(images, labels, strict=True):
        image[3 * label : 3 * label + 4] = 255 - image[3 * label : 3 * label + 4]
    images = images + rng.normal(0, 25, images.shape)
    return images.clip(0, 255).astype(np.uint8), labels.astype(np.uint8)


def make_split(n: int) -> data.Split:
    images, labels = make_arrays(n, 0)
    return data.Split(torch.from_numpy(images), torch.from_numpy(labels).long())


def make_loader(split: data.Split, seed: int = 0, **settings) -> data.TrainLoader:
    """A loader of batches of 8, with both random versions and without crops, or with other settings of a recipe."""
    recipe = train.Recipe(network="plain", epochs=1, optimizer="sgd", lr=0.1, weight_decay=0.0, warmup_fraction=0.0,
                          **{"batch_size": 8} | settings)
    return data.TrainLoader(split, recipe, seed)


def small_arrays() -> dict[str, np.ndarray]:
    """The arrays of a small cifar10.npz."""
    train_images, train_labels = make_arrays(SMALL["train"], 0)
    test_images, test_labels = make_arrays(SMALL["test"], 1)
    return {"train_images": train_images, "train_labels": train_labels,
            "test_images": test_images, "test_labels": test_labels}


@pytest.fixture(scope="session", autouse=True)
def small_sizes():
    """Let data.py accept the small data set."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "SIZES", SMALL)
        yield


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """A folder with a small cifar10.npz."""
    folder = tmp_path_factory.mktemp("dataset")
    np.savez(folder / "cifar10.npz", **small_arrays())
    return folder


@pytest.fixture(scope="session")
def python(tmp_path_factory) -> list[str]:
    """The start of a command line that runs one of the scripts in a process of its own, on the small data set."""
    launcher = tmp_path_factory.mktemp("launcher") / "launcher.py"
    launcher.write_text(
        # a background job of a shell ignores SIGINT, and so would its child
        "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"sys.path.insert(0, {str(ROOT)!r}); import data; data.SIZES = {SMALL}\n"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')")
    return [sys.executable, str(launcher)]


@pytest.fixture
def weights(tmp_path) -> Path:
    """The weights of an untrained report network."""
    torch.manual_seed(0)
    path = tmp_path / "weights.pkl"
    model.save_weights(path, model.build_network("report"), METADATA)
    return path


@pytest.fixture
def real_data(monkeypatch) -> Path:
    """The folder of the real CIFAR-10; a test that needs it is skipped where CIFAR10_DIR names none."""
    folder = os.environ.get("CIFAR10_DIR")
    names = ("cifar10.npz", "cifar-10-batches-py", "cifar-10-python.tar.gz")
    if not folder or not any((Path(folder) / name).exists() for name in names):
        pytest.skip("CIFAR10_DIR names no folder with the real CIFAR-10")
    monkeypatch.setattr(data, "SIZES", {"train": 50_000, "test": 10_000})
    return Path(folder)
