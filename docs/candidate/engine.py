"""A gated network as flat buffers and a list of kernel launches; the functions are those of model.py and train.py."""

import json
import os

import torch
import torch.nn.functional as F
from torch import nn

import kernels as k
import model
from triton import next_power_of_2

MAPS = torch.float32 if os.environ.get("MAPS") == "float32" else torch.bfloat16


def cdiv(a, b):
    return -(-a // b)


class Layers:
    """The layers of a FlipNet in flat buffers. `source` is a network of model.py: start values, and where results go."""

    def __init__(self, source: nn.Module, device):
        self.source, self.device = source, device
        self.norms, self.matrices, self.plan = [], [], []  # plan: what the forward pass does
        width = 3
        modules = list(source.features)
        i = 0
        while i < len(modules):
            m = modules[i]
            if isinstance(m, model.FlipConv2d):  # stem or transition, with norm and SiLU
                c = 2 * m.weight.shape[0]
                matrix = self.add_matrix(m, 1 if m.kernel_size == 3 else 0, c, 32 if width == 3 else None)
                self.plan.append(("stem" if width == 3 else "transition", width, c, matrix, self.add_norm(modules[i + 1])))
                width, i = c, i + 3
            elif isinstance(m, model.GatedBlock):
                conv, norm, _, glu, last = m.layers
                self.plan.append(("block", width, [self.add_matrix(conv, 1, width, 16), *[
                    self.add_matrix(layer, 0, width, None) for layer in (glu.values, glu.gates, last)]], self.add_norm(norm)))
                i += 1
            elif isinstance(m, nn.Sequential):
                self.plan.append(("pool", width))
                i += 1
            else:
                self.plan.append(("final", width, self.add_norm(m)))
                i += 2
        self.width = width
        self.allocate()

    def add_norm(self, norm):
        self.norms.append(norm)
        return len(self.norms) - 1

    def add_matrix(self, layer, kind, c, rows):
        cp = next_power_of_2(c)
        k_rows = rows or next_power_of_2(layer.weight.shape[1])
        self.matrices.append((layer, kind, cp, k_rows))
        return len(self.matrices) - 1

    def allocate(self):
        d = self.device
        meta, scales, w_at, g_at, k_at = [], [], 0, 0, 0
        self.k_slices = []
        for layer, kind, cp, k_rows in self.matrices:
            rows, columns = layer.weight.shape
            has_gain = layer.gain is not None
            meta.append([w_at, g_at if has_gain else -1, k_at, rows, columns, cp, kind, 0])
            scales.append(max(1, rows / columns) ** 0.5)
            self.k_slices.append(slice(k_at, k_at + k_rows * cp))
            w_at, g_at, k_at = w_at + rows * columns, g_at + rows * has_gain, k_at + k_rows * cp
        n = len(self.norms)
        zeros = lambda *shape: torch.zeros(*shape, device=d)
        self.meta = torch.tensor(meta, dtype=torch.int32, device=d)
        self.scales = torch.tensor(scales, device=d)
        self.W, self.gains, self.wb, self.cls = zeros(w_at), zeros(max(1, g_at)), zeros(n, 2, 64), zeros(1024)
        self.running = zeros(n, 2, 64)
        self.W_M, self.gain_M, self.wb_M, self.cls_M = map(torch.zeros_like, (self.W, self.gains, self.wb, self.cls))
        self.state = [self.W, self.gains, self.wb, self.cls, self.running, self.W_M, self.gain_M, self.wb_M, self.cls_M]
        self.K32 = zeros(k_at)
        self.K16 = torch.zeros(k_at, device=d, dtype=torch.bfloat16)
        self.acc = zeros(k_at + 2 * n * 128)  # summed by atomics; zeroed at the start of a step
        self.dK, self.sums, self.bsums = self.acc[:k_at], self.acc[k_at:k_at + n * 128].view(n, 2, 64), self.acc[k_at + n * 128:].view(n, 2, 64)
        self.dcls = zeros(1024)
        self.channels = torch.tensor([2 * norm.num_features for norm in self.norms], dtype=torch.int32, device=d)
        self.table = zeros(1)
        self.step = torch.zeros(1, dtype=torch.int32, device=d)
        self.load()

    def load(self):
        """From `source` into the buffers."""
        self.W.copy_(torch.cat([layer.weight.detach().flatten() for layer, *_ in self.matrices]))
        gains = [layer.gain.detach().flatten() for layer, *_ in self.matrices if layer.gain is not None]
        self.gains.copy_(torch.cat(gains))
        for i, norm in enumerate(self.norms):
            c = 2 * norm.num_features
            self.wb[i, 0, :c], self.wb[i, 1, :c] = norm.weight.detach().repeat(2), norm.bias.detach().repeat(2)
            self.running[i, 0, :c], self.running[i, 1, :c] = norm.running_mean.repeat(2), norm.running_var.repeat(2)
        h = self.width // 2
        self.cls[:512].view(16, 32)[:10, :h] = self.source.classifier.weight.detach()
        self.cls[512:522] = self.source.classifier.bias.detach()
        self.write_kernels(init=True)

    @torch.no_grad()
    def save(self):
        """From the buffers into `source`."""
        at = gain_at = 0
        W, gains, wb, running, cls = (b.cpu() for b in (self.W, self.gains, self.wb, self.running, self.cls))
        for layer, *_ in self.matrices:
            layer.weight.copy_(W[at:at + layer.weight.numel()].view_as(layer.weight))
            at += layer.weight.numel()
            if layer.gain is not None:
                layer.gain.copy_(gains[gain_at:gain_at + len(layer.gain)].view_as(layer.gain))
                gain_at += len(layer.gain)
        for i, norm in enumerate(self.norms):
            h = norm.num_features
            norm.weight.copy_(wb[i, 0, :h]), norm.bias.copy_(wb[i, 1, :h])
            norm.running_mean.copy_(running[i, 0, :h]), norm.running_var.copy_(running[i, 1, :h])
            norm.num_batches_tracked.fill_(int(self.step))
        h = self.width // 2
        self.source.classifier.weight.copy_(cls[:512].view(16, 32)[:10, :h])
        self.source.classifier.bias.copy_(cls[512:522])

    def write_kernels(self, init, lr=0.0, gain_lr=0.0):
        k.update_matrices[(len(self.matrices),)](
            self.meta, self.scales, self.W, self.W_M, self.gains, self.gain_M, self.dK, self.K32, self.K16, self.table,
            self.step, lr, gain_lr, INIT=init)

    def kernel(self, i, bits=16):
        return (self.K16 if bits == 16 else self.K32)[self.k_slices[i]]


class Maps:
    """Buffers for the maps of `n` images of at most `size` pixels."""

    def __init__(self, layers: Layers, n: int, size: int, training: bool):
        d = layers.device
        self.kept = []
        largest = 0
        for entry in layers.plan:
            kind, c = entry[0], entry[1]
            if kind in ("stem", "transition"):
                c = entry[2]
            if kind == "pool":
                size //= 2
            count = {"stem": 2, "transition": 2, "block": 2, "pool": 1, "final": 0}[kind]
            shape = n * size * size * c
            self.kept.append([torch.empty(shape, dtype=MAPS, device=d) for _ in range(count)] if training else [shape] * count)
            largest = max(largest, shape)
        if not training:  # three buffers in turn
            pool = [torch.empty(largest, dtype=MAPS, device=d) for _ in range(3)]
            turn = 0
            for i, shapes in enumerate(self.kept):
                self.kept[i] = []
                for shape in shapes:
                    self.kept[i].append(pool[turn % 3][:shape])
                    turn += 1
        else:
            self.dy, self.dz, self.other = (torch.empty(largest, dtype=MAPS, device=d) for _ in range(3))
        self.features = torch.zeros(n, 64, device=d)
        self.df = torch.zeros(n, 64, device=d)
        self.logp = torch.zeros(n, 16, device=d)


BM, GRID = 64, 264
# rows of a tile, warps, programs at most (0: one per tile)
CANDIDATES = {
    "depthwise_forward": [(16, 4, 1056), (16, 4, 528), (32, 8, 528)],
    "block_forward": [(64, 4, 0), (128, 8, 0), (128, 4, 0)],
    "block_backward": [(64, 8, 132), (128, 8, 132), (64, 4, 132), (32, 4, 264)],
    "depthwise_backward": [(16, 4, 264), (16, 8, 264), (16, 8, 528), (8, 4, 528)],
}
CHOSEN = {}
TUNED = os.path.expanduser("~/tuned.json")
if os.path.exists(TUNED):
    CHOSEN = {key: tuple(value) for key, value in json.load(open(TUNED)).items()}


def launch(kernel, c, P, *args, name, **options):
    rows, warps, programs = CHOSEN.get(f"{name} {c}", CANDIDATES[name][0])
    tiles = cdiv(P, rows)
    kernel[(min(programs, tiles) if programs else tiles,)](
        *args, C=c, CP=next_power_of_2(c), num_warps=warps, **options,
        **{"BP" if "depthwise" in name else "BM": rows}, **({"num_stages": 2} if name == "block_backward" else {}))


def forward(layers: Layers, maps: Maps, images, n: int, size: int, evaluate: bool):
    """images (n, size, size, 3) float32, normalised -> maps.features, and the counts of pixels for each norm."""
    trail = []
    x, counts = images, []
    L = layers
    for entry, kept in zip(L.plan, maps.kept, strict=True):
        kind = entry[0]
        P = n * size * size
        if kind == "pool":
            c = entry[1]
            size //= 2
            P = n * size * size
            cp = next_power_of_2(c)
            k.pool_forward[(cdiv(P, 32),)](x, kept[0], P, size, C=c, CP=cp, BP=32)
            trail.append((entry, x, kept, P, size))
            x = kept[0]
        elif kind in ("stem", "transition"):
            _, before, c, matrix, norm = entry
            cp = next_power_of_2(c)
            t, y = kept
            grid = (min(GRID, cdiv(P, BM)),)
            if kind == "stem":
                k.stem_forward[grid](x, L.kernel(matrix), t, L.sums[norm], P, size, C=c, CP=cp, BM=BM, EVAL=evaluate)
            else:
                k.transition_forward[grid](x, L.kernel(matrix), t, L.sums[norm], P, A=before, AP=next_power_of_2(before),
                                           C=c, CP=cp, BM=BM, EVAL=evaluate)
            k.norm_silu_forward[(cdiv(P, BM),)](t, y, L.sums[norm], L.running[norm], L.wb[norm], P, C=c, CP=cp, BM=BM,
                                                EVAL=evaluate)
            trail.append((entry, x, kept, P, size))
            x = y
            counts.append(P)
        elif kind == "block":
            _, c, (dw, v, g, o), norm = entry
            cp = next_power_of_2(c)
            t, y = kept
            launch(k.depthwise_forward, c, P, x, L.kernel(dw, 32), t, L.sums[norm], P, size, name="depthwise_forward",
                   EVAL=evaluate)
            launch(k.block_forward, c, P, x, t, y, L.sums[norm], L.running[norm], L.wb[norm], L.kernel(v), L.kernel(g),
                   L.kernel(o), P, name="block_forward", EVAL=evaluate)
            trail.append((entry, x, kept, P, size))
            x = y
            counts.append(P)
        else:
            _, c, norm = entry
            cp = next_power_of_2(c)
            if not evaluate:
                k.statistics[(min(GRID, cdiv(P, BM)),)](x, L.sums[norm], P, C=c, CP=cp, BM=BM)
            k.pooled_features[(n,)](x, maps.features, L.sums[norm], L.running[norm], L.wb[norm], P, size, C=c, CP=cp,
                                    BM=64, EVAL=evaluate)
            trail.append((entry, x, kept, P, size))
            counts.append(P)
    return trail, counts


def predict(layers, maps, n, out):
    k.predict[(cdiv(n, 64),)](maps.features, layers.cls, out, n, C=layers.width,
                              HP=max(16, next_power_of_2(layers.width // 2)), BN=64)


def backward(layers: Layers, maps: Maps, images, trail):
    L = layers
    dy, other, dz = maps.dy, maps.other, maps.dz
    for entry, x, kept, P, size in reversed(trail):
        kind = entry[0]
        if kind == "final":
            _, c, norm = entry
            cp = next_power_of_2(c)
            k.norm_silu_sums[(min(GRID, cdiv(P, BM)),)](x, maps.df, L.sums[norm], L.bsums[norm], L.wb[norm], P, size, C=c,
                                                        CP=cp, BM=BM, POOLED=True)
            k.pooled_backward[(cdiv(P, BM),)](x, maps.df, dy, L.sums[norm], L.bsums[norm], L.wb[norm], P, size, C=c, CP=cp,
                                              BM=BM)
        elif kind == "block":
            _, c, (dw, v, g, o), norm = entry
            cp = next_power_of_2(c)
            t, _ = kept
            s = L.k_slices
            launch(k.block_backward, c, P, t, dy, dz, L.sums[norm], L.bsums[norm], L.wb[norm], L.kernel(v), L.kernel(g),
                   L.kernel(o), L.dK[s[v]], L.dK[s[g]], L.dK[s[o]], P, name="block_backward")
            launch(k.depthwise_backward, c, P, x, t, dz, dy, dy, L.kernel(dw, 32), L.dK[s[dw]], L.sums[norm],
                   L.bsums[norm], L.wb[norm], P, size, name="depthwise_backward")
        elif kind == "pool":
            c = entry[1]
            P, size = 4 * P, 2 * size
            k.pool_backward[(cdiv(P, 32),)](dy, other, P, size, C=c, CP=next_power_of_2(c), BP=32)
            dy, other = other, dy
        else:
            _, before, c, matrix, norm = entry
            cp = next_power_of_2(c)
            t, _ = kept
            grid = (min(GRID, cdiv(P, BM)),)
            k.norm_silu_sums[grid](t, dy, L.sums[norm], L.bsums[norm], L.wb[norm], P, size, C=c, CP=cp, BM=BM, POOLED=False)
            if kind == "stem":
                k.stem_backward[grid](images, t, dy, L.dK[L.k_slices[matrix]], L.sums[norm], L.bsums[norm], L.wb[norm], P,
                                      size, C=c, CP=cp, BM=BM)
            else:
                k.transition_backward[grid](
                    x, t, dy, other, L.kernel(matrix), L.dK[L.k_slices[matrix]], L.sums[norm], L.bsums[norm], L.wb[norm], P,
                    A=before, AP=next_power_of_2(before), C=c, CP=cp, BM=BM)
                dy, other = other, dy


def train_step(layers, maps, images, n, size, labels, targets, loss, smoothing, counts, step_in_epoch, lr, sgd_lr=0.1):
    """One step: forward, backward, update. images (n, size, size, 3); counts: a tensor that is filled here once."""
    L = layers
    L.acc.zero_()
    trail, pixels = forward(L, maps, images, n, size, False)
    k.head[(1,)](maps.features, L.cls, L.dcls, labels, targets if targets is not None else maps.logp, maps.df, loss, n,
                 smoothing, C=L.width, HP=max(16, next_power_of_2(L.width // 2)), BN=128, SOFT=targets is not None)
    backward(L, maps, images, trail)
    L.write_kernels(False, lr, sgd_lr)
    k.update_norms[(len(L.norms),)](L.channels, counts, L.sums, L.bsums, L.wb, L.wb_M, L.table, L.step, sgd_lr)
    k.update_classifier[(1,)](L.cls, L.dcls, L.cls_M, L.table, L.step, step_in_epoch, sgd_lr)


def pixel_counts(layers, n, size, device):
    counts = []
    for entry in layers.plan:
        if entry[0] == "pool":
            size //= 2
        elif entry[0] != "pool":
            counts.append(n * size * size)
    return torch.tensor(counts, dtype=torch.float32, device=device)
