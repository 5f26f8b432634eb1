"""train.py with fused float32 kernels for one thread of a CPU with AVX2: the same functions, up to rounding.

    g++ -O3 -march=native -ffast-math -shared -fPIC fused.cpp -o libfused.so -lm
    python fused.py check                           outputs and gradients against train.py's, all against float64
    python fused.py --recipe best ...               the options of train.py, whose folder is the current one
"""

import copy
import ctypes
import itertools
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path.cwd()))
import model
import train

library = ctypes.CDLL(str(Path(__file__).with_name("libfused.so")))


def call(name: str, *args) -> None:
    converted = []
    for arg in args:
        if isinstance(arg, torch.Tensor):
            assert arg.is_contiguous() or arg.is_contiguous(memory_format=torch.channels_last), name
            converted.append(ctypes.c_void_p(arg.data_ptr()))
        else:
            converted.append(arg)
    getattr(library, name)(*converted)


def rows(x: torch.Tensor, channels: int) -> ctypes.c_long:
    assert x.dtype == torch.float32 and x.is_contiguous(memory_format=torch.channels_last)
    return ctypes.c_long(x.numel() // channels)


def channels_last(grad: torch.Tensor) -> torch.Tensor:
    assert grad.dtype == torch.float32
    return grad.contiguous(memory_format=torch.channels_last)


def normalization(norm, weight, bias, mean, m2, n):
    """Scale and shift of a batch norm and 1 / standard deviation, from its statistics; the running ones are updated."""
    norm.running_mean.lerp_(mean.float(), norm.momentum)
    norm.running_var.lerp_((m2 / (n - 1)).float(), norm.momentum)
    norm.num_batches_tracked += 1
    invstd = (m2 / n + norm.eps).rsqrt()
    return (weight.double() * invstd).float(), (bias.double() - weight.double() * invstd * mean).float(), invstd


def gradient_terms(scale, invstd, sums, dots, n):
    """a and b of bn_backward, and the gradients of the weight and the bias of a batch norm."""
    a, b = scale * sums / n, scale * dots * invstd**2 / n
    return a.float(), b.float(), (dots * invstd).float(), sums.float()


class BatchNormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, norm):
        c = len(weight)
        n = rows(x, c)
        mean, m2 = torch.empty(c, dtype=torch.float64), torch.empty(c, dtype=torch.float64)
        call("bn_statistics", x, n, c, mean, m2)
        scale, shift, invstd = normalization(norm, weight, bias, mean, m2, n.value)
        y = torch.empty_like(x)
        call("bn_silu_forward", x, y, n, c, scale, shift)
        ctx.save_for_backward(x, scale, shift, mean, invstd)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, scale, shift, mean, invstd = ctx.saved_tensors
        c = len(scale)
        n = rows(x, c)
        grad = channels_last(grad)
        sums, dots, mean32, out = torch.empty_like(mean), torch.empty_like(mean), mean.float(), torch.empty_like(x)
        call("bn_silu_backward_sums", x, grad, out, n, c, scale, shift, mean32, sums, dots)
        a, b, dweight, dbias = gradient_terms(scale, invstd, sums, dots, n.value)
        call("bn_backward", x, out, n, c, scale, mean32, a, b)
        return out, dweight, dbias, None


