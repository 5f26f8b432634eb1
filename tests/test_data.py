"""Reading, downloading, augmenting and serving the data set."""

import hashlib
import http.server
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, make_arrays, make_loader, make_split, small_arrays
from torchvision import datasets

import data
import eval
import train
from data import Split, UserError, load_split, load_training_data, normalize

# --- cifar10.npz ----------------------------------------------------------------------------------

def test_npz(dataset):
    train_split, test_split = load_training_data(dataset)
    images, labels = make_arrays(100, 1)
    assert train_split.images.shape == (200, 32, 32, 3) and train_split.images.dtype == torch.uint8
    assert np.array_equal(test_split.images, images) and np.array_equal(test_split.labels, labels)
    assert test_split.labels.dtype == torch.int64


def test_the_last_tenth_of_the_training_set_is_held_out(dataset):
    everything = load_split(dataset, "train")
    kept, held_out = load_training_data(dataset, validate=True)
    assert torch.equal(torch.cat([kept.images, held_out.images]), everything.images)
    assert torch.equal(torch.cat([kept.labels, held_out.labels]), everything.labels)
    assert len(held_out.images) == 20


BAD_ARRAYS = {
    "shape": ({"train_images": np.zeros((200, 3, 32, 32), np.uint8)}, "uint8 (200, 3, 32, 32), not uint8 (200, 32"),
    "image count": ({"train_images": np.zeros((199, 32, 32, 3), np.uint8)}, "uint8 (199, 32, 32, 3), not uint8"),
    "scalar": ({"train_images": np.uint8(3)}, "uint8 (), not uint8 (200, 32, 32, 3)"),
    "type": ({"train_images": np.zeros((200, 32, 32, 3), np.float32)}, "float32 (200, 32, 32, 3), not uint8"),
    "label type": ({"train_labels": np.arange(200) % 10 + 0.0}, "train_labels is not 200 integers from 0 to 9"),
    "label count": ({"train_labels": np.zeros(199, np.uint8)}, "is not 200 integers from 0 to 9"),
    "class count": ({"train_labels": np.arange(200) % 100}, "is not 200 integers from 0 to 9"),
    "missing class": ({"train_labels": np.arange(200) % 9}, "is not 200 integers from 0 to 9"),
    "objects": ({"train_labels": np.array([None] * 200)}, "is not a whole .npz file of plain arrays"),
    "missing array": ({"train_labels": None}, "train_labels"),
}


def test_a_file_of_another_name(tmp_path):
    (tmp_path / "other.npz").touch()
    with pytest.raises(UserError, match="other.npz is not a folder: put cifar-10-python.tar.gz"):
        load_split(tmp_path / "other.npz", "test")


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_npz(case, tmp_path, capsys):
    changes, message = BAD_ARRAYS[case]
    np.savez(tmp_path / "cifar10.npz", **{k: v for k, v in (small_arrays() | changes).items() if v is not None})
    assert train.main(["--data-dir", str(tmp_path), "--run-dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and "--data-dir" in error and error.count("\n") == 1


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_npz(save, tmp_path):
    path = tmp_path / "cifar10.npz"
    save(path, **small_arrays())
    whole = path.read_bytes()
    assert len(load_training_data(tmp_path)) == 2
    flipped = bytearray(whole)
    flipped[100_000] ^= 255
    for damaged in (whole[:50_000], flipped, b""):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="is not a whole .npz file"):
            load_training_data(tmp_path)


def test_a_healthy_npz_is_not_called_damaged(dataset, tmp_path, monkeypatch):
    """Other contents, no permission, too little memory: each has its own sentence, and none advises to delete."""
    arrays = small_arrays()
    np.savez(tmp_path / data.NPZ, x_train=arrays["train_images"], y_train=arrays["train_labels"])
    with pytest.raises(UserError, match="has the arrays x_train, y_train, not train_images and train_labels") as error:
        load_split(tmp_path, "train")
    assert "remove" not in str(error.value)
    for failure, expected in ((PermissionError(13, "Permission denied"), "cannot be read .Permission denied."),
                              (MemoryError("Unable to allocate 146 MiB"), "Unable to allocate")):
        def load(path, failure=failure):
            raise failure

        monkeypatch.setattr(np, "load", load)
        with pytest.raises((UserError, MemoryError), match=expected) as error:
            load_split(dataset, "train")
        assert "remove" not in str(error.value)


def test_the_home_folder(dataset, weights, monkeypatch):
    monkeypatch.setenv("HOME", str(dataset.parent))
    assert eval.main(["--weights", str(weights), "--data-dir", f"~/{dataset.name}", "--min-accuracy", "0"]) == 0
    script = "import data; print(data.DEFAULT_DATA_DIR)"
    environment = os.environ | {"CIFAR10_DIR": "~/cifar", "HOME": "/home/x"}
    output = subprocess.run([sys.executable, "-c", script], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert output.stdout == "/home/x/cifar\n"


# --- the official files, and where to download them -----------------------------------------------

@pytest.fixture
def official(tmp_path, monkeypatch):
    """A folder with a small cifar-10-batches-py and its archive, which torchvision takes for the real ones."""
    root = tmp_path / "official"
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)

    def write(name: str, contents: dict) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(contents))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def write_batch(name: str, seed: int) -> list[str]:
        images, labels = make_arrays(20, seed)
        return write(name, {"data": images.transpose(0, 3, 1, 2).reshape(20, 3072), "labels": labels.tolist()})

    monkeypatch.setattr(datasets.CIFAR10, "train_list", [write_batch(f"data_batch_{i}", i) for i in range(1, 6)])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [write_batch("test_batch", 0)])
    name, md5 = write("batches.meta", {"label_names": list(data.CLASSES)})
    monkeypatch.setattr(datasets.CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})
    archive = root / data.ARCHIVE
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(data, "SIZES", {"train": 100, "test": 20})
    return root


