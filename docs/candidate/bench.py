"""Compile and time the kernels of a gated network of 128 images: python bench.py compile I N | tune | step"""
import json, sys, itertools, subprocess, time
import torch, model, engine, kernels as k
from engine import *

def setting(c, size, n=128):
    P = n * size * size
    r = lambda: torch.randn(P * c, device="cuda").to(MAPS)
    cp = next_power_of_2(c)
    z = lambda *s: torch.randn(*s, device="cuda") * 0.1
    sq = lambda: z(cp * cp).to(torch.bfloat16)
    sums = z(128).abs() * 0 + P; sums[64:] = 3 * P
    d = dict(c=c, P=P, size=size, x=r(), t=r(), y=r(), dz=r(), dy=r(), taps=z(9 * cp), dtaps=z(16 * cp), sums=sums, bsums=z(128), wb=z(128), run=z(128).abs(), kv=sq(), kg=sq(), kl=sq(), a=z(cp * cp), b=z(cp * cp), o=z(cp * cp))
    return d

def call(name, d):
    g = lambda *names: [d[n] for n in names]
    if name == "depthwise_forward": launch(k.depthwise_forward, d["c"], d["P"], *g("x", "taps", "t", "sums", "P", "size"), name=name, EVAL=False)
    if name == "block_forward": launch(k.block_forward, d["c"], d["P"], *g("x", "t", "y", "sums", "run", "wb", "kv", "kg", "kl", "P"), name=name, EVAL=False)
    if name == "block_backward": launch(k.block_backward, d["c"], d["P"], *g("t", "dy", "dz", "sums", "bsums", "wb", "kv", "kg", "kl", "a", "b", "o", "P"), name=name)
    if name == "depthwise_backward": launch(k.depthwise_backward, d["c"], d["P"], *g("x", "t", "dz", "dy", "dy", "taps", "dtaps", "sums", "bsums", "wb", "P", "size"), name=name)

def timed(fn, n=20):
    for _ in range(3): fn()
    torch.cuda.synchronize()
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g):
        for _ in range(n): fn()
    g.replay(); torch.cuda.synchronize()
    a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    a.record(); g.replay(); b.record(); torch.cuda.synchronize()
    return a.elapsed_time(b) / n * 1000

SHAPES = [(64, 16), (48, 32)]
if sys.argv[1] == "compile":  # each process a part, to fill the cache of compiled kernels
    i, n = map(int, sys.argv[2:])
    settings = {shape: setting(*shape, n=2) for shape in SHAPES}
    work = [(name, shape, cfg) for name, cfgs in CANDIDATES.items() for shape in SHAPES for cfg in cfgs]
    work.sort(key=lambda w: w[0] != "depthwise_backward")
    for name, shape, cfg in work[i::n]:
        engine.CHOSEN[f"{name} {shape[0]}"] = cfg
        try: call(name, settings[shape])
        except Exception as e: print(name, shape, cfg, str(e)[-300:], flush=True)
    torch.cuda.synchronize()
elif sys.argv[1] == "network":
    name, soft = sys.argv[2], sys.argv[3] == "soft"
    net = model.build_network(name); L = Layers(net, "cuda"); M = Maps(L, 128, 32, True)
    im, lab, loss, st = torch.randn(128, 32, 32, 3, device="cuda"), torch.zeros(128, dtype=torch.int64, device="cuda"), torch.zeros(1, device="cuda"), torch.zeros(1, dtype=torch.int32, device="cuda")
    train_step(L, M, im, 128, 32, lab, M.logp if soft else None, loss, 0.1, pixel_counts(L, 128, 32, "cuda"), st, 0.0)
    E = Maps(L, 128, 32, False); forward(L, E, im, 128, 32, True); predict(L, E, 128, E.logp); torch.cuda.synchronize()
elif sys.argv[1] == "tune":
    chosen = {}
    for shape in SHAPES:
        d = setting(*shape)
        for name, cfgs in CANDIDATES.items():
            times = {}
            for cfg in cfgs:
                engine.CHOSEN[f"{name} {shape[0]}"] = cfg
                try: times[cfg] = timed(lambda: call(name, d))
                except Exception as e: print(name, cfg, str(e)[-200:]); torch.cuda.synchronize()
            best = min(times, key=times.get)
            engine.CHOSEN[f"{name} {shape[0]}"] = best
            chosen[f"{name} {shape[0]}"] = best
            print(name, shape, {str(c): round(t, 1) for c, t in times.items()}, "us", flush=True)
    for c, like in ((32, 48), (16, 48)):
        for name in CANDIDATES: chosen[f"{name} {c}"] = chosen[f"{name} {like}"]
    json.dump(chosen, open(TUNED, "w"))
else:
    for name in sys.argv[2:] or ["gated32"]:
        net = model.build_network(name); L = Layers(net, "cuda"); M = Maps(L, 128, 32, True)
        im, lab, loss, st = torch.randn(128, 32, 32, 3, device="cuda"), torch.zeros(128, dtype=torch.int64, device="cuda"), torch.zeros(1, device="cuda"), torch.zeros(1, dtype=torch.int32, device="cuda")
        L.table = torch.ones(100000, device="cuda") * 0.01
        cnt = pixel_counts(L, 128, 32, "cuda")
        for size in (32, 24, 16):
            print(name, size, "step", round(timed(lambda: train_step(L, M, im, 128, size, lab, M.logp, loss, 0.1, cnt, st, 0.0)), 1), "us", flush=True)
        E = Maps(L, 128, 32, False)
        print(name, "inference", round(timed(lambda: (forward(L, E, im, 128, 32, True), predict(L, E, 128, E.logp))), 1), "us", flush=True)
    from torch.profiler import profile, ProfilerActivity
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        for _ in range(5): train_step(L, M, im, 128, 32, lab, M.logp, loss, 0.1, cnt, st, 0.0)
        torch.cuda.synchronize()
    print(prof.key_averages().table(sort_by="cuda_time_total", row_limit=30, max_name_column_width=40)[:6000])
