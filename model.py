"""The networks and their weights.

A network is any `nn.Module` that maps normalised images, float (N, 3, 32, 32), to logits (N, 10). It has at most 50,000
parameters and a name in NETWORKS, and is built without arguments. It then trains with every recipe. For one of your
own, write a class like PlainCNN below NETWORKS, then NETWORKS["mine"] = Mine, and run:

    python model.py mine               its layers
    python train.py --network mine     trains it
"""

import argparse
import copy
import functools
import io
import itertools
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from data import UserError, atomic_write, one_line, say

PARAMETER_LIMIT = 50_000


# --- plain networks -------------------------------------------------------------------------------

def conv_norm_relu(in_channels: int, out_channels: int) -> list[nn.Module]:
    """3x3 convolution, batch norm, ReLU: (N, in_channels, H, W) -> (N, out_channels, H, W)."""
    return [nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]


class PlainCNN(nn.Module):
    """A plain convolutional network: 45,066 parameters, 8.1 million multiply-adds."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            *conv_norm_relu(3, 16), *conv_norm_relu(16, 16), nn.MaxPool2d(2),
            *conv_norm_relu(16, 32), *conv_norm_relu(32, 32), nn.MaxPool2d(2),
            *conv_norm_relu(32, 48), *conv_norm_relu(48, 32), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(32, 10))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)


class ReportNet(nn.Module):
    """The report's network: 47,410 parameters, 16.4 million multiply-adds.

    The report ends with a log-softmax and takes the negative log-likelihood. That is the cross-entropy of the logits,
    which this network returns and every recipe uses.
    """

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            *conv_norm_relu(3, 3),                                                     # layer 0: (N,  3, 32, 32)
            *conv_norm_relu(3, 10), *conv_norm_relu(10, 10), *conv_norm_relu(10, 10),  # layer 1: (N, 10, 32, 32)
            *conv_norm_relu(10, 30), *conv_norm_relu(30, 30), nn.AvgPool2d(2),         # layer 2: (N, 30, 16, 16)
            *conv_norm_relu(30, 30), nn.MaxPool2d(2),                                  #          (N, 30,  8,  8)
            *conv_norm_relu(30, 60), nn.MaxPool2d(2),                                  # layer 3: (N, 60,  4,  4)
        )
        self.classifier = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(960, 10))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(images))


# --- flip-equivariant layers ----------------------------------------------------------------------
#
# The channels of a flip-equivariant layer are two halves, [a | b]. Flipping the image left to right flips every map and
# swaps a and b; nothing else changes. This is a group-equivariant convolution (Cohen & Welling 2016, arXiv 1602.07576;
# Weiler & Cesa 2019, arXiv 1911.08251) for the group of one flip. A layer stores the parameters of one half only.


class FlipConv2d(nn.Module):
    """Flip-equivariant convolution without bias: (N, C_in, H, W) -> (N, C_out, H, W).

    Half of the filters are parameters. The other half are the same filters flipped, with the two halves of their input
    channels swapped where a filter sees both.

    Args:
        in_channels: 3 for the image itself, which has no halves (the lifting convolution); else even.
        out_channels: even.
        kernel_size: odd.
        groups: 1 or an even number, so that no group mixes the two halves.
        gain: initial value of a learned factor for each filter; None for no factor.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, *, groups: int = 1,
                 gain: float | None = None):
        super().__init__()
        for channels in (out_channels, 2 if in_channels == 3 else in_channels):
            if channels % 2:
                raise ValueError(f"a flip-equivariant layer needs an even width, not {channels}")
        self.options = {"padding": kernel_size // 2, "groups": groups}
        self.swaps_halves = in_channels != 3 and groups == 1
        filters = torch.randn(out_channels // 2, in_channels // groups, kernel_size, kernel_size)
        self.weight = nn.Parameter(F.normalize(filters.flatten(1)).view_as(filters))
        self.gain = None if gain is None else nn.Parameter(torch.full((out_channels // 2, 1), gain))

    def kernel(self) -> torch.Tensor:
        """The weight (C_out, C_in / groups, kernel_size, kernel_size) of the whole layer."""
        stored = self.weight if self.gain is None else self.gain[:, :, None, None] * self.weight
        flipped = stored.flip(3)
        if self.swaps_halves:
            flipped = flipped.roll(flipped.shape[1] // 2, dims=1)
        return torch.cat([stored, flipped]).contiguous(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.kernel(), **self.options)

    def export(self) -> nn.Conv2d:
        """The same layer as an ordinary convolution, for inference."""
        kernel = self.kernel().detach()
        in_channels = kernel.shape[1] * self.options["groups"]
        layer = nn.Conv2d(in_channels, kernel.shape[0], kernel.shape[2:], bias=False, **self.options)
        layer.weight = nn.Parameter(kernel)
        return layer.eval()


class FlipBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose two halves share their statistics and parameters: (N, channels, H, W) -> the same."""

    def __init__(self, channels: int):
        super().__init__(channels // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        # In channels_last memory the halves of a pixel are neighbours: a view of half the channels, twice the width.
        x = x.permute(0, 2, 3, 1).reshape(n, h, 2 * w, c // 2).permute(0, 3, 1, 2)
        x = super().forward(x)
        return x.permute(0, 2, 3, 1).reshape(n, h, w, c).permute(0, 3, 1, 2)

    def export(self) -> nn.BatchNorm2d:
        """The same layer as an ordinary batch norm, for inference."""
        norm = nn.BatchNorm2d(2 * self.num_features).to(self.weight)  # its device and type
        norm.load_state_dict({name: tensor.repeat(2) if tensor.ndim else tensor
                              for name, tensor in self.state_dict().items()})
        return norm.eval()


class SwiGLU(nn.Module):
    """values(x) * SiLU(gates(x)): (N, C, H, W) -> (N, hidden, H, W); Shazeer 2020, arXiv 2002.05202."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.values = FlipConv2d(channels, hidden, 1)  # two convolutions are faster than one whose output is split
        self.gates = FlipConv2d(channels, hidden, 1, gain=1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values, gates = self.values(x), self.gates(x)
        if torch.is_grad_enabled():
            return values * F.silu(gates)
        return F.silu(gates, inplace=True).mul_(values)  # in place is faster; training needs both factors


# --- flip-invariant networks ----------------------------------------------------------------------

def anti_aliased_pool() -> nn.Sequential:
    """Mean of overlapping 4x4 windows: (N, C, H, W) -> (N, C, H / 2, W / 2); against aliasing (arXiv 1904.11486)."""
    # equals nn.AvgPool2d(4, stride=2, padding=1); two steps are faster
    return nn.Sequential(nn.AvgPool2d(2, stride=2, padding=1), nn.AvgPool2d(2, stride=1))


class GatedBlock(nn.Module):
    """x + layers(x): a depthwise 3x3 convolution, then 1x1 ones, in ConvNeXt's order (arXiv 2201.03545), with a gate.

    The input of the gate is clamped to -4..4, since a gate squares outliers (arXiv 2409.12517). The last gain starts
    at zero, so the block starts as the identity (SkipInit, arXiv 2002.10444).
    """

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(
            FlipConv2d(width, width, 3, groups=width),
            FlipBatchNorm2d(width),
            nn.Hardtanh(-4.0, 4.0),  # not in place: autograd would copy the whole gradient
            SwiGLU(width, width),
            FlipConv2d(width, width, 1, gain=0.0),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).add_(x)


class FlipNet(nn.Module):
    """Gated blocks in three stages; an image and its mirror image get the same logits.

    Args:
        widths: channels of each stage. Its maps are 32x32, 16x16 and 8x8 for an image of 32x32.
        blocks: gated blocks of each stage.
    """

    def __init__(self, widths: tuple[int, int, int], blocks: tuple[int, int, int]):
        super().__init__()
        layers = []
        for before, width, n in zip((3, *widths[:-1]), widths, blocks, strict=True):
            if layers:
                layers.append(anti_aliased_pool())
            if before != width:  # 3x3 for the image, 1x1 between stages
                layers += [FlipConv2d(before, width, 1 if layers else 3), FlipBatchNorm2d(width), nn.SiLU()]
            layers += [GatedBlock(width) for _ in range(n)]
        self.features = nn.Sequential(*layers, FlipBatchNorm2d(widths[-1]), nn.SiLU())
        self.classifier = nn.Linear(widths[-1] // 2, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        images = images.contiguous(memory_format=torch.channels_last)  # faster with these layers
        features = self.features(images).mean(dim=(2, 3), dtype=torch.float32)  # (N, width)
        a, b = features.chunk(2, dim=1)
        return self.classifier(a + b)  # group pooling: a flip only swaps a and b


NETWORKS = {
    "plain": PlainCNN,
    "report": ReportNet,
    # 47,866 parameters, 14.6 million multiply-adds: for speed
    "gated": functools.partial(FlipNet, (32, 64, 64), (0, 3, 4)),
    # 49,586 parameters, 32.0 million multiply-adds: for accuracy, with blocks at 32x32 too
    "gated32": functools.partial(FlipNet, (48, 64, 64), (2, 4, 2)),
    # the same with fewer channels: 27,674, 12,162 and 4,242 parameters
    "gated32-28k": functools.partial(FlipNet, (32, 48, 48), (2, 4, 2)),
    "gated32-12k": functools.partial(FlipNet, (16, 32, 32), (2, 4, 2)),
    "gated32-4k": functools.partial(FlipNet, (16, 16, 16), (2, 4, 2)),
}


# --- inference ------------------------------------------------------------------------------------

def export(network: nn.Module) -> nn.Module:
    """A copy of `network` for inference, faster and equal up to rounding: flip-equivariant layers become ordinary
    ones, and a batch norm that follows a convolution is folded into it."""
    exported = copy.deepcopy(network).eval()
    for parent in list(exported.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, (FlipConv2d, FlipBatchNorm2d)):
                setattr(parent, name, layer.export())
        if type(parent) is nn.Sequential:  # a subclass may apply its layers in another order
            for i, (layer, following) in enumerate(itertools.pairwise(parent)):
                if type(layer) is nn.Conv2d and type(following) is nn.BatchNorm2d and following.track_running_stats:
                    parent[i], parent[i + 1] = fuse_conv_bn_eval(layer, following), nn.Identity()
    return exported


# --- what a network must do -----------------------------------------------------------------------

def count_parameters(network: nn.Module) -> int:
    """The number of parameters, trainable or not. Batch norm's running statistics are buffers, not parameters."""
    return sum(parameter.numel() for parameter in network.parameters())


def find_network(name: str) -> Callable[[], nn.Module]:
    """The function that builds the network of this name. Raises UserError if there is none."""
    if name not in NETWORKS:
        raise UserError(f"model.py has no network {name!r:.60}: it has {', '.join(NETWORKS)}")
    return NETWORKS[name]


def build_network(name: str) -> nn.Module:
    """A freshly initialised network of NETWORKS. Raises UserError if there is none of this name, or if it fails or has
    a fault."""
    build = find_network(name)
    try:
        network = build().eval()
        fault = find_fault(network, build)
    except Exception as error:  # whatever its code raises
        what = ("an attribute is a computed tensor, such as a kept activation or a weight of torch.nn.utils.weight_norm"
                if "deepcopy protocol" in str(error) else one_line(error))
        raise UserError(f"network {name!r} fails ({what}): correct it in model.py") from error
    if fault:
        raise UserError(f"network {name!r} {fault}")
    return copy.deepcopy(network).train()  # build() may return one network each time


def find_fault(network: nn.Module, build: Callable[[], nn.Module]) -> str | None:
    """What keeps a network from being trained, saved and exported here, if anything: the rest of a sentence."""
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = [network(images[:n]) for n in (1, 2)]  # lazy layers get their parameters here
    shapes = [list(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__ for x in outputs]
    if shapes != [[1, 10], [2, 10]]:
        return (f"maps one image to {shapes[0]}, two images to {shapes[1]}: it must return logits of shape [1, 10] and "
                "[2, 10]")
    if any(x.dtype in (torch.float16, torch.bfloat16) for x in (outputs[1], *network.parameters())):
        return "computes in half precision: leave it in float32, since train.py applies bfloat16 where that is faster"
    logits = outputs[1].float()
    if logits.min() >= 0 and torch.allclose(logits.sum(dim=1), torch.ones(2)):
        return "returns probabilities: leave out its softmax, since logits are expected"
    if (n := count_parameters(network)) > PARAMETER_LIMIT:
        return f"has {n:,} parameters, over the limit of {PARAMETER_LIMIT:,}: make a layer narrower"

    trial = copy.deepcopy(network).train()
    trial(images).sum().backward()
    copy.deepcopy(network)  # fails if hooks of the trial keep activations in the network
    before, after = ({key: getattr(value, "shape", None) for key, value in each.state_dict().items()}
                     for each in (network, trial))
    if before != after or None in before.values():
        return "must have a state_dict() of tensors, whose names and shapes stay as they are in training"
    nbytes = sum(tensor.untyped_storage().nbytes() for tensor in network.state_dict().values())  # as in a file
    if nbytes > ARCHIVE_LIMIT / 4:  # a checkpoint may have them twice
        return (f"has buffers of more than {ARCHIVE_LIMIT // 4:,} bytes: make them smaller, and clone() one that is a "
                "slice of a larger tensor")
    perturb(trial)  # the zeros and ones of a fresh network hide what export() changes
    exported = export(trial)(images)
    expected, repeated, alone = trial.eval()(images), trial(images), trial(images[:1])
    if not expected.isfinite().all():
        return "returns logits that are not finite: find out where its values overflow"
    rounding = 1e-3 * expected.abs().max()
    if (repeated - expected).abs().max() > rounding:
        return ("returns different logits when called twice on the same images: pass training=self.training to a "
                "dropout, and do not change the input of forward() in place")
    with torch.no_grad():
        (loaded := build().eval())(images)  # a lazy layer cannot be copied before
    loaded = copy.deepcopy(loaded)  # as from a file, in another process
    loaded.load_state_dict(trial.state_dict())
    if (loaded(images) - expected).abs().max() > 0.01 * rounding:  # one step changes a running mean by little
        return ("depends on values outside its state_dict(), which weights.pkl cannot hold: register them as "
                "parameters or buffers")
    if (alone - expected[:1]).abs().max() > rounding:
        return "returns different logits for an image alone and in a batch: do not mix the images of a batch"
    if (exported - expected).abs().max() > rounding:
        return ("uses what a convolution returns before its batch norm, which export() folds into it: keep the two out "
                "of an nn.Sequential")
    return None


@torch.no_grad()
def perturb(network: nn.Module) -> None:
    """Change each parameter by about a tenth of its value, and each zero to about 0.1 in size."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if parameter.is_floating_point():
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter += torch.where(parameter == 0, noise, parameter * noise)


def takes_size(network: nn.Module, size: int) -> bool:
    """Whether the network, on the CPU, takes images of this size; a linear layer on flattened maps fixes it to 32."""
    try:
        with torch.no_grad():
            return copy.deepcopy(network).eval()(torch.zeros(2, 3, size, size)).shape == (2, 10)
    except Exception:  # whatever its code raises
        return False


# --- files ----------------------------------------------------------------------------------------

# What a weights file says about its training, by name and type.
METADATA = {"network": str, "recipe": str, "seed": int, "epochs": float, "validate": bool, "accuracy": float}
ARCHIVE_LIMIT = 64_000_000  # bytes, many times the size of a checkpoint


def save_archive(path: str | os.PathLike, contents: dict) -> None:
    """Write tensors and plain values with torch.save, atomically. Raises OSError when the disk is full."""
    torch.save(contents, buffer := io.BytesIO())
    atomic_write(path, buffer.getvalue())


def load_archive(path: str | os.PathLike, names: set[str], remedy: str) -> dict:
    """Read what `save_archive` wrote. Checksums are verified, and no code in the file is run.

    Raises UserError, ending with `remedy`, if the file is missing, damaged, or not a dict of these names.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}: {remedy}")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load checks no checksum, and no size
            members = archive.infolist()
            if max(path.stat().st_size, sum(member.file_size for member in members)) > ARCHIVE_LIMIT:
                raise ValueError(f"it has more than {ARCHIVE_LIMIT:,} bytes")
            if archive.testzip() or any(member.external_attr & 0x10 for member in members):
                raise ValueError("a checksum does not match, or a tensor is marked as a folder")
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: change its permissions, or copy it") from error
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is refused because loading it could run code: {remedy}") from error
    except Exception as error:  # damaged bytes make zipfile, zlib and torch fail in many ways
        raise UserError(f"{path} is damaged or of another format ({one_line(error)!r}): {remedy}") from error
    found = list(map(str, contents)) if isinstance(contents, dict) else [type(contents).__name__]
    if set(found) != names:
        raise UserError(f"{path} holds {', '.join(found)[:200]!r}, not {', '.join(sorted(names))}: {remedy}")
    return contents


def save_weights(path: str | os.PathLike, network: nn.Module, metadata: dict) -> None:
    """Write weights.pkl: the state of `network` as CPU tensors, and metadata with the names and types of METADATA."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    save_archive(path, {"metadata": metadata, "state": state})


def load_weights(path: str | os.PathLike) -> tuple[nn.Module, dict]:
    """The network that `save_weights` wrote, on the CPU and in evaluation mode, and its metadata. Raises UserError if
    the file is missing or damaged, or does not fit a network of this model.py."""
    remedy = "name the weights.pkl of a finished run, or train one with: python train.py --out FILE"
    contents = load_archive(path, {"metadata", "state"}, remedy)
    metadata = contents["metadata"]
    if not (isinstance(metadata, dict) and {name: type(value) for name, value in metadata.items()} == METADATA
            and metadata["recipe"].isprintable() and len(metadata["recipe"]) < 100 and 0 <= metadata["seed"] < 2**31):
        raise UserError(f"{path} has no valid description of its network: {remedy}")
    try:
        network = build_network(metadata["network"])
    except UserError as error:
        raise UserError(f"{path} cannot be used: {error}") from error
    load_state(network, contents["state"], path, metadata["network"])
    return network.eval(), metadata


def load_state(network: nn.Module, state: dict, path: str | os.PathLike, name: str) -> None:
    """Give the network of this name the state that was read from `path`. Raises UserError if it does not fit."""
    try:
        for key, tensor in network.state_dict().items():
            if state[key].ndim == 2 and tensor.ndim == 4:  # earlier versions kept a convolution as a matrix
                state[key] = state[key].view(tensor.shape)
        network.load_state_dict(state)
    except Exception as error:  # other names or shapes, or no tensors at all
        raise UserError(f"the tensors in {path} do not fit the network {name!r} of this model.py: "
                        "train again, or use the model.py they were trained with") from error


def describe_training(metadata: dict) -> str:
    """For example "network gated32, recipe best, 40 epochs, seed 0"."""
    epochs = f"{metadata['epochs']:g} epoch{'' if metadata['epochs'] == 1 else 's'}"
    return f"network {metadata['network']}, recipe {metadata['recipe']}, {epochs}, seed {metadata['seed']}"


# --- the command ----------------------------------------------------------------------------------

def layer_table(network: nn.Module) -> list[tuple[str, str, str, int, int]]:
    """Name, type, output shape, parameters and multiply-adds of each layer, for one image of 32x32.

    Multiply-adds are those of 1D and 2D convolutions and linear layers. Parameters of a layer that is called twice
    count once. Parameters outside all these layers are in a last row, "elsewhere".
    """
    rows, counted = [], set()

    def add_row(name: str, layer: nn.Module, output: torch.Tensor) -> None:
        if not isinstance(output, torch.Tensor):  # of an LSTM, say
            output = torch.empty(0)
        counts = isinstance(layer, (nn.Conv1d, nn.Conv2d, FlipConv2d, nn.Linear))
        fan_in = layer.weight[0].numel() if counts else 0
        shape = "x".join(map(str, output.shape[1:]))
        parameters = sum(parameter.numel() for parameter in set(layer.parameters()) - counted)
        counted.update(layer.parameters())
        rows.append((name, type(layer).__name__, shape, parameters, output.numel() * fan_in))

    network = copy.deepcopy(network).eval()
    for name, module in network.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda layer, _, output, name=name: add_row(name, layer, output))
    network(torch.zeros(1, 3, 32, 32))
    if rest := count_parameters(network) - sum(row[3] for row in rows):
        rows.append(("elsewhere", "", "", rest, 0))
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Print the layers of the networks.")
    parser.add_argument("network", nargs="?", choices=NETWORKS, help="one of the networks (default: all)")
    chosen = parser.parse_args(argv).network
    for name in [chosen] if chosen else NETWORKS:
        try:
            network = build_network(name)
        except UserError as error:
            parser.exit(2, f"error: {error}\n")
        rows = layer_table(network)
        total = ("", "sum", "", count_parameters(network), sum(row[4] for row in rows))
        say(f"\n{name}\n\n{'layer':32}{'type':17}{'output':>9}{'parameters':>12}{'multiply-adds':>15}")
        for layer, kind, shape, parameters, multiply_adds in [*rows, total]:
            say(f"{layer:32}{kind:17}{shape:>9}{parameters:12,}{multiply_adds:15,}")


if __name__ == "__main__":
    main()