def is_the_official_set(splits: list[Split]) -> bool:
    train_split, test_split = splits
    images, labels = make_arrays(20, 1)  # of data_batch_1
    return (np.array_equal(train_split.images[:20], images) and np.array_equal(train_split.labels[:20], labels)
            and len(train_split.images) == 100 and len(test_split.images) == 20)


def test_official_folder(official):
    (official / data.ARCHIVE).unlink()
    assert is_the_official_set(load_training_data(official))
    assert [path.name for path in official.iterdir()] == [data.FOLDER]  # it may be read-only


def test_official_archive(official, tmp_path):
    (tmp_path / "data").mkdir()
    (official / data.ARCHIVE).rename(tmp_path / "data" / data.ARCHIVE)
    for _ in range(2):
        assert is_the_official_set(load_training_data(tmp_path / "data"))


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interruption_leaves_no_part_of_the_data(failure, official, monkeypatch):
    def extract_archive(archive, folder):
        (Path(folder) / data.FOLDER).mkdir()
        raise failure

    shutil.rmtree(official / data.FOLDER)
    monkeypatch.setattr(datasets.utils, "extract_archive", extract_archive)
    with pytest.raises(type(failure)):
        load_split(official, "test")
    assert {path.name for path in official.iterdir()} - {"cifar10.lock"} == {data.ARCHIVE}


@pytest.fixture
def mirrors(official, monkeypatch):
    """A local server in place of the mirrors: /good has the archive, /corrupt and /short lie, others answer 404.

    `mirrors.requests` counts the requests for each path, in order; torchvision asks twice, to follow redirects first.
    """
    whole = (official / data.ARCHIVE).read_bytes()
    bodies = {"/corrupt": b"<html>" + whole[6:], "/page": b"<html>Sorry"} | dict.fromkeys(
        ("/good", "/slow", "/short"), whole)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.requests[self.path] = server.requests.get(self.path, 0) + 1
            time.sleep(0.5 if self.path == "/slow" else 0)
            if self.path not in bodies:
                return self.send_error(404)
            body = bodies[self.path]
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[:1000] if self.path == "/short" else body)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests = {}
    server.use = lambda *paths: monkeypatch.setattr(
        data, "MIRRORS", [f"http://127.0.0.1:{server.server_port}{path}" for path in paths])
    monkeypatch.setenv("no_proxy", "*")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_download(mirrors, tmp_path, monkeypatch, capsys):
    def download_url(*args, original=datasets.utils.download_url):
        print("Downloading")  # as torchvision 0.19 does; eval.py --json prints nothing else
        original(*args)

    monkeypatch.setattr(datasets.utils, "download_url", download_url)
    mirrors.use("/good", "/never-asked")
    assert is_the_official_set(load_training_data(tmp_path / "data"))
    assert is_the_official_set(load_training_data(tmp_path / "data"))
    assert list(mirrors.requests) == ["/good"] and not capsys.readouterr().out


