"""The networks, the 50,000-parameter limit they keep, and the file their weights live in.

Every network takes float images (N, 3, 32, 32), already normalised, and returns
log-probabilities (N, 10). Build one with `build_network("report")`: that is where the limit is
asserted. `save_weights` and `load_weights` write and read weights.pkl.
"""

import copy
import os
import pickle
import zipfile
import zlib
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from data import replacing

PARAMETER_LIMIT = 50_000


class ModelError(Exception):
    """A network or a weights file that cannot be used; the message says what to do about it."""


def conv_norm_relu(channels_in: int, channels_out: int) -> list[nn.Module]:
    """3x3 convolution with bias, batch norm, ReLU: (N, channels_in, H, W) -> (N, channels_out, H, W)."""
    return [
        nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    ]


class ReportNet(nn.Module):
    """The report's network: four convolutional layers and a linear one, 47,410 parameters.

    Args:
        dropout: share of the 960 features set to zero in training, before the linear layer.
    """

    def __init__(self, dropout: float = 0.2):
        super().__init__()
        self.features = nn.Sequential(
            # layer 0: mixes the colours                          (N,  3, 32, 32)
            *conv_norm_relu(3, 3),
            # layer 1                                             (N, 10, 32, 32)
            *conv_norm_relu(3, 10),
            *conv_norm_relu(10, 10),
            *conv_norm_relu(10, 10),
            # layer 2: two thirds of the multiply-adds are here   (N, 30, 32, 32)
            *conv_norm_relu(10, 30),
            *conv_norm_relu(30, 30),
            nn.AvgPool2d(2),                                    # (N, 30, 16, 16)
            *conv_norm_relu(30, 30),
            nn.MaxPool2d(2),                                    # (N, 30,  8,  8)
            # layer 3
            *conv_norm_relu(30, 60),                            # (N, 60,  8,  8)
            nn.MaxPool2d(2),                                    # (N, 60,  4,  4)
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),                                       # (N, 960)
            nn.Dropout(dropout),
            nn.Linear(60 * 4 * 4, 10),
            nn.LogSoftmax(dim=1),                               # (N, 10)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(images))


NETWORKS = {"report": ReportNet}


def count_parameters(network: nn.Module) -> tuple[int, int]:
    """The number of trainable and of all parameters; batch norm's running statistics are none."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in network.parameters()]
    return sum(n for n, trainable in sizes if trainable), sum(n for n, _ in sizes)


def check_limit(network: nn.Module) -> nn.Module:
    """Return `network`, or raise ModelError if it has more than PARAMETER_LIMIT parameters."""
    _, total = count_parameters(network)
    if total > PARAMETER_LIMIT:
        raise ModelError(
            f"{type(network).__name__} has {total:,} parameters, {total - PARAMETER_LIMIT:,} more than the "
            f"limit of {PARAMETER_LIMIT:,}: make a layer narrower"
        )
    return network


def build_network(name: str, **sizes) -> nn.Module:
    """A freshly initialised network: `name` is a key of NETWORKS, `sizes` go to its constructor.

    Raises:
        ModelError: an unknown name, or a network over the limit.
    """
    if not isinstance(name, str) or name not in NETWORKS:
        raise ModelError(f"there is no network named {name!r}: choose from {', '.join(sorted(NETWORKS))}")
    return check_limit(NETWORKS[name](**sizes))


def fold_batch_norm(network: nn.Module) -> nn.Module:
    """A copy for inference, each batch norm folded into the convolution in front of it.

    In inference a batch norm is one multiplication and one addition per channel, which the
    convolution's weight and bias can carry. The outputs agree up to rounding.
    """
    folded = copy.deepcopy(network).eval()
    for container in [module for module in folded.modules() if isinstance(module, nn.Sequential)]:
        for i in range(len(container) - 1):
            if isinstance(container[i], nn.Conv2d) and isinstance(container[i + 1], nn.BatchNorm2d):
                container[i] = fuse_conv_bn_eval(container[i], container[i + 1])
                container[i + 1] = nn.Identity()
    return folded


def save_weights(path: str | os.PathLike, network: nn.Module, name: str, **facts) -> None:
    """Write weights.pkl, whole or not at all.

    Args:
        path: the file to write.
        network: whose state is saved, as CPU tensors.
        name: its key in NETWORKS, by which `load_weights` rebuilds it.
        facts: plain values that describe the training (recipe, seed, accuracy, ...).
    """
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in network.state_dict().items()}
    with replacing(path) as part:
        torch.save({"network": name, "state": state, **facts}, part)


def load_weights(path: str | os.PathLike) -> tuple[nn.Module, dict]:
    """Read what `save_weights` wrote. No code in the file is run.

    Returns:
        The network on the CPU in evaluation mode, and the facts saved beside its state.

    Raises:
        ModelError: the file is missing, damaged, not a weights file, or of another network.
    """
    path = Path(path)
    contents = read_archive(path, f"make it with: python train.py --out {path}")
    if not isinstance(contents, dict) or not {"network", "state"} <= contents.keys():
        raise ModelError(f"{path} holds no weights of this project: name a file that train.py wrote")
    network = build_network(contents.pop("network"))
    try:
        network.load_state_dict(contents.pop("state"))
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{path} does not fit {type(network).__name__} as model.py has it now: train again, or take the "
            f"model.py it was trained with ({str(error).splitlines()[-1].strip()})"
        ) from None
    return network.eval(), contents


def read_archive(path: Path, remedy: str) -> object:
    """What `torch.save` wrote to `path`: tensors and plain values only, its checksums verified.

    Raises:
        ModelError: the file is missing, damaged, or holds anything that would run code;
            the message ends in `remedy` where a new file is what is needed.
    """
    if not path.is_file():
        raise ModelError(f"there is no file {path}: {remedy}")
    try:
        # torch.load itself believes a tensor with a flipped byte; the archive's checksums do not
        with zipfile.ZipFile(path) as archive:
            folders = [member.filename for member in archive.infolist() if member.external_attr & 0x10]
            damaged = archive.testzip() or next(iter(folders), None)  # torch.load would skip a folder's tensor
        if damaged is not None:
            raise zipfile.BadZipFile(f"{damaged} fails its checksum")
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{path} is damaged or no weights file ({error}; {path.stat().st_size:,} bytes): {remedy}"
        ) from None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ModelError(
            f"{path} holds more than tensors and plain values, and loading those could run code: it was "
            f"refused; name a file that train.py wrote"
        ) from None
    except (RuntimeError, EOFError, KeyError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({str(error).splitlines()[0]}): {remedy}") from None