class GatedBlock(torch.autograd.Function):
    """A whole block: only its input and the output of its depthwise convolution are kept for the backward pass."""

    @staticmethod
    def forward(ctx, x, taps, weight, bias, norm, values, gates, last):
        n, c, h, w = x.shape
        pixels = rows(x, c)
        t, y = torch.empty_like(x), torch.empty_like(x)
        mean, m2 = torch.empty(c // 2, dtype=torch.float64), torch.empty(c // 2, dtype=torch.float64)
        call("depthwise_forward", x, taps, t, n, h, w, c, mean, m2)
        scale, shift, invstd = normalization(norm, weight, bias, mean, m2, 2 * pixels.value)
        call("block_forward", x, t, y, pixels, c, scale, shift, values, gates, last)
        ctx.save_for_backward(x, t, taps, scale, shift, mean, invstd, values, gates, last)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, t, taps, scale, shift, mean, invstd, values, gates, last = ctx.saved_tensors
        n, c, h, w = x.shape
        pixels = rows(x, c)
        dy = channels_last(dy)
        dz, dx = torch.empty_like(x), torch.empty_like(x)
        dw = torch.zeros(3, 2, c // 2, c // 2, dtype=torch.float64)
        sums, dots, mean32 = torch.zeros_like(mean), torch.zeros_like(mean), mean.float()
        transposed = [each.mT.contiguous() for each in (values, gates, last)]
        call("block_backward", t, dy, dz, pixels, c, scale, shift, mean32, values, gates, *transposed, dw, sums, dots)
        a, b, dweight, dbias = gradient_terms(scale, invstd, sums, dots, 2 * pixels.value)
        dtaps = torch.zeros(9, c, dtype=torch.float64)
        call("depthwise_backward", x, t, dz, dy, dx, taps.flip(0), n, h, w, c, scale, mean32, a, b, dtaps)
        return dx, dtaps.float(), dweight, dbias, None, *dw.float()


def matrices(layer: model.FlipConv2d) -> torch.Tensor:
    """(2, C / 2, C / 2): what a 1x1 layer does to the sum and to the difference of the halves, rows for inputs."""
    weight = layer.weight if layer.gain is None else layer.gain * layer.weight
    a, b = weight.chunk(2, dim=1)
    return (torch.stack([a + b, a - b]) / 2).mT.contiguous()


def running(norm: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift of a batch norm in inference."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias - norm.running_mean * scale


def gated_block(block: model.ResidualBlock, x: torch.Tensor) -> torch.Tensor:
    conv, norm, _, glu, last = block.layers
    taps = conv.kernel().reshape(-1, 9).T.contiguous()
    maps = [matrices(layer) for layer in (glu.values, glu.gates, last)]
    if block.training:
        return GatedBlock.apply(x, taps, norm.weight, norm.bias, norm, *maps)
    n, c, h, w = x.shape
    scale, shift = running(norm)
    t, y = torch.empty_like(x), torch.empty_like(x)
    call("depthwise_forward", x, taps, t, n, h, w, c, None, None)
    call("block_forward", x, t, y, rows(x, c), c, scale, shift, *maps)
    return y


def batch_norm_silu(norm: model.FlipBatchNorm2d, x: torch.Tensor) -> torch.Tensor:
    if norm.training:
        return BatchNormSiLU.apply(x, norm.weight, norm.bias, norm)
    scale, shift = running(norm)
    y = torch.empty_like(x)
    call("bn_silu_forward", x, y, rows(x, len(scale)), len(scale), scale, shift)
    return y


def patch(cls, fused):
    original = cls.forward
    cls.forward = lambda self, x: fused(self, x) if hasattr(self, "fused") else original(self, x)


patch(model.FlipBatchNorm2d, batch_norm_silu)
patch(nn.SiLU, lambda self, x: x)
patch(model.ResidualBlock, gated_block)


def fuse(network: nn.Module) -> nn.Module:
    for module in network.modules():
        if isinstance(module, model.ResidualBlock):
            assert module.layers[0].options["groups"] in (16, 32, 48, 64)
            module.fused = True
        elif isinstance(module, nn.Sequential):
            for norm, activation in itertools.pairwise(module):
                if isinstance(norm, model.FlipBatchNorm2d) and isinstance(activation, nn.SiLU):
                    norm.fused = activation.fused = True
    return network


build_network = model.build_network
model.export = lambda network: copy.deepcopy(network).eval().requires_grad_(False)
model.build_network = lambda name, **options: fuse(build_network(name, **options))


def check() -> None:
    torch.manual_seed(0)
    network = build_network("gated32").train()
    for module in network.modules():
        if isinstance(module, model.FlipConv2d) and module.gain is not None:
            module.gain.data.uniform_(-1.5, 1.5)
        if isinstance(module, model.FlipBatchNorm2d):
            module.weight.data.uniform_(0.5, 2)
            module.bias.data.normal_()
    networks = {"float64": copy.deepcopy(network).double(), "train.py": network, "fused": fuse(copy.deepcopy(network))}
    images = torch.randn(128, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (128,))
    outputs = {}
    for name, network in networks.items():
        maps = network.features(images.to(network.classifier.weight.dtype))
        a, b = maps.mean(dim=(2, 3)).chunk(2, dim=1)
        outputs[name] = F.log_softmax(network.classifier(a + b), dim=1)
        F.nll_loss(outputs[name], labels).backward()
    exact = networks.pop("float64")
    for name, network in networks.items():
        errors = [((p.grad - q.grad).norm() / q.grad.norm()).item()
                  for p, q in zip(network.parameters(), exact.parameters(), strict=True)]
        buffers = [((p - q).norm() / q.norm()).item()
                   for p, q in zip(network.buffers(), exact.buffers(), strict=True) if p.ndim]
        print(f"{name}: largest error of an output {(outputs[name] - outputs['float64']).abs().max():.1e}, relative "
              f"error of a gradient {max(errors):.1e}, of a running statistic {max(buffers):.1e}")
    seconds = {name: [] for name in networks}
    for _ in range(12):
        for name, network in networks.items():
            start = time.perf_counter()
            F.nll_loss(network(images), labels).backward()
            seconds[name].append(time.perf_counter() - start)
    for name, values in seconds.items():
        print(f"{name}: {sorted(values)[len(values) // 2]:.3f} s for a step of 128 images, without the optimizer")


if __name__ == "__main__":
    assert torch.get_num_threads() == 1, "set OMP_NUM_THREADS=1"
    sys.exit(check() if sys.argv[1:] == ["check"] else train.main())
