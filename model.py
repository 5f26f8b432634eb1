"""The networks, the 50,000-parameter limit they keep, and the file their weights live in.

Every network takes float images (N, 3, 32, 32), already normalised, and returns
log-probabilities (N, 10). Build one with `build_network("report")`, by its name: that is where the limit is
asserted. `save_weights` and `load_weights` write and read weights.pkl.
"""

import copy
import functools
import os
import pickle
import re
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
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

    def __init__(self, *, dropout: float = 0.2):
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


# --- the mirror-paired residual network --------------------------------------------------------


class PairedConv(nn.Module):
    """Mirror-paired convolution without bias: (N, C_in, H, W) -> (N, C_out, H', W').

    A layer's channels are two halves [a | b], and b is what a would be in the mirrored image. Half
    of the filters are free parameters; the other half are the same filters mirrored left to right,
    the halves of their inputs exchanged. So a layer costs the parameters of half its width, and
    mirroring the image mirrors the maps and exchanges their halves, nothing else: a group
    convolution (Cohen & Welling 2016, arXiv 1602.07576) for the group of one mirror.

    Args:
        channels_in: 3 for the image itself, whose channels are no pairs.
        channels_out: even.
        size: side of the kernel, in pixels.
        stride: the padding leaves H / stride rows. For a mirror-symmetric layer `size` is odd
            with stride 1, even with stride 2.
        groups: 1, or an even number: then no group mixes the two halves.
    """

    def __init__(self, channels_in: int, channels_out: int, size: int, stride: int = 1, groups: int = 1):
        super().__init__()
        self.size = size
        self.options = {"stride": stride, "padding": (size - stride + 1) // 2, "groups": groups}
        self.exchanges = channels_in != 3 and groups == 1  # else a half, or the image, feeds each filter alone
        fan_in = channels_in // groups * size**2
        # two-dimensional, a row for each free filter: the form that torch.optim.Muon takes
        self.weight = nn.Parameter(torch.randn(channels_out // 2, fan_in) * (2 / fan_in) ** 0.5)

    def kernel(self) -> torch.Tensor:
        """The weights (C_out, C_in / groups, size, size) of the whole layer."""
        free = self.weight.unflatten(1, (-1, self.size, self.size))
        mirrored = free.flip(3)
        if self.exchanges:
            mirrored = mirrored.roll(mirrored.shape[1] // 2, dims=1)
        return torch.cat([free, mirrored]).contiguous(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.kernel(), **self.options)

    def unpaired(self) -> nn.Conv2d:
        """The same layer as an ordinary convolution, its kernel built once."""
        kernel, groups = self.kernel().detach(), self.options["groups"]
        layer = nn.Conv2d(groups * kernel.shape[1], kernel.shape[0], self.size, bias=False, **self.options)
        layer.weight = nn.Parameter(kernel)
        return layer.eval()


Activation = Callable[[], nn.Module]
RELU = functools.partial(nn.ReLU, inplace=True)


class PairedNormActivation(nn.Module):
    """Batch norm, its statistics and weights shared within each pair, and `activation`: (N, C, H, W) -> the same."""

    def __init__(self, channels: int, activation: Activation = RELU):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels // 2)
        self.activation = activation()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        # in channels_last memory the two halves lie side by side: half the channels at twice the width
        x = x.permute(0, 2, 3, 1).reshape(n, h, 2 * w, c // 2).permute(0, 3, 1, 2)
        x = self.activation(self.norm(x))
        return x.permute(0, 2, 3, 1).reshape(n, h, w, c).permute(0, 3, 1, 2)

    def unpaired(self) -> nn.BatchNorm2d:
        """The same norm over all channels, for inference; without the activation."""
        norm = copy.deepcopy(self.norm)
        for values in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            values.data = values.data.repeat(2)
        return norm


GROUP_WIDTH = 16  # channels in each group of a 3x3 layer


class ResidualBlock(nn.Module):
    """x + layers(x), of the same shape; starts as the identity (Goyal et al. 2017, arXiv 1706.02677).

    Nothing is on the way around the layers (as in He et al. 2016, arXiv 1603.05027).
    """

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.Sequential(*layers)
        nn.init.zeros_(self.layers[-1].weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x)


class PairedBlock(ResidualBlock):
    """(N, width, H, W) -> the same: a grouped 3x3 layer looks around, a 1x1 layer mixes the channels; one norm."""

    def __init__(self, width: int):
        super().__init__(
            PairedConv(width, width, 3, groups=width // GROUP_WIDTH),
            PairedNormActivation(width),
            PairedConv(width, width, 1),
        )


class PairedGate(nn.Module):
    """Half of the channels, behind SiLU, gate the other half: (N, 2C, H, W) -> (N, C, H, W).

    The gated unit of Shazeer 2020 (arXiv 2002.05202), in each half of the pairs.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values, gates = x.permute(0, 2, 3, 1).unflatten(3, (2, 2, -1)).unbind(4)  # each (N, H, W, 2, C / 2)
        # copied into memory of their own: SiLU is slow on every other row
        return (values.contiguous() * F.silu(gates.contiguous())).flatten(3).permute(0, 3, 1, 2)


class GatedBlock(ResidualBlock):
    """(N, width, H, W) -> the same: a depthwise 3x3 layer looks around, 1x1 layers with a gate between them mix.

    The depthwise layer costs next to no parameters, so there are three times the 1x1 weights of a PairedBlock of 64
    channels, and fewer in all.
    """

    def __init__(self, width: int):
        super().__init__(
            PairedConv(width, width, 3, groups=width),
            PairedNormActivation(width, nn.Identity),
            PairedConv(width, 2 * width, 1),
            PairedGate(),
            PairedConv(width, width, 1),
        )


Pooling = Callable[[], nn.Module]
MEAN = functools.partial(nn.AvgPool2d, 2)
OVERLAPPING = functools.partial(nn.AvgPool2d, 4, stride=2, padding=1)  # aliases less (Zhang 2019, arXiv 1904.11486)


class PairedNet(nn.Module):
    """Mirror-paired residual network; its log-probabilities for an image and its mirror image are the same.

    Args:
        stages: one for each size of the maps, as WIDTHxBLOCKS@SIDE: "64x3@16" is three blocks of 64
            channels on maps of 16x16. The first side is 32 or 16, each other half of the one before.
        block: what a stage is made of.
        activation: of the other layers, behind their norms.
        pooling: halves the maps where a stage has the one before in front of it.
        dropout: share of the features set to zero in training, before the linear layer.

    Raises:
        ModelError: no stages, or one that cannot be.
    """

    def __init__(
        self,
        *stages: str,
        block: Callable[[int], nn.Module] = PairedBlock,
        activation: Activation = RELU,
        pooling: Pooling = MEAN,
        dropout: float = 0.0,
    ):
        super().__init__()
        layers: list[nn.Module] = []
        width, side = 3, 32
        for stage in stages:
            sizes = re.fullmatch(r"(\d+)x(\d+)@(\d+)", stage)
            new_width, blocks, new_side = map(int, sizes.groups()) if sizes else (0, 0, 0)
            shrinks = new_side * 2 == side
            if not new_width or new_width % (2 * GROUP_WIDTH) or not (shrinks or (new_side == 32 and not layers)):
                raise ModelError(
                    f"{stage!r} is no stage behind {width} channels at {side}x{side}: give WIDTHxBLOCKS@SIDE, such as "
                    f"64x3@16, the width a multiple of {2 * GROUP_WIDTH}, the side 32 or 16 at first and then half"
                )
            if not layers:  # the stem, which halves the image if the first stage is at 16x16
                stem = PairedConv(3, new_width, 4, stride=2) if shrinks else PairedConv(3, new_width, 3)
                layers += [stem, PairedNormActivation(new_width, activation)]
            else:
                layers.append(pooling())
                if new_width != width:
                    layers += [PairedConv(width, new_width, 1), PairedNormActivation(new_width, activation)]
            width, side = new_width, new_side
            layers += [block(width) for _ in range(blocks)]
        if not layers:
            raise ModelError("a paired network needs stages: give some behind its name, as in 'paired 64x3@16 64x4@8'")
        self.features = nn.Sequential(*layers, PairedNormActivation(width, activation))
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(width // 2, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.features(images).mean(dim=(2, 3), dtype=torch.float32)  # (N, width)
        a, b = features.chunk(2, dim=1)  # the mirrored image has them the other way round
        return F.log_softmax(self.classifier(self.dropout(a + b)).float(), dim=1)


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "report": ReportNet,
    "paired": PairedNet,
    # with SiLU (Elfwing et al. 2017, arXiv 1702.03118) for ReLU
    "gated": functools.partial(PairedNet, block=GatedBlock, activation=nn.SiLU, pooling=OVERLAPPING),
}


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


def build_network(name: str, **options) -> nn.Module:
    """A freshly initialised network.

    Args:
        name: a key of NETWORKS; behind a paired one's, its stages: "paired 64x3@16 64x4@8".
        options: go to its constructor.

    Raises:
        ModelError: an unknown name, stages that cannot be, or a network over the limit.
    """
    kind, *stages = name.split() if isinstance(name, str) and name.strip() else [name]
    if not isinstance(kind, str) or kind not in NETWORKS or (stages and kind == "report"):
        raise ModelError(
            f"there is no network named {name!r}: choose 'report', or 'paired' or 'gated' and its stages, as in "
            "'paired 64x3@16 64x4@8'")
    return check_limit(NETWORKS[kind](*stages, **options))


def fold_batch_norm(network: nn.Module) -> nn.Module:
    """A copy for inference, each batch norm folded into the convolution in front of it, where there is one.

    In inference a batch norm is one multiplication and one addition per channel, which the
    convolution's weight and bias can carry. The outputs agree up to rounding.
    """
    folded = copy.deepcopy(network).eval()
    for layers in [module for module in folded.modules() if isinstance(module, nn.Sequential)]:
        for i in range(len(layers)):
            before = layers[i - 1] if i else None
            if isinstance(layers[i], PairedConv):
                layers[i] = layers[i].unpaired()
            elif isinstance(layers[i], nn.BatchNorm2d) and isinstance(before, nn.Conv2d):
                layers[i - 1], layers[i] = fuse_conv_bn_eval(before, layers[i]), nn.Identity()
            elif isinstance(layers[i], PairedNormActivation) and isinstance(before, nn.Conv2d):
                layers[i - 1], layers[i] = fuse_conv_bn_eval(before, layers[i].unpaired()), layers[i].activation
    return folded


def save_weights(path: str | os.PathLike, network: nn.Module, name: str, **facts) -> None:
    """Write weights.pkl, whole or not at all.

    Args:
        path: the file to write.
        network: whose state is saved, as CPU tensors.
        name: the name by which `load_weights` has `build_network` build it again.
        facts: plain values that describe the training (recipe, seed, accuracy, ...).
    """
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in network.state_dict().items()}
    with replacing(path) as part:
        torch.save({"network": name, "state": state, **facts}, part)


def load_weights(path: str | os.PathLike) -> tuple[nn.Module, dict]:
    """Read what `save_weights` wrote. No code in the file is run.

    Returns:
        The network on the CPU in evaluation mode, and the facts saved beside its state, "network" its name.

    Raises:
        ModelError: the file is missing, damaged, not a weights file, or of another network.
    """
    path = Path(path)
    contents = read_archive(path, f"make it with: python train.py --out {path}")
    if not isinstance(contents, dict) or not {"network", "state"} <= contents.keys():
        raise ModelError(f"{path} holds no weights of this project: name a file that train.py wrote")
    network = build_network(contents["network"])
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
