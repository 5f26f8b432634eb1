"""Draw docs/augmentation.png: the three versions of eight training images in the augmented training set.

    python docs/augmentation.py

The folder with CIFAR-10 is data, or $CIFAR10_DIR.
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

from data import CLASSES, DEFAULT_DATA_DIR, autoaugment, flip_and_rotate, load_split


def main(data_dir: str | Path = DEFAULT_DATA_DIR, out: Path = DOCS / "augmentation.png") -> None:
    train = load_split(data_dir, "train")
    images, labels = train.images[:8], train.labels[:8].tolist()
    versions = {
        "original": images,
        "flipped and\nrotated": flip_and_rotate(images, seed=0),
        "AutoAugment": autoaugment(images, seed=0),
    }
    figure = Figure(figsize=(9.6, 3.9), layout="constrained")
    for row, (name, version) in zip(figure.subplots(3, 8), versions.items(), strict=True):
        for axes, image in zip(row, version, strict=True):
            axes.imshow(image.numpy())
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel(name)
        if name == "original":
            for axes, label in zip(row, labels, strict=True):
                axes.set_title(CLASSES[label], fontsize=10)
    figure.savefig(out, dpi=100)


if __name__ == "__main__":
    main()