def test_the_first_mirror_that_has_the_archive_is_used(mirrors, tmp_path):
    mirrors.use("/gone", "/page", "/corrupt", "/short", "/good")
    assert is_the_official_set(load_training_data(tmp_path / "data"))
    assert list(mirrors.requests) == ["/gone", "/page", "/corrupt", "/short", "/good"]


@pytest.mark.parametrize("name, contents", [
    (data.ARCHIVE, b"other"), (f"{data.FOLDER}/data_batch_3", b"other"), (f"{data.FOLDER}/data_batch_3", None)])
def test_a_file_that_is_not_the_official_one_is_named_and_kept(name, contents, official, mirrors):
    mirrors.use("/good")
    if name == data.ARCHIVE:
        (official / data.FOLDER).rename(official / "away")
    (official / name).unlink()
    if contents:
        (official / name).write_bytes(contents)
    with pytest.raises(UserError, match=f"{name} (has the md5 [0-9a-f]+, not [0-9a-f]+|is missing): move"):
        load_split(official, "train")
    assert not mirrors.requests and (not contents or (official / name).read_bytes() == contents)


@pytest.mark.parametrize("name", [data.FOLDER, data.ARCHIVE, data.NPZ])
def test_the_data_themselves_are_named(name, official, monkeypatch):
    if name == data.NPZ:
        arrays = {part: load_split(official, part) for part in ("train", "test")}
        np.savez(official / name, **{f"{part}_{field}": tensor.numpy() for part, split in arrays.items()
                                     for field, tensor in split._asdict().items()})
    assert is_the_official_set(load_training_data(official / name))
    if name == data.FOLDER:
        monkeypatch.chdir(official / name)
        assert is_the_official_set(load_training_data("."))


def test_the_second_of_two_first_runs_waits(official, mirrors, tmp_path, capsys):
    mirrors.use("/slow")
    loaded = []
    threads = [threading.Thread(target=lambda: loaded.append(load_split(tmp_path / "new", "train"))) for _ in range(2)]
    for thread in threads:
        thread.start()
        time.sleep(0.3)
    for thread in threads:
        thread.join()
    assert [len(split.images) for split in loaded] == [100, 100] and mirrors.requests == {"/slow": 2}
    assert "another process is preparing CIFAR-10: waiting for it" in capsys.readouterr().err


