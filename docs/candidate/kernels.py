"""Triton kernels for the gated networks. Maps are (P, C): one row per pixel, in bfloat16 or float32; a channel
count C is padded to CP, a power of 2, in registers and in the kernels of layers. Statistics have rows of 64."""

import triton
import triton.language as tl

RUNTIME = ["P", "H", "N"]


@triton.jit
def norm_terms(sums, running, wb, c, P, C: tl.constexpr, EVAL: tl.constexpr):
    """Scale, shift, mean, 1 / standard deviation and variance of each channel; the halves share them."""
    live = c < C
    other = (c + C // 2) % C
    if EVAL:
        mean = tl.load(running + c, mask=live, other=0.0)
        var = tl.load(running + 64 + c, mask=live, other=1.0)
    else:
        n = 2.0 * P
        mean = (tl.load(sums + c, mask=live, other=0.0) + tl.load(sums + other, mask=live, other=0.0)) / n
        square = (tl.load(sums + 64 + c, mask=live, other=0.0) + tl.load(sums + 64 + other, mask=live, other=0.0)) / n
        var = tl.maximum(square - mean * mean, 0.0)
    invstd = 1.0 / tl.sqrt(var + 1e-5)
    scale = tl.load(wb + c, mask=live, other=0.0) * invstd
    shift = tl.load(wb + 64 + c, mask=live, other=0.0) - mean * scale
    return scale, shift, mean, invstd, var


@triton.jit
def update_running(running, mean, var, c, P, C: tl.constexpr):
    n = 2.0 * P
    live = c < C
    old_mean, old_var = tl.load(running + c, mask=live), tl.load(running + 64 + c, mask=live)
    tl.store(running + c, old_mean + 0.1 * (mean - old_mean), mask=live)
    tl.store(running + 64 + c, old_var + 0.1 * (var * n / (n - 1.0) - old_var), mask=live)


@triton.jit
def backward_terms(bsums, scale, invstd, c, P, C: tl.constexpr):
    """a and b, so that the gradient before a norm is scale * dz - a - b * (t - mean)."""
    live = c < C
    other = (c + C // 2) % C
    n = 2.0 * P
    s = tl.load(bsums + c, mask=live, other=0.0) + tl.load(bsums + other, mask=live, other=0.0)
    d = tl.load(bsums + 64 + c, mask=live, other=0.0) + tl.load(bsums + 64 + other, mask=live, other=0.0)
    return scale * s / n, scale * d * invstd * invstd / n


@triton.jit
def silu_slope(z):
    s = tl.sigmoid(z)
    return s * (1.0 + z * (1.0 - s))


# --- the batch ------------------------------------------------------------------------------------

@triton.jit(do_not_specialize=RUNTIME)
def make_batch(images, labels, order, corners, step, out, out_labels, N, B: tl.constexpr, PAD: tl.constexpr,
               M0, M1, M2, S0, S1, S2):
    """Crop and normalise batch number `step`: one program per image; corners are (2, number of samples)."""
    n = tl.program_id(0)
    at = tl.load(step) * B + n
    source = tl.load(order + at).to(tl.int64)
    row, column = tl.load(corners + 2 * at) - PAD, tl.load(corners + 2 * at + 1) - PAD
    i = tl.arange(0, 4096)
    c, w, h = i % 3, (i // 3) % 32, i // 96
    live = i < 3072
    hh, ww = h + row, w + column
    inside = live & (hh >= 0) & (hh < 32) & (ww >= 0) & (ww < 32)
    value = tl.load(images + source * 3072 + (hh * 32 + ww) * 3 + c, mask=inside, other=0).to(tl.float32)
    mean = tl.where(c == 0, M0, tl.where(c == 1, M1, M2))
    std = tl.where(c == 0, S0, tl.where(c == 1, S1, S2))
    tl.store(out + n * 3072 + i, (value - mean) / std, mask=live)
    tl.store(out_labels + n, tl.load(labels + source))


# --- the stem -------------------------------------------------------------------------------------

@triton.jit
def patches(img, p, P, H):
    """(pixels, 32): the 27 inputs of a 3x3 layer of 3 channels, in the order (channel, row, column)."""
    k = tl.arange(0, 32)
    channel, dh, dw = k // 9, (k % 9) // 3 - 1, k % 3 - 1
    h, w = ((p // H) % H)[:, None] + dh[None, :], (p % H)[:, None] + dw[None, :]
    inside = (h >= 0) & (h < H) & (w >= 0) & (w < H) & (p < P)[:, None] & (k < 27)[None, :]
    at = (p[:, None] + dh[None, :] * H + dw[None, :]) * 3 + channel[None, :]
    return tl.load(img + at, mask=inside, other=0.0).to(tl.bfloat16)


@triton.jit(do_not_specialize=RUNTIME)
def stem_forward(img, K, t, sums, P, H, C: tl.constexpr, CP: tl.constexpr, BM: tl.constexpr, EVAL: tl.constexpr):
    c = tl.arange(0, CP)
    k = tl.arange(0, 32)
    kernel = tl.load(K + k[:, None] * CP + c[None, :])
    s1 = tl.zeros([CP], tl.float32)
    s2 = tl.zeros([CP], tl.float32)
    for start in range(tl.program_id(0) * BM, P, tl.num_programs(0) * BM):
        p = start + tl.arange(0, BM)
        out = tl.dot(patches(img, p, P, H), kernel)
        tl.store(t + p[:, None] * C + c[None, :], out, mask=(p < P)[:, None] & (c < C)[None, :])
        s1 += tl.sum(out, 0)
        s2 += tl.sum(out * out, 0)
    if not EVAL:
        tl.atomic_add(sums + c, s1, mask=c < C)
        tl.atomic_add(sums + 64 + c, s2, mask=c < C)


@triton.jit(do_not_specialize=RUNTIME)
def stem_backward(img, t, dy, dK, sums, bsums, wb, P, H, C: tl.constexpr, CP: tl.constexpr, BM: tl.constexpr):
    c = tl.arange(0, CP)
    k = tl.arange(0, 32)
    scale, shift, mean, invstd, _ = norm_terms(sums, sums, wb, c, P, C, False)
    a, b = backward_terms(bsums, scale, invstd, c, P, C)
    total = tl.zeros([32, CP], tl.float32)
    for start in range(tl.program_id(0) * BM, P, tl.num_programs(0) * BM):
        p = start + tl.arange(0, BM)
        live = (p < P)[:, None] & (c < C)[None, :]
        at = p[:, None] * C + c[None, :]
        value = tl.load(t + at, mask=live, other=0.0).to(tl.float32)
        dz = tl.load(dy + at, mask=live, other=0.0).to(tl.float32) * silu_slope(value * scale[None, :] + shift[None, :])
        d = tl.where(live, scale[None, :] * dz - a[None, :] - b[None, :] * (value - mean[None, :]), 0.0)
        total = tl.dot(tl.trans(patches(img, p, P, H)), d.to(tl.bfloat16), total)
    tl.atomic_add(dK + k[:, None] * CP + c[None, :], total)


# --- batch norm and SiLU --------------------------------------------------------------------------

@triton.jit(do_not_specialize=RUNTIME)
def norm_silu_forward(t, y, sums, running, wb, P, C: tl.constexpr, CP: tl.constexpr, BM: tl.constexpr,
                      EVAL: tl.constexpr):
    c = tl.arange(0, CP)
    scale, shift, mean, _, var = norm_terms(sums, running, wb, c, P, C, EVAL)
    if not EVAL:
        if tl.program_id(0) == 0:
            update_running(running, mean, var, c, P, C)
    p = tl.program_id(0) * BM + tl.arange(0, BM)
    live = (p < P)[:, None] & (c < C)[None, :]
    at = p[:, None] * C + c[None, :]
    z = tl.load(t + at, mask=live, other=0.0).to(tl.float32) * scale[None, :] + shift[None, :]
    tl.store(y + at, z * tl.sigmoid(z), mask=live)


@triton.jit(do_not_specialize=RUNTIME)
def norm_silu_sums(t, dy, sums, bsums, wb, P, H, C: tl.constexpr, CP: tl.constexpr, BM: tl.constexpr,
                   POOLED: tl.constexpr):
    """Sums of dz and of dz * (t - mean); with POOLED, dy is (N, 64), the gradient of the mean over the map."""
    c = tl.arange(0, CP)
    scale, shift, mean, _, _ = norm_terms(sums, sums, wb, c, P, C, False)
    s1 = tl.zeros([CP], tl.float32)
    s2 = tl.zeros([CP], tl.float32)
    for start in range(tl.program_id(0) * BM, P, tl.num_programs(0) * BM):
        p = start + tl.arange(0, BM)
        live = (p < P)[:, None] & (c < C)[None, :]
        value = tl.load(t + p[:, None] * C + c[None, :], mask=live, other=0.0).to(tl.float32)
        if POOLED:
            grad = tl.load(dy + (p // (H * H))[:, None] * 64 + c[None, :], mask=live, other=0.0) / (H * H)
        else:
            grad = tl.load(dy + p[:, None] * C + c[None, :], mask=live, other=0.0).to(tl.float32)
        dz = grad * silu_slope(value * scale[None, :] + shift[None, :])
        s1 += tl.sum(dz, 0)
        s2 += tl.sum(dz * (value - mean[None, :]), 0)
    tl.atomic_add(bsums + c, s1, mask=c < C)
    tl.atomic_add(bsums + 64 + c, s2, mask=c < C)


@triton.jit(do_not_specialize=RUNTIME)
def statistics(t, sums, P, C: tl.constexpr, CP: tl.constexpr, BM: tl.constexpr):
    c = tl.arange(0, CP)
    s1 = tl.zeros([CP], tl.float32)
    s2 = tl.zeros([CP], tl.float32)
    for start in range(tl.program_id(0) * BM, P, tl.num_programs(0) * BM):
        p = start + tl.arange(0, BM)
        live = (p < P)[:, None] & (c < C)[None, :]
        value = tl.load(t + p[:, None] * C + c[None, :], mask=live, other=0.0).to(tl.float32)
        s1 += tl.sum(value, 0)
        s2 += tl.sum(value * value, 0)
    tl.atomic_add(sums + c, s1, mask=c < C)
    tl.atomic_add(sums + 64 + c, s2, mask=c < C)


# --- a gated block --------------------------------------------------------------------------------

@triton.jit(do_not_specialize=RUNTIME)
def depthwise_forward(x, taps, t, sums, P, H, C: tl.constexpr, CP: tl.constexpr, BP: tl.constexpr, EVAL: tl.constexpr):
    c = tl.arange(0, CP)
    s1 = tl.zeros([BP, CP], tl.float32)
    s2 = tl.zeros([BP, CP], tl.float32)
    for start in range(tl.program_id(0) * BP, P, tl.num_programs(0) * BP):
        p = start + tl.arange(0, BP)
        h, w = (p // H) % H, p % H
        out = tl.zeros([BP, CP], tl.float32)
        for i in tl.static_range(9):
            dh = i // 3 - 1
            dw = i % 3 - 1
            inside = (h + dh >= 0) & (h + dh < H) & (w + dw >= 0) & (w + dw < H) & (p < P)
            value = tl.load(x + (p + dh * H + dw)[:, None] * C + c[None, :], mask=inside[:, None] & (c < C)[None, :],
                            other=0.0).to(tl.float32)
            out += value * tl.load(taps + i * CP + c)[None, :]
        tl.store(t + p[:, None] * C + c[None, :], out, mask=(p < P)[:, None] & (c < C)[None, :])
        s1 += out
        s2 += out * out
    if not EVAL:
        tl.atomic_add(sums + c, tl.sum(s1, 0), mask=c < C)
        tl.atomic_add(sums + 64 + c, tl.sum(s2, 0), mask=c < C)


@triton.jit(do_not_specialize=RUNTIME)
def block_forward(x, t, y, sums, running, wb, Kv, Kg, Kl, P, C: tl.constexpr, CP: tl.constexpr, BM: tl.constexpr,
                  EVAL: tl.constexpr):
    c = tl.arange(0, CP)
    scale, shift, mean, _, var = norm_terms(sums, running, wb, c, P, C, EVAL)
    if not EVAL:
        if tl.program_id(0) == 0:
            update_running(running, mean, var, c, P, C)
    square = c[:, None] * CP + c[None, :]
    p = tl.program_id(0) * BM + tl.arange(0, BM)
    live = (p < P)[:, None] & (c < C)[None, :]
    at = p[:, None] * C + c[None, :]
    z = tl.load(t + at, mask=live, other=0.0).to(tl.float32) * scale[None, :] + shift[None, :]
    z = tl.minimum(tl.maximum(z, -4.0), 4.0).to(tl.bfloat16)
    values = tl.dot(z, tl.load(Kv + square))
    gates = tl.dot(z, tl.load(Kg + square))
    hidden = (values * gates * tl.sigmoid(gates)).to(tl.bfloat16)
    out = tl.dot(hidden, tl.load(Kl + square))
    tl.store(y + at, tl.load(x + at, mask=live, other=0.0).to(tl.float32) + out, mask=live)


@triton.jit(do_not_specialize=RUNTIME)
def block_backward(t, dy, dz, sums, bsums, wb, Kv, Kg, Kl, dKv, dKg, dKl, P, C: tl.constexpr, CP: tl.constexpr,
                   BM: tl.constexpr):
    c = tl.arange(0, CP)
    scale, shift, mean, _, _ = norm_terms(sums, sums, wb, c, P, C, False)
    square = c[:, None] * CP + c[None, :]
    kv, kg, kl = tl.load(Kv + square), tl.load(Kg + square), tl.load(Kl + square)
    tv = tl.zeros([CP, CP], tl.float32)
    tg = tl.zeros([CP, CP], tl.float32)
    to = tl.zeros([CP, CP], tl.float32)
    s1 = tl.zeros([CP], tl.float32)
    s2 = tl.zeros([CP], tl.float32)
    for start in range(tl.program_id(0) * BM, P, tl.num_programs(0) * BM):
        p = start + tl.arange(0, BM)
        live = (p < P)[:, None] & (c < C)[None, :]
        at = p[:, None] * C + c[None, :]
        value = tl.load(t + at, mask=live, other=0.0).to(tl.float32)
        grad = tl.load(dy + at, mask=live, other=0.0).to(tl.bfloat16)
        raw = value * scale[None, :] + shift[None, :]
        z = tl.minimum(tl.maximum(raw, -4.0), 4.0).to(tl.bfloat16)
        values = tl.dot(z, kv)
        gates = tl.dot(z, kg)
        dh = tl.dot(grad, tl.trans(kl))
        s = tl.sigmoid(gates)
        silu = gates * s
        hidden = (values * silu).to(tl.bfloat16)
        dv = (dh * silu).to(tl.bfloat16)
        dg = (dh * values * (s + silu * (1.0 - s))).to(tl.bfloat16)
        to = tl.dot(tl.trans(hidden), grad, to)
        tv = tl.dot(tl.trans(z), dv, tv)
        tg = tl.dot(tl.trans(z), dg, tg)
        back = tl.dot(dv, tl.trans(kv))
        back = tl.dot(dg, tl.trans(kg), back)
        back = tl.where((tl.abs(raw) < 4.0) & live, back, 0.0)
        tl.store(dz + at, back, mask=live)
        s1 += tl.sum(back, 0)
        s2 += tl.sum(back * (value - mean[None, :]), 0)
    tl.atomic_add(dKv + square, tv)
    tl.atomic_add(dKg + square, tg)
    tl.atomic_add(dKl + square, to)
    tl.atomic_add(bsums + c, s1, mask=c < C)
    tl.atomic_add(bsums + 64 + c, s2, mask=c < C)


@triton.jit(do_not_specialize=RUNTIME)
def depthwise_backward(x, t, dz, dy, dx, taps, dtaps, sums, bsums, wb, P, H, C: tl.constexpr, CP: tl.constexpr,
                       BP: tl.constexpr):
    """dx = dy + the gradient through norm and depthwise layer; dx may be dy."""
    c = tl.arange(0, CP)
    scale, shift, mean, invstd, _ = norm_terms(sums, sums, wb, c, P, C, False)
    a, b = backward_terms(bsums, scale, invstd, c, P, C)
    g0 = tl.zeros([BP, CP], tl.float32)
    g1 = tl.zeros([BP, CP], tl.float32)
    g2 = tl.zeros([BP, CP], tl.float32)
    g3 = tl.zeros([BP, CP], tl.float32)
    g4 = tl.zeros([BP, CP], tl.float32)
    g5 = tl.zeros([BP, CP], tl.float32)
    g6 = tl.zeros([BP, CP], tl.float32)
    g7 = tl.zeros([BP, CP], tl.float32)
    g8 = tl.zeros([BP, CP], tl.float32)
    for start in range(tl.program_id(0) * BP, P, tl.num_programs(0) * BP):
        p = start + tl.arange(0, BP)
        h, w = (p // H) % H, p % H
        live = (p < P)[:, None] & (c < C)[None, :]
        at = p[:, None] * C + c[None, :]
        here = tl.load(x + at, mask=live, other=0.0).to(tl.float32)
        out = tl.load(dy + at, mask=live, other=0.0).to(tl.float32)
        for i in tl.static_range(9):
            dh = 1 - i // 3
            dw = 1 - i % 3
            inside = ((h + dh >= 0) & (h + dh < H) & (w + dw >= 0) & (w + dw < H))[:, None] & live
            near = at + (dh * H + dw) * C
            value = tl.load(t + near, mask=inside, other=0.0).to(tl.float32)
            d = scale[None, :] * tl.load(dz + near, mask=inside, other=0.0).to(tl.float32)
            d = tl.where(inside, d - a[None, :] - b[None, :] * (value - mean[None, :]), 0.0)
            out += d * tl.load(taps + i * CP + c)[None, :]
            d = d * here
            if i == 0:
                g0 += d
            elif i == 1:
                g1 += d
            elif i == 2:
                g2 += d
            elif i == 3:
                g3 += d
            elif i == 4:
                g4 += d
            elif i == 5:
                g5 += d
            elif i == 6:
                g6 += d
            elif i == 7:
                g7 += d
            else:
                g8 += d
        tl.store(dx + at, out, mask=live)
    tl.atomic_add(dtaps + c, tl.sum(g0, 0))
    tl.atomic_add(dtaps + CP + c, tl.sum(g1, 0))
    tl.atomic_add(dtaps + 2 * CP + c, tl.sum(g2, 0))
    tl.atomic_add(dtaps + 3 * CP + c, tl.sum(g3, 0))
    tl.atomic_add(dtaps + 4 * CP + c, tl.sum(g4, 0))
    tl.atomic_add(dtaps + 5 * CP + c, tl.sum(g5, 0))
    tl.atomic_add(dtaps + 6 * CP + c, tl.sum(g6, 0))
    tl.atomic_add(dtaps + 7 * CP + c, tl.sum(g7, 0))
    tl.atomic_add(dtaps + 8 * CP + c, tl.sum(g8, 0))


# --- between stages -------------------------------------------------------------------------------

@triton.jit(do_not_specialize=RUNTIME)
def pool_forward(x, y, P, H, C: tl.constexpr, CP: tl.constexpr, BP: tl.constexpr):
    """Means of overlapping 4x4 windows, stride 2; P and H are of the output."""
    c = tl.arange(0, CP)
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    live = (p < P)[:, None] & (c < C)[None, :]
    h, w, n = 2 * ((p // H) % H), 2 * (p % H), p // (H * H)
    total = tl.zeros([BP, CP], tl.float32)
    for i in tl.static_range(16):
        hh, ww = h + (i // 4 - 1), w + (i % 4 - 1)
        inside = (hh >= 0) & (hh < 2 * H) & (ww >= 0) & (ww < 2 * H)
        total += tl.load(x + ((n * 2 * H + hh) * 2 * H + ww)[:, None] * C + c[None, :], mask=inside[:, None] & live,
                         other=0.0).to(tl.float32)
    tl.store(y + p[:, None] * C + c[None, :], total / 16, mask=live)


@triton.jit(do_not_specialize=RUNTIME)
def pool_backward(dy, dx, P, H, C: tl.constexpr, CP: tl.constexpr, BP: tl.constexpr):
    """P and H are of dx, the larger map."""
    c = tl.arange(0, CP)
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    live = (p < P)[:, None] & (c < C)[None, :]
    h, w, n = ((p // H) % H + 1) // 2, (p % H + 1) // 2, p // (H * H)
    half = H // 2
    total = tl.zeros([BP, CP], tl.float32)
    for i in tl.static_range(4):
        hh, ww = h - i // 2, w - i % 2
        inside = (hh >= 0) & (hh < half) & (ww >= 0) & (ww < half)
        total += tl.load(dy + ((n * half + hh) * half + ww)[:, None] * C + c[None, :], mask=inside[:, None] & live,
                         other=0.0).to(tl.float32)
    tl.store(dx + p[:, None] * C + c[None, :], total / 16, mask=live)


@triton.jit(do_not_specialize=RUNTIME)
def transition_forward(x, K, t, sums, P, A: tl.constexpr, AP: tl.constexpr, C: tl.constexpr, CP: tl.constexpr,
                       BM: tl.constexpr, EVAL: tl.constexpr):
    """t (P, C) = x (P, A) @ K, and its statistics."""
    a, c = tl.arange(0, AP), tl.arange(0, CP)
    kernel = tl.load(K + a[:, None] * CP + c[None, :])
    s1 = tl.zeros([CP], tl.float32)
    s2 = tl.zeros([CP], tl.float32)
    for start in range(tl.program_id(0) * BM, P, tl.num_programs(0) * BM):
        p = start + tl.arange(0, BM)
        rows = tl.load(x + p[:, None] * A + a[None, :], mask=(p < P)[:, None] & (a < A)[None, :], other=0.0)
        out = tl.dot(rows.to(tl.bfloat16), kernel)
        tl.store(t + p[:, None] * C + c[None, :], out, mask=(p < P)[:, None] & (c < C)[None, :])
        s1 += tl.sum(out, 0)
        s2 += tl.sum(out * out, 0)
    if not EVAL:
        tl.atomic_add(sums + c, s1, mask=c < C)
        tl.atomic_add(sums + 64 + c, s2, mask=c < C)


@triton.jit(do_not_specialize=RUNTIME)
def transition_backward(x, t, dy, dx, K, dK, sums, bsums, wb, P, A: tl.constexpr, AP: tl.constexpr, C: tl.constexpr,
                        CP: tl.constexpr, BM: tl.constexpr):
    a_, c = tl.arange(0, AP), tl.arange(0, CP)
    scale, shift, mean, invstd, _ = norm_terms(sums, sums, wb, c, P, C, False)
    a, b = backward_terms(bsums, scale, invstd, c, P, C)
    kernel = tl.load(K + a_[:, None] * CP + c[None, :])
    total = tl.zeros([AP, CP], tl.float32)
    for start in range(tl.program_id(0) * BM, P, tl.num_programs(0) * BM):
        p = start + tl.arange(0, BM)
        live = (p < P)[:, None] & (c < C)[None, :]
        at = p[:, None] * C + c[None, :]
        value = tl.load(t + at, mask=live, other=0.0).to(tl.float32)
        dz = tl.load(dy + at, mask=live, other=0.0).to(tl.float32) * silu_slope(value * scale[None, :] + shift[None, :])
        d = tl.where(live, scale[None, :] * dz - a[None, :] - b[None, :] * (value - mean[None, :]), 0.0)
        d = d.to(tl.bfloat16)
        mask = (p < P)[:, None] & (a_ < A)[None, :]
        rows = tl.load(x + p[:, None] * A + a_[None, :], mask=mask, other=0.0).to(tl.bfloat16)
        total = tl.dot(tl.trans(rows), d, total)
        tl.store(dx + p[:, None] * A + a_[None, :], tl.dot(d, tl.trans(kernel)), mask=mask)
    tl.atomic_add(dK + a_[:, None] * CP + c[None, :], total)


# --- the end --------------------------------------------------------------------------------------

@triton.jit(do_not_specialize=RUNTIME)
def pooled_features(t, f, sums, running, wb, P, H, C: tl.constexpr, CP: tl.constexpr, BM: tl.constexpr,
                    EVAL: tl.constexpr):
    """f (N, 64): the mean over a map after norm and SiLU; one program per image."""
    c = tl.arange(0, CP)
    scale, shift, mean, _, var = norm_terms(sums, running, wb, c, P, C, EVAL)
    n = tl.program_id(0)
    if not EVAL:
        if n == 0:
            update_running(running, mean, var, c, P, C)
    total = tl.zeros([CP], tl.float32)
    for start in range(0, H * H, BM):
        p = start + tl.arange(0, BM)
        live = (p < H * H)[:, None] & (c < C)[None, :]
        z = tl.load(t + (n * H * H + p)[:, None] * C + c[None, :], mask=live, other=0.0).to(tl.float32)
        z = z * scale[None, :] + shift[None, :]
        total += tl.sum(tl.where(live, z * tl.sigmoid(z), 0.0), 0)
    tl.store(f + n * 64 + c, total / (H * H), mask=c < C)


@triton.jit
def logits_of(f, cls, n, N, C: tl.constexpr, HP: tl.constexpr):
    """(rows, 16) log-probabilities, the pooled features (rows, HP) and the weight (HP, 16)."""
    h, k = tl.arange(0, HP), tl.arange(0, 16)
    live = (n < N)[:, None] & (h < C // 2)[None, :]
    pooled = tl.load(f + n[:, None] * 64 + h[None, :], mask=live, other=0.0)
    pooled += tl.load(f + n[:, None] * 64 + C // 2 + h[None, :], mask=live, other=0.0)
    weight = tl.load(cls + k[None, :] * 32 + h[:, None], mask=(h < C // 2)[:, None], other=0.0)
    logits = tl.dot(pooled, weight, input_precision="ieee") + tl.load(cls + 512 + k)[None, :]
    logits = tl.where((k < 10)[None, :], logits, -1e30)
    logits = logits - tl.max(logits, 1)[:, None]
    return logits - tl.log(tl.sum(tl.exp(logits), 1))[:, None], pooled, weight


@triton.jit(do_not_specialize=RUNTIME)
def predict(f, cls, out, N, C: tl.constexpr, HP: tl.constexpr, BN: tl.constexpr):
    """out (N, 16): log-probabilities."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, 16)
    logp, _, _ = logits_of(f, cls, n, N, C, HP)
    tl.store(out + n[:, None] * 16 + k[None, :], logp, mask=(n < N)[:, None] & (k < 10)[None, :])


@triton.jit(do_not_specialize=RUNTIME)
def head(f, cls, dcls, labels, targets, df, loss, N, SMOOTHING, C: tl.constexpr, HP: tl.constexpr, BN: tl.constexpr,
         SOFT: tl.constexpr):
    """Cross-entropy with the log-probabilities in targets (SOFT) or the labels, and its gradients; one program."""
    n = tl.arange(0, BN)
    h, k = tl.arange(0, HP), tl.arange(0, 16)
    logp, pooled, weight = logits_of(f, cls, n, N, C, HP)
    live = (n < N)[:, None] & (k < 10)[None, :]
    if SOFT:
        target = tl.exp(tl.load(targets + n[:, None] * 16 + k[None, :], mask=live, other=-1e30))
        plain = target
    else:
        label = tl.load(labels + n, mask=n < N, other=0)
        plain = tl.where(label[:, None] == k[None, :], 1.0, 0.0)
        target = (1.0 - SMOOTHING) * plain + SMOOTHING / 10
    tl.atomic_add(loss, -tl.sum(tl.sum(tl.where(live, plain * logp, 0.0), 1), 0))
    d = tl.where(live, (tl.exp(logp) * tl.sum(tl.where(live, target, 0.0), 1)[:, None] - target) / N, 0.0)
    tl.store(dcls + k[:, None] * 32 + h[None, :], tl.dot(tl.trans(d), pooled, input_precision="ieee"),
             mask=(h < C // 2)[None, :])
    tl.store(dcls + 512 + k, tl.sum(d, 0))
    grad = tl.dot(d, tl.trans(weight), input_precision="ieee")
    mask = (n < N)[:, None] & (h < C // 2)[None, :]
    tl.store(df + n[:, None] * 64 + h[None, :], grad, mask=mask)
    tl.store(df + n[:, None] * 64 + C // 2 + h[None, :], grad, mask=mask)


@triton.jit(do_not_specialize=RUNTIME)
def pooled_backward(t, df, dx, sums, bsums, wb, P, H, C: tl.constexpr, CP: tl.constexpr, BM: tl.constexpr):
    c = tl.arange(0, CP)
    scale, shift, mean, invstd, _ = norm_terms(sums, sums, wb, c, P, C, False)
    a, b = backward_terms(bsums, scale, invstd, c, P, C)
    p = tl.program_id(0) * BM + tl.arange(0, BM)
    live = (p < P)[:, None] & (c < C)[None, :]
    at = p[:, None] * C + c[None, :]
    value = tl.load(t + at, mask=live, other=0.0).to(tl.float32)
    grad = tl.load(df + (p // (H * H))[:, None] * 64 + c[None, :], mask=live, other=0.0) / (H * H)
    dz = grad * silu_slope(value * scale[None, :] + shift[None, :])
    tl.store(dx + at, scale[None, :] * dz - a[None, :] - b[None, :] * (value - mean[None, :]), mask=live)


# --- the optimisers -------------------------------------------------------------------------------

@triton.jit
def write_kernel(w, gain, K32, K16, top, bottom, mask):
    value = w * gain[:, None]
    tl.store(K32 + top, value, mask=mask)
    tl.store(K32 + bottom, value, mask=mask)
    tl.store(K16 + top, value.to(tl.bfloat16), mask=mask)
    tl.store(K16 + bottom, value.to(tl.bfloat16), mask=mask)


@triton.jit
def update_matrices(meta, scales, W, M, gains, gain_M, dK, K32, K16, table, step, LR, GAIN_LR, INIT: tl.constexpr):
    """One program per layer: gradient of its filters from that of its kernel, Muon, rows of norm 1, SGD of the gains,
    and the new kernel. With INIT, only the kernel."""
    i = tl.program_id(0)
    w_at, g_at, k_at = tl.load(meta + 8 * i), tl.load(meta + 8 * i + 1), tl.load(meta + 8 * i + 2)
    rows, columns, stride = tl.load(meta + 8 * i + 3), tl.load(meta + 8 * i + 4), tl.load(meta + 8 * i + 5)
    kind = tl.load(meta + 8 * i + 6)
    r, k = tl.arange(0, 32), tl.arange(0, 64)
    mask = (r < rows)[:, None] & (k < columns)[None, :]
    partner = tl.where(kind == 0, (k + columns // 2) % columns, 3 * (k // 3) + 2 - k % 3)
    top = k_at + k[None, :] * stride + r[:, None]
    bottom = k_at + partner[None, :] * stride + rows + r[:, None]
    w = tl.load(W + w_at + r[:, None] * columns + k[None, :], mask=mask, other=0.0)
    has_gain = (r < rows) & (g_at >= 0)
    gain = tl.load(gains + g_at + r, mask=has_gain, other=1.0)
    if not INIT:
        factor = tl.load(table + tl.load(step))
        g = tl.load(dK + top, mask=mask, other=0.0) + tl.load(dK + bottom, mask=mask, other=0.0)
        dgain = tl.sum(w * g, 1)
        g = g * gain[:, None]
        momentum = tl.load(M + w_at + r[:, None] * columns + k[None, :], mask=mask, other=0.0)
        momentum = momentum + 0.1 * (g - momentum)
        tl.store(M + w_at + r[:, None] * columns + k[None, :], momentum, mask=mask)
        x = (g + 0.9 * (momentum - g)).to(tl.bfloat16).to(tl.float32)
        norm = tl.maximum(tl.sqrt(tl.sum(tl.sum(x * x, 1), 0)), 1e-7)
        x = (x / norm).to(tl.bfloat16)
        for _ in tl.static_range(3):
            gram = tl.dot(x, tl.trans(x)).to(tl.bfloat16)
            poly = (-4.775 * gram.to(tl.float32) + 2.0315 * tl.dot(gram, gram)).to(tl.bfloat16)
            x = (3.4445 * x.to(tl.float32) + tl.dot(poly, x)).to(tl.bfloat16)
        w = w - LR * factor * tl.load(scales + i) * x.to(tl.float32)
        w = w / tl.maximum(tl.sqrt(tl.sum(w * w, 1)), 1e-12)[:, None]
        tl.store(W + w_at + r[:, None] * columns + k[None, :], w, mask=mask)
        gm = 0.9 * tl.load(gain_M + g_at + r, mask=has_gain, other=0.0) + dgain
        tl.store(gain_M + g_at + r, gm, mask=has_gain)
        gain = tl.where(has_gain, gain - GAIN_LR * factor * (dgain + 0.9 * gm), 1.0)
        tl.store(gains + g_at + r, gain, mask=has_gain)
    write_kernel(w, gain, K32, K16, top, bottom, mask)


@triton.jit
def update_norms(channels, counts, sums, bsums, wb, M, table, step, LR):
    """SGD with Nesterov momentum for weight and bias of each norm; one program per norm."""
    i = tl.program_id(0)
    C = tl.load(channels + i)
    n = 2.0 * tl.load(counts + i)
    c = tl.arange(0, 64)
    live = c < C
    other = (c + C // 2) % C
    sums += 128 * i
    bsums += 128 * i
    wb += 128 * i
    M += 128 * i
    rate = LR * tl.load(table + tl.load(step))
    mean = (tl.load(sums + c, mask=live, other=0.0) + tl.load(sums + other, mask=live, other=0.0)) / n
    square = (tl.load(sums + 64 + c, mask=live, other=0.0) + tl.load(sums + 64 + other, mask=live, other=0.0)) / n
    invstd = 1.0 / tl.sqrt(tl.maximum(square - mean * mean, 0.0) + 1e-5)
    db = tl.load(bsums + c, mask=live, other=0.0) + tl.load(bsums + other, mask=live, other=0.0)
    dw = (tl.load(bsums + 64 + c, mask=live, other=0.0) + tl.load(bsums + 64 + other, mask=live, other=0.0)) * invstd
    mw = 0.9 * tl.load(M + c, mask=live, other=0.0) + dw
    mb = 0.9 * tl.load(M + 64 + c, mask=live, other=0.0) + db
    tl.store(M + c, mw, mask=live)
    tl.store(M + 64 + c, mb, mask=live)
    tl.store(wb + c, tl.load(wb + c, mask=live, other=0.0) - rate * (dw + 0.9 * mw), mask=live)
    tl.store(wb + 64 + c, tl.load(wb + 64 + c, mask=live, other=0.0) - rate * (db + 0.9 * mb), mask=live)


@triton.jit
def update_classifier(cls, dcls, M, table, step, step_in_epoch, LR):
    """SGD for the linear layer, (16, 32) and (16,) in one tensor of 1024; the last kernel of a step, which it counts."""
    i = tl.arange(0, 1024)
    now = tl.load(step)
    rate = LR * tl.load(table + now)
    g = tl.load(dcls + i)
    m = 0.9 * tl.load(M + i) + g
    tl.store(M + i, m)
    tl.store(cls + i, tl.load(cls + i) - rate * (g + 0.9 * m))
    tl.debug_barrier()
    tl.store(step, now + 1)
    tl.store(step_in_epoch, tl.load(step_in_epoch) + 1)
