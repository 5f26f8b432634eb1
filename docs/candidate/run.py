"""Train several networks at a time on one GPU: python run.py PLAN.json OUT [--limit IMAGES]

PLAN: a list of jobs {name, network, seed, epochs, teachers, validate}; teachers are files or names of earlier jobs. All
jobs share the passes through the augmented set; their order and crops follow from their seeds, as in train.py.
"""
import argparse, io, json, math, mmap, os, platform, sys, tarfile, threading, time, queue
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F

import data, engine, kernels as k, model, train
from eval import accuracy_and_loss

B = 128
RECIPE = train.RECIPES["best"]


def augment_worker(images, tasks, done, slots, orders, jobs):
    """Fill slots with the two random forms of a pass, and with the order and the crops of each job."""
    torch.set_num_threads(1)
    while (task := tasks.get()) is not None:
        number, slot = task
        n = len(images)
        flipped, augmented = slots[slot]
        augmented.copy_(data.autoaugment(images, number, RECIPE.autoaugment_group_size))
        flipped.copy_(data.autoaugment(data.flip_and_rotate(images, number), -1 - number, RECIPE.autoaugment_group_size))
        for j, (seed, validate) in enumerate(jobs):
            kept = n * 9 // 10 if validate else n
            generator = torch.Generator().manual_seed(10_000 * seed + number)
            order = torch.randperm(3 * kept, generator=generator)
            row, at = orders[slot], 0
            row[j].zero_()
            row[j, :3 * kept, 0] = (order // kept * n + order % kept).int()
            for start in range(0, 3 * kept, B):
                m = min(B, 3 * kept - start)
                corners = torch.randint(0, 2 * RECIPE.crop_padding + 1, (2, m, 1), generator=generator)
                row[j, start:start + m, 1:] = corners[:, :, 0].T.int()
        done.put((number, slot))


class Graph:
    """The launches of a function, captured once; on the CPU, the function."""

    def __init__(self, fn, stream):
        self.fn, self.graph = fn, None
        if stream is None:
            return
        with torch.cuda.stream(stream):
            fn()
            stream.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                fn()

    def __call__(self):
        self.graph.replay() if self.graph else self.fn()


class Job:
    def __init__(self, spec, index, split_sizes, shared):
        self.spec, self.index, self.shared = spec, index, shared
        self.name, self.epochs, self.validate = spec["name"], spec["epochs"], spec.get("validate", False)
        self.history, self.epoch, self.done = [], 0, False
        n = split_sizes
        self.samples = 3 * (n * 9 // 10 if self.validate else n)
        self.steps = math.ceil(self.samples / B)

    def start(self, teachers):
        self.total = self.epochs * self.steps
        s, d = self.shared, self.shared.device
        self.stream = torch.cuda.Stream() if d == "cuda" else None
        torch.manual_seed(self.spec["seed"])
        self.network = model.build_network(self.spec["network"])
        L = self.layers = engine.Layers(self.network, d)
        L.table = torch.tensor([train.lr_factor((i + 0.5) / self.total, RECIPE.warmup_fraction) for i in range(self.total)] + [0.0] * 4,
                               device=d)
        self.maps = engine.Maps(L, B, 32, True)
        self.images = torch.zeros(B, 32, 32, 3, device=d)
        self.labels = torch.zeros(B, dtype=torch.int64, device=d)
        self.loss = torch.zeros(1, device=d)
        self.order = torch.zeros(self.shared.order_length, dtype=torch.int32, device=d)
        self.corners = torch.zeros(self.shared.order_length, 2, dtype=torch.int32, device=d)
        self.step_in_epoch = torch.zeros(1, dtype=torch.int32, device=d)
        self.targets = torch.full((B, 16), -1e30, device=d) if teachers else None
        self.teachers = teachers
        self.counts = {}
        state = [t.clone() for t in (*L.state, L.step)]
        mean, std = (255 * data.MEAN).tolist(), (255 * data.STD).tolist()

        def batch(teacher):
            k.make_batch[(B,)](s.images, s.labels, self.order, self.corners, self.step_in_epoch, self.images, self.labels, B,
                               B=B, PAD=RECIPE.crop_padding, M0=mean[0], M1=mean[1], M2=mean[2], S0=std[0], S1=std[1], S2=std[2])
            if teacher is not None:
                engine.forward(teacher, s.teacher_maps(self, teacher), self.images, B, 32, True)
                engine.predict(teacher, s.teacher_maps(self, teacher), B, self.targets)

        def step(size, n):
            images = self.images
            if size < 32:
                images = F.interpolate(images.permute(0, 3, 1, 2), size=(size, size), mode="bilinear", antialias=True,
                                       align_corners=False).permute(0, 2, 3, 1).contiguous()
            key = size, n
            if key not in self.counts:
                self.counts[key] = engine.pixel_counts(L, n, size, d)
            smoothing = 0.0 if teachers else RECIPE.label_smoothing
            engine.train_step(L, self.maps, images, n, size, self.labels, self.targets, self.loss, smoothing,
                              self.counts[key], self.step_in_epoch, RECIPE.lr)

        self.eval_maps = engine.Maps(L, s.eval_batch, 32, False)
        self.eval_images = torch.zeros(s.eval_batch, 32, 32, 3, device=d)
        self.eval_out = torch.zeros(s.eval_batch, 16, device=d)

        def evaluate():
            engine.forward(L, self.eval_maps, self.eval_images, s.eval_batch, 32, True)
            engine.predict(L, self.eval_maps, s.eval_batch, self.eval_out)

        self.batch_graphs = [Graph(lambda t=t: batch(t), self.stream) for t in teachers or [None]]
        last = self.samples - (self.steps - 1) * B
        for size in (16, 24, 32):  # tensors made while capturing would stay in the pool of the graph
            for n in {B, last}:
                self.counts[size, n] = engine.pixel_counts(L, n, size, d)
        self.step_graphs = {(size, n): Graph(lambda size=size, n=n: step(size, n), self.stream)
                            for size in (16, 24, 32) for n in {B, last}}
        self.eval_graph = Graph(evaluate, self.stream)
        if self.stream:
            self.stream.synchronize()
        for t, saved in zip((*L.state, L.step), state, strict=True):
            t.copy_(saved)
        L.write_kernels(init=True)
        self.step_in_epoch.zero_()
        self.last = last
        self.started = time.perf_counter()

    def on_stream(self):
        return torch.cuda.stream(self.stream) if self.stream else torch.no_grad()

    def begin_epoch(self, row):
        with self.on_stream():
            self.order.copy_(row[:, 0])
            self.corners.copy_(row[:, 1:])
            self.step_in_epoch.zero_()
            self.loss.zero_()
        self.epoch_start = time.perf_counter()

    def one_step(self, i):
        at = self.epoch * self.steps + i
        progress = (at + 0.5) / self.total
        share = RECIPE.low_resolution_share
        size = 32 if progress >= share else 16 if progress < share / 2 else 24
        with self.on_stream():
            self.batch_graphs[at % len(self.batch_graphs)]()
            self.step_graphs[size, self.last if i == self.steps - 1 else B]()

    def infer(self, images):
        out = []
        with self.on_stream():
            for chunk in images.split(self.shared.eval_batch):
                self.eval_images[:len(chunk)] = chunk
                self.eval_graph()
                out.append(self.eval_out[:len(chunk), :10].clone())
            return torch.cat(out)

    def end_epoch(self):
        s = self.shared
        sample, test = (s.train_sample, s.held_out if self.validate else s.test)
        prefix = "val" if self.validate else "test"
        train_logp = self.infer(sample[0])
        test_logp = self.test_logp = self.infer(test[0])
        with self.on_stream():
            batch_loss = self.loss.item() / self.samples
            train_accuracy, train_loss = accuracy_and_loss(train_logp, sample[1])
            accuracy, loss = accuracy_and_loss(test_logp, test[1])
        self.epoch += 1
        self.history.append({
            "epoch": self.epoch, "train_loss": train_loss, "train_accuracy": train_accuracy, f"{prefix}_loss": loss,
            f"{prefix}_accuracy": accuracy, "batch_loss": batch_loss,
            "lr": RECIPE.lr * train.lr_factor((self.epoch * self.steps - 0.5) / self.total, RECIPE.warmup_fraction),
            "seconds": time.perf_counter() - self.epoch_start})
        if not math.isfinite(batch_loss):
            self.done = True
            print(f"{self.name}: loss {batch_loss}", flush=True)
        if self.epoch == self.epochs:
            self.done = True

    def files(self):
        """metrics.csv, result.json, and weights.pkl of a finished job or the state of an unfinished one."""
        lines = [self.history[0].keys(), *[row.values() for row in self.history]]
        files = {"metrics.csv": "".join(",".join(map(str, line)) + "\n" for line in lines).encode()}
        self.layers.save()
        prefix = "val" if self.validate else "test"
        last = self.history[-1]
        smoothing = 0.0 if self.spec["teachers"] else RECIPE.label_smoothing
        import dataclasses
        settings = {"recipe": "best", **dataclasses.asdict(RECIPE), "network": self.spec["network"], "epochs": self.epochs,
                    "label_smoothing": smoothing, "seed": self.spec["seed"], "validate": self.validate,
                    "teachers": self.spec.get("teacher_names", [])}
        result = settings | {
            "parameters": model.count_parameters(self.network), "accuracy": last[f"{prefix}_accuracy"],
            "loss": last[f"{prefix}_loss"], "seconds": round(time.perf_counter() - self.started, 1),
            "device": "cuda", "threads": 1, "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "torchvision", "numpy")},
            "gpu": torch.cuda.get_device_name() if self.stream else "none", "jobs_at_a_time": self.shared.at_a_time}
        if self.validate:
            result["temperature_fit"] = train.fit_temperature(self.test_logp, (self.shared.held_out)[1])
        files["result.json"] = (json.dumps(result, indent=2) + "\n").encode()
        path = f"/tmp/{os.getpid()}.weights.pkl"
        model.save_weights(path, self.network, {
            "network": self.spec["network"], "recipe": "best", "seed": self.spec["seed"], "epochs": float(self.epochs),
            "validate": self.validate, "accuracy": last[f"{prefix}_accuracy"]})
        files["weights.pkl" if self.epoch == self.epochs else "partial.pkl"] = Path(path).read_bytes()
        if self.epoch < self.epochs:
            buffer = io.BytesIO()
            torch.save({"state": [t.cpu() for t in (*self.layers.state, self.layers.step)], "epoch": self.epoch,
                        "history": self.history}, buffer)
            files["state.pt"] = buffer.getvalue()
        return files


class Shared:
    pass


def main():
    start = time.perf_counter()
    parser = argparse.ArgumentParser()
    parser.add_argument("plan"), parser.add_argument("out", type=Path)
    parser.add_argument("--limit", type=int), parser.add_argument("--workers", type=int, default=15)
    parser.add_argument("--data-dir", default=data.DEFAULT_DATA_DIR)
    parser.add_argument("--stop-after", type=float, default=1e9, help="seconds")
    parser.add_argument("--most-epochs", type=int, default=300)
    parser.add_argument("--at-a-time", type=int, default=4)
    parser.add_argument("--mock", action="store_true", help="images of data-dir/part.npz, whatever their number")
    args = parser.parse_args()
    specs = json.load(open(args.plan))
    if args.mock:
        with np.load(Path(args.data_dir) / "part.npz") as arrays:
            train_set = data.Split(*(torch.from_numpy(arrays[n]) for n in ("images", "labels")))
        test_set = data.Split(train_set.images[-1000:], train_set.labels[-1000:])
    else:
        train_set, test_set = data.load_training_data(args.data_dir)
    if args.limit:
        train_set, test_set = (data.Split(s.images[:args.limit].clone(), s.labels[:args.limit].clone()) for s in (train_set, test_set))
    n = len(train_set.images)
    # augmentation, in forked workers that share anonymous memory; before anything touches the GPU
    context = mp.get_context("fork")
    slots_n = args.workers + 6

    def shared_tensor(*shape, dtype):
        memory = mmap.mmap(-1, math.prod(shape) * torch.empty(0, dtype=dtype).element_size())
        return torch.frombuffer(memory, dtype=dtype).view(shape)

    order_length = math.ceil(3 * n / B) * B
    slots = [shared_tensor(2, n, 32, 32, 3, dtype=torch.uint8) for _ in range(slots_n)]
    orders = [shared_tensor(len(specs), order_length, 3, dtype=torch.int32) for _ in range(slots_n)]
    tasks, done = context.Queue(), context.Queue()
    workers = [context.Process(target=augment_worker, daemon=True, args=(
        train_set.images, tasks, done, slots, orders, [(spec["seed"], spec.get("validate", False)) for spec in specs]))
        for _ in range(args.workers)]
    for w in workers:
        w.start()
    for slot in range(slots_n):
        tasks.put((slot, slot))
    print(f"{time.perf_counter() - start:.1f} s: data loaded, {len(workers)} workers started", flush=True)

    s = Shared()
    s.device = d = "cuda" if torch.cuda.is_available() else "cpu"
    s.eval_batch = 1000 if d == "cuda" else 64
    s.at_a_time = args.at_a_time
    s.order_length = order_length
    normalized = lambda split: (data.normalize(split.images.to(d)).permute(0, 2, 3, 1).contiguous(), split.labels.to(d))
    sample = min(5000, n // 2)
    s.train_sample = normalized(data.Split(train_set.images[:sample], train_set.labels[:sample]))
    s.test = normalized(test_set)
    s.held_out = normalized(data.Split(train_set.images[n * 9 // 10:], train_set.labels[n * 9 // 10:]))
    s.images = torch.zeros(3 * n, 32, 32, 3, dtype=torch.uint8, device=d)
    s.images[:n] = train_set.images.to(d)
    s.labels = train_set.labels.repeat(3).to(d)
    maps_of = {}
    def teacher_maps(job, teacher):
        key = job.name, teacher.width
        if key not in maps_of:
            maps_of[key] = engine.Maps(teacher, B, 32, False)
        return maps_of[key]
    s.teacher_maps = teacher_maps
    jobs = [Job(spec, i, n, s) for i, spec in enumerate(specs)]

    ready = {}
    finished, teacher_layers, costs = {}, {}, []

    def teachers_of(job):
        layers = []
        for t in job.spec["teachers"]:
            if t not in teacher_layers:
                network = finished[t].network if t in finished else model.load_weights(t)[0]
                teacher_layers[t] = engine.Layers(network, d)
            layers.append(teacher_layers[t])
        names = [finished[t].spec | {"recipe": "best"} if t in finished else model.load_weights(t)[1] for t in job.spec["teachers"]]
        job.spec["teacher_names"] = [model.describe_training(m) for m in names]
        return layers

    staged, taken = queue.Queue(), queue.Queue()  # a thread uploads the next pass while the GPU trains
    staging = torch.empty(2 * n, 32, 32, 3, dtype=torch.uint8, device=d)
    staging_orders = torch.empty(len(jobs), s.order_length, 3, dtype=torch.int32, device=d)

    def upload():
        stream = torch.cuda.Stream() if d == "cuda" else None
        number = 0
        while True:
            while number not in ready:
                got, slot = done.get()
                ready[got] = slot
            slot = ready.pop(number)
            with torch.cuda.stream(stream) if stream else torch.no_grad():
                staging.view(2, n, 32, 32, 3).copy_(slots[slot])
                staging_orders.copy_(orders[slot])
                if stream:
                    stream.synchronize()
            tasks.put((number + slots_n, slot))
            staged.put(number)
            taken.get()
            number += 1

    threading.Thread(target=upload, daemon=True).start()
    active, waiting, last_save, waited = [], list(jobs), time.perf_counter(), 0.0

    def save():
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
            for job in jobs:
                if job.history:
                    for name, contents in job.files().items():
                        info = tarfile.TarInfo(f"{job.name}/{name}")
                        info.size = len(contents)
                        tar.addfile(info, io.BytesIO(contents))
        model.atomic_write(args.out / "runs.tar.gz", buffer.getvalue())

    while active or waiting:
        for job in list(waiting):
            if len(active) < args.at_a_time and all(t in finished or Path(t).exists() for t in job.spec["teachers"]):
                if job.epochs is None:  # as many as the time allows, the same for all such jobs
                    automatic = [j for j in jobs if j.epochs is None]
                    others = [j for j in active + waiting if j.epochs is not None]
                    cost = sorted(costs)[len(costs) // 2] if costs else 1.0  # seconds of an epoch of one job
                    left = args.stop_after - (time.perf_counter() - start) - 15 - 3 * len(automatic)
                    left -= sum(0.7 * cost * (j.epochs - j.epoch) for j in others)
                    epochs = max(1, int(0.92 * left / (1.1 * cost * sum(j.steps for j in automatic) / max(j.steps for j in automatic))))
                    epochs = epochs // 10 * 10 if epochs > 20 else epochs
                    print(f"{time.perf_counter() - start:.1f} s: {cost:.2f} s an epoch of a job; {epochs} epochs for {[j.name for j in automatic]}", flush=True)
                    for j in automatic:
                        j.epochs = min(epochs, args.most_epochs)
                waiting.remove(job)
                t0 = time.perf_counter()
                job.start(teachers_of(job))
                active.append(job)
                print(f"{time.perf_counter() - start:.1f} s: {job.name} starts (captured in {time.perf_counter() - t0:.1f} s)", flush=True)
        t0 = time.perf_counter()
        staged.get(timeout=300)
        waited += time.perf_counter() - t0
        s.images[n:].copy_(staging)
        for job in active:
            job.begin_epoch(staging_orders[job.index])
        if d == "cuda":
            torch.cuda.synchronize()
        taken.put(0)
        t0 = time.perf_counter()
        for i in range(max(job.steps for job in active)):
            for job in active:
                if i < job.steps:
                    job.one_step(i)
        if d == "cuda":
            torch.cuda.synchronize()
        t1 = time.perf_counter()
        for job in active:
            job.end_epoch()
        if all(j.epoch > 0.3 * j.epochs for j in active):
            costs.append((time.perf_counter() - t0) / len(active))
        line = "; ".join(f"{j.name} {j.epoch}/{j.epochs} {j.history[-1]['batch_loss']:.4f} {j.history[-1]['train_accuracy']:.2f} "
                         f"{list(j.history[-1].values())[3]:.4f} {list(j.history[-1].values())[4]:.2f}" for j in active)
        print(f"{time.perf_counter() - start:.1f} s ({t1 - t0:.2f} steps, {time.perf_counter() - t1:.2f} eval, waited {waited:.1f}): {line}", flush=True)
        for job in active:
            if job.done:
                job.layers.save()
                finished[job.name] = job
        active = [job for job in active if not job.done]
        over = time.perf_counter() - start > args.stop_after
        if time.perf_counter() - last_save > 30 or over or not (active or waiting):
            save()
            last_save = time.perf_counter()
        if over:
            print("stopped: out of time", flush=True)
            break
    for w in workers:
        w.terminate()
    print(f"{time.perf_counter() - start:.1f} s: end", flush=True)


if __name__ == "__main__":
    main()