def test_no_mirror_works(mirrors, tmp_path, capsys):
    mirrors.use("/gone", "/corrupt")
    assert train.main(["--data-dir", str(tmp_path / "data"), "--run-dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]  # torchvision's progress bar comes before
    assert error.startswith("error: ") and "404" in error and "--data-dir" in error


def test_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MIRRORS", ["http://127.0.0.1:9/nobody-listens-here"])
    with pytest.raises(UserError, match="could not be downloaded"):
        load_training_data(tmp_path)


# --- augmentation ---------------------------------------------------------------------------------

def augmented_set(split: Split, **options) -> torch.Tensor:
    """The images of the augmented training set, after the first epoch has drawn them."""
    loader = make_loader(split, **options)
    next(iter(loader))
    return loader.images


def test_augmented_training_set():
    split = make_split(60)
    loader = make_loader(split, batch_size=8)
    next(iter(loader))
    assert loader.images.shape == (180, 32, 32, 3) and loader.images.dtype == torch.uint8
    assert torch.equal(loader.images[:60], split.images)
    assert torch.equal(loader.labels, split.labels.repeat(3))
    for form in (loader.images[60:120], loader.images[120:]):
        changed = (form != split.images).flatten(1).any(dim=1)
        assert changed.float().mean() > 0.5  # some policies of AutoAugment leave an image as it is


def test_equal_seeds_give_equal_sets():
    split = make_split(30)
    first = augmented_set(split, seed=5)
    torch.rand(7)  # the state of the global generator does not matter
    assert torch.equal(first, augmented_set(split, seed=5))
    other = augmented_set(split, seed=6)
    assert not torch.equal(first[30:60], other[30:60]) and not torch.equal(first[60:], other[60:])


def test_resample_draws_the_random_versions_anew_for_each_epoch():
    for resample in (True, False):
        loader = make_loader(make_split(30), batch_size=8, resample=resample)
        forms = []
        for epoch in (0, 1, 1, 0):
            loader.epoch = epoch
            next(iter(loader))
            forms.append(loader.images.clone())
        assert torch.equal(forms[0], forms[3]) and torch.equal(forms[1], forms[2])
        for original, first, second in zip(range(3), forms[0].chunk(3), forms[1].chunk(3), strict=True):
            assert torch.equal(first, second) == (original == 0 or not resample)


def test_autoaugment_of_the_flipped_form():
    split = make_split(200)
    _, rotated, augmented = augmented_set(split, seed=5).chunk(3)
    _, augmented_rotated, same = augmented_set(split, seed=5, autoaugment_flipped=True).chunk(3)
    assert torch.equal(augmented, same)
    assert not torch.equal(augmented_rotated, rotated)
    assert not torch.equal(augmented_rotated, data.autoaugment(rotated, 50_000))  # its draws are its own


def test_each_image_has_draws_of_its_own():
    images, _ = make_arrays(40, 0)
    same = torch.from_numpy(images[3]).expand(40, 32, 32, 3).contiguous()
    _, rotated, augmented = augmented_set(Split(same, torch.zeros(40, dtype=torch.long))).chunk(3)
    assert len(rotated.flatten(1).unique(dim=0)) == 40
    assert len(augmented.flatten(1).unique(dim=0)) > 10


def test_images_that_share_a_draw():
    images, _ = make_arrays(40, 0)
    same = torch.from_numpy(images[3]).expand(40, 32, 32, 3).contiguous()
    changed = data.autoaugment(same, 0, group_size=8)
    kinds, sizes = changed.flatten(1).unique(dim=0, return_counts=True)
    assert 1 < len(kinds) <= 5 and all(size % 8 == 0 for size in sizes.tolist())
    neighbours = (changed[1:] == changed[:-1]).flatten(1).all(dim=1)
    assert neighbours.sum() < 30  # groups of eight in a row would give 35: the images are chosen at random
    different = make_split(40).images
    unchanged = (data.autoaugment(different, 0, group_size=8) == different).flatten(1).all(dim=1)
    assert unchanged.sum() < 20  # and each result is its own image's
    assert torch.equal(data.autoaugment(different, 3, group_size=8), data.autoaugment(different, 3, group_size=8))


@pytest.mark.parametrize("black", [True, False])
def test_what_a_moved_image_leaves(black):
    """Where AutoAugment moves a white image, the gap is grey without black borders, and only then."""
    white = Split(torch.full((200, 32, 32, 3), 255, dtype=torch.uint8), torch.zeros(200, dtype=torch.long))
    *_, augmented = augmented_set(white, black_borders=black).chunk(3)
    grey = (augmented == torch.tensor([125, 123, 114])).all(dim=3)
    assert grey[:, [0, -1]].float().mean() > 0.02 if not black else not grey.any()
    assert not grey[:, 15:17, 15:17].all()


def test_augmentation_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    augmented_set(make_split(10), seed=5, crop_padding=2)
    assert torch.equal(torch.rand(3), expected)


def test_flip(monkeypatch):
    monkeypatch.setattr(data, "ROTATION_DEGREES", 0)
    images = make_split(10).images
    assert torch.equal(data.flip_and_rotate(images, 0), images.flip(2))


def test_rotation_against_pillow():
    from PIL import Image

    rows, columns = np.mgrid[0:32, 0:32]
    smooth = np.stack([4 * rows, 4 * columns, 2 * (rows + columns)], axis=-1).astype(np.uint8)
    degrees = float(torch.rand(1, generator=torch.Generator().manual_seed(3)) * 2 - 1) * 15
    rotated = data.flip_and_rotate(torch.from_numpy(smooth)[None], 3)[0].numpy()
    candidates = [
        np.asarray(Image.fromarray(smooth[:, ::-1].copy()).rotate(angle, Image.Resampling.BILINEAR))
        for angle in (degrees, -degrees)
    ]
    inside = (slice(8, 24), slice(8, 24))  # away from the borders, which Pillow does not reflect
    assert min(np.abs(rotated[inside].astype(int) - c[inside].astype(int)).max() for c in candidates) <= 2
    assert (rotated.sum(axis=-1) > 0).sum() > 1000  # no black corners


@pytest.mark.parametrize("black, mode", [(True, "constant"), (False, "reflect")])
def test_random_crops_are_windows_of_the_padded_image(black, mode):
    images = make_split(60).images
    crops = data.random_crop(images, 3, torch.Generator().manual_seed(0), black)
    padded = torch.from_numpy(np.pad(images, ((0, 0), (3, 3), (3, 3), (0, 0)), mode))
    shifts = set()
    for crop, image in zip(crops, padded, strict=True):
        shifts.add(next((i, j) for i in range(7) for j in range(7) if torch.equal(crop, image[i:i + 32, j:j + 32])))
    assert len(shifts) > 20 and {i for i, _ in shifts} == {j for _, j in shifts} == set(range(7))


# --- batches --------------------------------------------------------------------------------------

def test_a_pass_serves_every_sample_once():
    loader = make_loader(make_split(25), batch_size=32)
    batches = list(loader)
    assert [len(labels) for _, labels in batches] == [32, 32, 11] and len(loader) == 3
    images = torch.cat([images for images, _ in batches]).flatten(1)
    labels = torch.cat([labels for _, labels in batches])
    everything = normalize(loader.images).flatten(1)
    assert not torch.equal(images, everything)
    nearest = torch.cdist(images, everything).argmin(dim=1)
    assert torch.equal(images, everything[nearest]) and torch.equal(labels, loader.labels[nearest])
    assert torch.equal(torch.unique(images, dim=0), torch.unique(everything, dim=0))


def test_a_pass_without_the_random_versions():
    split = make_split(25)
    loader = make_loader(split, batch_size=32, random_versions=False, crop_padding=0)
    ((images, labels),) = loader
    originals = normalize(split.images).flatten(1)
    nearest = torch.cdist(images.flatten(1), originals).argmin(dim=1)
    assert torch.equal(images.flatten(1), originals[nearest]) and torch.equal(labels, split.labels[nearest])
    assert sorted(nearest.tolist()) == list(range(25)) and len(loader) == 1


def test_the_order_follows_from_seed_and_epoch():
    def labels(seed: int, epoch: int) -> torch.Tensor:
        loader = make_loader(make_split(30), batch_size=90, seed=seed)
        loader.epoch = epoch
        return next(iter(loader))[1]

    assert torch.equal(labels(0, 1), labels(0, 1))
    assert not torch.equal(labels(0, 1), labels(0, 0)) and not torch.equal(labels(0, 1), labels(1, 1))


def test_the_loader_crops():
    plain, cropped = (next(iter(make_loader(make_split(20), batch_size=60, crop_padding=pixels)))[0].flatten(1)
                      for pixels in (0, 4))
    assert cropped.shape == plain.shape and (cropped != plain).any(dim=1).sum() > 45


def test_normalize_against_torchvision():
    from torchvision.transforms import v2

    images = make_split(10).images
    reference = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(data.MEAN.tolist(), data.STD.tolist())])
    normalized = normalize(images)
    assert torch.allclose(normalized, reference(images.permute(0, 3, 1, 2)), atol=1e-5)
    assert normalized.is_contiguous()


def test_normalisation_constants(real_data):
    train_split = load_split(real_data, "train")
    pixels = train_split.images.view(-1, 3).double() / 255
    assert pixels.mean(dim=0).tolist() == pytest.approx(data.MEAN.tolist(), abs=5e-5)
    assert pixels.std(dim=0).tolist() == pytest.approx(data.STD.tolist(), abs=1e-4)


def test_resize():
    images = normalize(make_split(5).images)
    assert data.resize(images, 32) is images
    small = data.resize(images, 16)
    assert small.shape == (5, 3, 16, 16) and small.is_contiguous()
    assert torch.allclose(data.resize(images.flip(3), 16), small.flip(3), atol=1e-5)
    assert torch.allclose(small.mean(), images.mean(), atol=0.02)
    grey = torch.full((1, 3, 32, 32), 0.7)
    assert torch.allclose(data.resize(grey, 24), torch.full((1, 3, 24, 24), 0.7))
