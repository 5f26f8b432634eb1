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
aten = torch.ops.aten


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


class GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, both):
        n, c, h, w = both.shape
        out = torch.empty((n, c // 2, h, w), memory_format=torch.channels_last)
        call("glu_forward", both, out, rows(both, c), c // 2)
        ctx.save_for_backward(both)
        return out

    @staticmethod
    def backward(ctx, grad):
        both, = ctx.saved_tensors
        out, grad = torch.empty_like(both), channels_last(grad)
        call("glu_backward", both, grad, out, rows(both, both.shape[1]), grad.shape[1])
        return out


class BatchNormActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, norm, act):
        c = len(weight)
        n = rows(x, c)
        mean, m2 = torch.empty(c, dtype=torch.float64), torch.empty(c, dtype=torch.float64)
        call("bn_statistics", x, n, c, mean, m2)
        norm.running_mean.lerp_(mean.float(), norm.momentum)
        norm.running_var.lerp_((m2 / (n.value - 1)).float(), norm.momentum)
        norm.num_batches_tracked += 1
        invstd = (m2 / n.value + norm.eps).rsqrt()
        scale = (weight.double() * invstd).float()
        shift = (bias.double() - weight.double() * invstd * mean).float()
        y = torch.empty_like(x)
        call("bn_act_forward", x, y, n, c, scale, shift, act)
        ctx.save_for_backward(x, scale, shift, mean, invstd)
        ctx.act = act
        return y

    @staticmethod
    def backward(ctx, grad):
        x, scale, shift, mean, invstd = ctx.saved_tensors
        c = len(scale)
        n = rows(x, c)
        grad = channels_last(grad)
        sums, dots, mean32 = torch.empty_like(mean), torch.empty_like(mean), mean.float()
        call("bn_act_backward_sums", x, grad, n, c, scale, shift, mean32, ctx.act, sums, dots)
        a = (scale * sums / n.value).float()
        b = (scale * dots * invstd**2 / n.value).float()
        out = torch.empty_like(x)
        call("bn_act_backward", x, grad, out, n, c, scale, shift, mean32, ctx.act, a, b)
        return out, (dots * invstd).float(), sums.float(), None, None


class Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, padding=1, groups=len(weight))

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        n, c, h, w = x.shape
        rows(x, c)
        grad = channels_last(grad)
        dx, _, _ = aten.convolution_backward(
            grad, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], c, [True, False, False])
        dw = torch.empty(3, 3, c, dtype=torch.float64)
        call("depthwise_weight_gradient", x, grad, n, h, w, c, dw)
        return dx, dw.float().permute(2, 0, 1)[:, None]


def patch(cls, fused):
    original = cls.forward
    cls.forward = lambda self, x: fused(self, x) if self.training and hasattr(self, "fused") else original(self, x)


patch(model.FlipBatchNorm2d, lambda self, x: BatchNormActivation.apply(x, self.weight, self.bias, self, self.fused))
patch(nn.Hardtanh, lambda self, x: x)
patch(nn.SiLU, lambda self, x: x)
patch(model.SwiGLU, lambda self, x: GLU.apply(F.conv2d(x, torch.cat([self.values.kernel(), self.gates.kernel()]))))
patch(model.FlipConv2d, lambda self, x: Depthwise.apply(x, self.kernel()))


def fuse(network: nn.Module) -> nn.Module:
    for sequence in network.modules():
        if isinstance(sequence, nn.Sequential):
            for norm, activation in itertools.pairwise(sequence):
                if isinstance(norm, model.FlipBatchNorm2d):
                    assert isinstance(activation, (nn.Hardtanh, nn.SiLU))
                    norm.fused, activation.fused = int(isinstance(activation, nn.SiLU)), True
        if isinstance(sequence, model.SwiGLU):
            sequence.fused = True
        if isinstance(sequence, model.FlipConv2d) and sequence.options["groups"] > 1:
            assert sequence.options["groups"] % 16 == 0
            sequence.fused = True
    return network


build_network = model.build_network
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
