"""One step of kernels.py against train.py's in float64: python check.py [network] [device]"""
import os
if os.environ.get("TRITON_INTERPRET"): import interp
import copy, sys
import torch, torch.nn.functional as F
import model, train, engine

name = sys.argv[1] if len(sys.argv) > 1 else "gated32"
device = sys.argv[2] if len(sys.argv) > 2 else "cpu"
n, size = (128, 32) if device == "cuda" else (4, 16)
if len(sys.argv) > 3: size = int(sys.argv[3])
if len(sys.argv) > 4: n = int(sys.argv[4])


def run(soft):
    torch.manual_seed(0)
    network = model.build_network(name).train()
    for m in network.modules():
        if isinstance(m, model.FlipConv2d) and m.gain is not None:
            m.gain.data.uniform_(-1.5, 1.5)
        if isinstance(m, model.FlipBatchNorm2d):
            m.weight.data.uniform_(0.5, 2); m.bias.data.normal_()
    exact = copy.deepcopy(network).double().to(device)
    eager = copy.deepcopy(network).to(device)
    layers = engine.Layers(network, device)
    images = torch.randn(n, size, size, 3, device=device)
    labels = torch.randint(0, 10, (n,), device=device)
    targets = torch.randn(n, 10, device=device).log_softmax(1)
    padded = torch.full((n, 16), -1e30, device=device); padded[:, :10] = targets
    layers.table = torch.tensor([0.7, 0.7], device=device)
    maps = engine.Maps(layers, n, size, True)
    loss = torch.zeros(1, device=device)
    epoch_step = torch.zeros(1, dtype=torch.int32, device=device)
    before = copy.deepcopy(network)
    args = (layers, maps, images, n, size, labels, padded if soft else None, loss, 0.1, engine.pixel_counts(layers, n, size, device), epoch_step, 0.03)
    engine.train_step(*args)
    dK = layers.dK.clone()
    layers.save()

    def reference(net, dtype, autocast):
        opt = train.build_optimizers(net, train.RECIPES["best"])
        for o in opt:
            for g in o.param_groups: g["lr"] *= 0.7
        x = images.to(next(net.parameters()).device, dtype).permute(0, 3, 1, 2)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            f = net.features(x)
            a, b = f.mean(dim=(2, 3), dtype=torch.promote_types(dtype, torch.float32)).chunk(2, dim=1)
            logp = F.log_softmax(net.classifier(a + b).to(torch.promote_types(dtype, torch.float32)), dim=1)
            if soft: l = F.cross_entropy(logp, targets.to(logp.device, logp.dtype).exp())
            else: l = F.cross_entropy(logp, labels.to(logp.device), label_smoothing=0.1)
        net.zero_grad(); l.backward()
        grads = [p.grad.double().cpu().clone() for p in net.parameters()]
        for o in opt: o.step()
        plain = F.cross_entropy(logp.double().cpu(), targets.double().cpu().exp() if soft else labels.cpu().long(), reduction="sum")
        return grads, plain.item()
    grads, l = reference(exact, torch.float64, False)
    grads16, l16 = reference(eager, torch.float32, True)
    # gradients from the kernels' accumulators, through their layout
    mine = {}
    for (layer, kind, cp, k_rows), s, (w_at, g_at, k_at, rows, columns, stride, kind2, _) in zip(layers.matrices, layers.k_slices, layers.meta.tolist()):
        d = dK[s].view(k_rows, cp).double().cpu()
        kk = torch.arange(columns)
        partner = (kk + columns // 2) % columns if kind == 0 else 3 * (kk // 3) + 2 - kk % 3
        g = d[:columns, :rows].T + d[partner, rows:2 * rows].T
        mine[layer.weight] = g
    old = dict(zip(network.parameters(), before.parameters()))
    worst = worst16 = 0
    for (pname, p), ge, g16 in zip(network.named_parameters(), grads, grads16):
        if p in mine:
            g = mine[p]
            layer = next(l for l, *_ in layers.matrices if l.weight is p)
            if layer.gain is not None:
                g = g * old[layer.gain].double()
            e, e16 = ((g - ge).norm() / ge.norm()).item(), ((g16 - ge).norm() / ge.norm()).item()
            worst, worst16 = max(worst, e), max(worst16, e16)
            if e > 2 * e16 + 2e-3: print("  gradient", pname, f"{e:.2e} {e16:.2e}")
    print(f"{name} size {size} soft {soft}: loss {loss.item():.4f}, float64 {l:.4f}, bfloat16 {l16:.4f}; gradients {worst:.1e}, bfloat16 autocast {worst16:.1e}")
    # after the update
    kind_errors = {}
    for (pname, p), q, q16 in zip(network.state_dict().items(), exact.state_dict().values(), eager.state_dict().values()):
        q = q.double().cpu(); p0 = before.state_dict()[pname].double()
        if not q.is_floating_point() or "tracked" in pname: continue
        change = (q - p0).norm().item() + 1e-12
        e, e16 = (p.double().cpu() - q).norm().item() / change, (q16.double().cpu() - q).norm().item() / change
        if e > 2 * e16 + 0.02: print("  update", pname, f"{e:.2e} {e16:.2e}")
        key = pname.rsplit(".", 1)[1]
        a = kind_errors.setdefault(key, [0, 0]); a[0] = max(a[0], e); a[1] = max(a[1], e16)
    print("  relative errors of the changes, and of bfloat16 autocast:", {key: f"{a:.1e} {b:.1e}" for key, (a, b) in kind_errors.items()})
    # kernels and inference after the update
    for (layer, kind, cp, k_rows), s in zip(layers.matrices, layers.k_slices):
        K = layers.K32[s].view(k_rows, cp).cpu()
        full = layer.kernel().detach()
        want = full.flatten(1).T
        assert torch.allclose(K[:want.shape[0], :want.shape[1]], want, atol=1e-5), "kernel"
        assert K.abs().sum().isclose(want.abs().sum(), rtol=1e-4)
    network.eval()
    emaps = engine.Maps(layers, n, size, False)
    engine.forward(layers, emaps, images, n, size, True)
    out = torch.zeros(n, 16, device=device)
    engine.predict(layers, emaps, n, out)
    with torch.no_grad(): want = network.float().cpu()(images.cpu().permute(0, 3, 1, 2))
    print("  inference: largest error of a probability", f"{(out[:, :10].cpu().exp() - want.exp()).abs().max():.1e}")


run(False); run(True)
