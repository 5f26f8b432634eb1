"""Reading, downloading, enlarging and batching the data set."""

import hashlib
import http.server
import pickle
import tarfile
import threading

import numpy as np
import pytest
import torch
from conftest import make_arrays, small_arrays
from torchvision import datasets

import data
import train
from data import (
    DataError,
    Split,
    auto_augment,
    batches,
    enlarge,
    load_cifar10,
    load_training_data,
    mirror_and_rotate,
    normalize,
    random_crop,
    redraw,
    shrink,
)


def split_of(n: int) -> Split:
    images, labels = make_arrays(n, 0)
    return Split(torch.from_numpy(images), torch.from_numpy(labels).long())


# --- cifar10.npz ------------------------------------------------------------------------------


def test_npz(dataset):
    train_split, test_split = load_cifar10(dataset)
    images, labels = make_arrays(100, 1)
    assert train_split.images.shape == (200, 32, 32, 3) and train_split.images.dtype == torch.uint8
    assert np.array_equal(test_split.images, images) and np.array_equal(test_split.labels, labels)
    assert test_split.labels.dtype == torch.int64


def test_validation_split_is_the_last_tenth_of_the_training_set(dataset):
    everything, _ = load_cifar10(dataset)
    kept, held_out = load_training_data(dataset, validate=True)
    assert torch.equal(torch.cat([kept.images, held_out.images]), everything.images)
    assert torch.equal(torch.cat([kept.labels, held_out.labels]), everything.labels)
    assert len(held_out.images) == 20


BAD_ARRAYS = {
    "shape": (dict(train_images=np.zeros((200, 3, 32, 32), np.uint8)), "of shape (200, 3, 32, 32), expected (200, 32"),
    "image count": (dict(train_images=np.zeros((199, 32, 32, 3), np.uint8)), "of shape (199, 32, 32, 3), expected"),
    "scalar": (dict(train_images=np.uint8(3)), "of shape (), expected (200, 32, 32, 3)"),
    "type": (dict(train_images=np.zeros((200, 32, 32, 3), np.float32)), "float32, expected uint8"),
    "label type": (dict(train_labels=np.zeros(200)), "float64, expected integers"),
    "label count": (dict(train_labels=np.zeros(199, np.uint8)), "of shape (199,), expected (200,)"),
    "class count": (dict(train_labels=np.arange(200) % 100), "of 100 classes from 0 to 99, expected the 10 classes"),
    "missing class": (dict(train_labels=np.arange(200) % 9), "of 9 classes from 0 to 8, expected the 10 classes"),
    "objects": (dict(train_labels=np.array([None] * 200)), "cannot be read as an .npz of plain arrays"),
    "missing array": (dict(train_labels=None), "has no array 'train_labels'"),
}


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
    assert len(load_cifar10(tmp_path)) == 2
    flipped = bytearray(whole)
    flipped[100_000] ^= 255
    for wreck in (whole[:50_000], flipped, b""):
        path.write_bytes(wreck)
        with pytest.raises(DataError, match="cannot be read as an .npz"):
            load_cifar10(tmp_path)


# --- the official folder and archive, and where to download it ----------------------------------


@pytest.fixture
def official(tmp_path, monkeypatch):
    """A small folder cifar-10-batches-py and its archive, which torchvision and data.py take for the real ones."""
    root = tmp_path / "official"
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)

    def write(name: str, contents: dict) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(contents))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch(name: str, seed: int) -> list[str]:
        images, labels = make_arrays(20, seed)
        return write(name, {"data": images.transpose(0, 3, 1, 2).reshape(20, 3072), "labels": labels.tolist()})

    monkeypatch.setattr(datasets.CIFAR10, "train_list", [batch(f"data_batch_{i}", i) for i in range(1, 6)])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [batch("test_batch", 0)])
    name, md5 = write("batches.meta", {"label_names": list(data.CLASSES)})
    monkeypatch.setattr(datasets.CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})
    archive = root / data.ARCHIVE
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    monkeypatch.setattr(data, "SIZES", {"train": 100, "test": 20})
    monkeypatch.setattr(data, "ARCHIVE_BYTES", archive.stat().st_size)
    monkeypatch.setattr(data, "ARCHIVE_MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    return root


def is_the_official_set(splits: list[Split]) -> bool:
    train_split, test_split = splits
    images, labels = make_arrays(20, 1)  # of data_batch_1
    return (np.array_equal(train_split.images[:20], images) and np.array_equal(train_split.labels[:20], labels)
            and len(train_split.images) == 100 and len(test_split.images) == 20)


def test_official_folder(official):
    (official / data.ARCHIVE).unlink()
    assert is_the_official_set(load_cifar10(official))


def test_changed_official_folder(official):
    (official / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"other")
    with pytest.raises(DataError, match="not the official folder, whole and unchanged"):
        load_cifar10(official)


def test_archive(official, tmp_path):
    (tmp_path / "data").mkdir()
    (official / data.ARCHIVE).rename(tmp_path / "data" / data.ARCHIVE)
    assert is_the_official_set(load_cifar10(tmp_path / "data"))
    assert [path.name for path in (tmp_path / "data").iterdir()] == [data.ARCHIVE]


def test_truncated_archive(official, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / data.ARCHIVE).write_bytes((official / data.ARCHIVE).read_bytes()[:1000])
    with pytest.raises(DataError, match=r"has 1,000 bytes and md5 \w+, expected [\d,]+ and \w+: remove it"):
        load_cifar10(tmp_path / "data")


@pytest.fixture
def mirrors(official, monkeypatch):
    """A local server in the mirrors' place: /gone answers 404, /corrupt and /short lie, /good has the archive.

    `mirrors.requests` lists the path and the Range header of each request.
    """
    whole = (official / data.ARCHIVE).read_bytes()
    bodies = {"/good": whole, "/corrupt": b"<html>" + whole[6:], "/short": whole, "/page": b"<html>Sorry"}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.requests.append((self.path, self.headers["Range"]))
            if self.path not in bodies:
                return self.send_error(404)
            start = int(self.headers["Range"][6:-1]) if self.headers["Range"] else 0
            body = bodies[self.path][start:]
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[:1000] if self.path == "/short" else body)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests = []
    server.use = lambda *paths: monkeypatch.setattr(
        data, "MIRRORS", [f"http://127.0.0.1:{server.server_port}{path}" for path in paths])
    server.whole = whole
    monkeypatch.setenv("no_proxy", "*")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_download_leaves_only_the_npz(mirrors, tmp_path):
    mirrors.use("/good", "/never-asked")
    assert is_the_official_set(load_cifar10(tmp_path / "data"))
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["cifar10.npz"]
    assert is_the_official_set(load_cifar10(tmp_path / "data"))
    assert mirrors.requests == [("/good", None)]


def test_first_mirror_fails_second_is_corrupt(mirrors, tmp_path):
    mirrors.use("/gone", "/page", "/corrupt", "/good")
    assert is_the_official_set(load_cifar10(tmp_path / "data"))
    assert [path for path, _ in mirrors.requests] == ["/gone", "/page", "/corrupt", "/good"]


def test_interrupted_download_is_taken_up(mirrors, tmp_path):
    part = tmp_path / f"{data.ARCHIVE}.part"
    part.write_bytes(mirrors.whole[:700])
    mirrors.use("/good")
    assert is_the_official_set(load_cifar10(tmp_path))
    assert mirrors.requests == [("/good", "bytes=700-")]


def test_wreck_of_a_download_is_not_believed(mirrors, tmp_path):
    (tmp_path / f"{data.ARCHIVE}.part").write_bytes(b"wreck")
    mirrors.use("/good")
    assert is_the_official_set(load_cifar10(tmp_path))
    assert mirrors.requests == [("/good", "bytes=5-"), ("/good", None)]


def test_connection_lost_on_the_way(mirrors, tmp_path):
    mirrors.use("/short", "/good")
    assert is_the_official_set(load_cifar10(tmp_path))
    assert mirrors.requests == [("/short", None), ("/good", "bytes=1000-")]


def test_no_mirror_works(mirrors, tmp_path, capsys):
    mirrors.use("/gone", "/corrupt")
    assert train.main(["--data-dir", str(tmp_path / "data"), "--run-dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "404" in error and "expected" in error and "--data-dir" in error and "Traceback" not in error
    assert list((tmp_path / "data").iterdir()) == []


def test_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MIRRORS", ["http://127.0.0.1:9/nobody-listens-here"])
    with pytest.raises(DataError, match="could not be downloaded"):
        load_cifar10(tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- the enlarged set -------------------------------------------------------------------------


def test_enlarged_set():
    split = split_of(60)
    original = split.images.clone()
    enlarged = enlarge(split, 0, 15.0)
    assert split.images.data_ptr() == enlarged.images.data_ptr()  # the memory is not needed twice
    assert enlarged.images.shape == (180, 32, 32, 3) and enlarged.images.dtype == torch.uint8
    assert torch.equal(enlarged.images[:60], original)
    assert torch.equal(enlarged.labels, split.labels.repeat(3))
    for form in (enlarged.images[60:120], enlarged.images[120:]):
        changed = (form != original).flatten(1).any(dim=1)
        assert changed.float().mean() > 0.5  # some of AutoAugment's policies leave an image as it is


def test_equal_seeds_give_equal_sets():
    split = split_of(30)
    first = enlarge(split, 5, 15.0).images
    torch.rand(7)  # the state of the global generator does not matter
    assert torch.equal(first, enlarge(split, 5, 15.0).images)
    other = enlarge(split, 6, 15.0).images
    assert not torch.equal(first[30:60], other[30:60]) and not torch.equal(first[60:], other[60:])


def test_redraw_changes_the_drawn_forms_in_place():
    enlarged = enlarge(split_of(30), 5, 15.0)
    before = enlarged.images.clone()
    redraw(enlarged, 6, 15.0)
    assert torch.equal(enlarged.images, enlarge(split_of(30), 6, 15.0).images)
    assert torch.equal(enlarged.images[:30], before[:30])
    assert not torch.equal(enlarged.images[30:60], before[30:60])
    assert not torch.equal(enlarged.images[60:], before[60:])


def test_augmenting_the_turned_form_too():
    plain, both = enlarge(split_of(200), 5, 15.0), enlarge(split_of(200), 5, 15.0, augment_turned=True)
    turned, (_, augmented_turned, augmented) = plain.images[200:400], both.images.chunk(3)
    assert torch.equal(augmented, plain.images[400:])
    assert not torch.equal(augmented_turned, turned)
    assert not torch.equal(augmented_turned, auto_augment(turned, 5))  # the augmented form has these draws


def test_each_image_has_its_own_draws():
    images, _ = make_arrays(40, 0)
    same = torch.from_numpy(images[3]).expand(40, 32, 32, 3).contiguous()
    enlarged = enlarge(Split(same, torch.zeros(40, dtype=torch.long)), 0, 15.0).images
    assert len(enlarged[40:80].flatten(1).unique(dim=0)) == 40
    assert len(enlarged[80:].flatten(1).unique(dim=0)) > 10


def test_images_that_share_a_draw():
    images, _ = make_arrays(40, 0)
    same = torch.from_numpy(images[3]).expand(40, 32, 32, 3).contiguous()
    changed = auto_augment(same, 0, together=8)
    kinds, sizes = changed.flatten(1).unique(dim=0, return_counts=True)
    assert 1 < len(kinds) <= 5 and all(size % 8 == 0 for size in sizes.tolist())
    neighbours = (changed[1:] == changed[:-1]).flatten(1).all(dim=1)
    assert neighbours.sum() < 30  # in groups of eight in a row it would be 35: they are chosen at random
    different = split_of(40).images
    unchanged = (auto_augment(different, 0, together=8) == different).flatten(1).all(dim=1)
    assert unchanged.sum() < 20  # and each result is its own image's
    assert torch.equal(auto_augment(different, 3, together=8), auto_augment(different, 3, together=8))


def test_enlarging_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    enlarge(split_of(10), 5, 15.0)
    assert torch.equal(torch.rand(3), expected)


def test_mirror():
    images = split_of(10).images
    mirrored = mirror_and_rotate(images, 0.0, torch.Generator())
    assert torch.equal(mirrored, images.flip(2))


def test_rotation_against_pillow():
    from PIL import Image

    rows, columns = np.mgrid[0:32, 0:32]
    smooth = np.stack([4 * rows, 4 * columns, 2 * (rows + columns)], axis=-1).astype(np.uint8)
    images = torch.from_numpy(smooth)[None]
    degrees = float(torch.rand(1, generator=torch.Generator().manual_seed(3)) * 2 - 1) * 15
    turned = mirror_and_rotate(images, 15.0, torch.Generator().manual_seed(3))[0].numpy()
    candidates = [
        np.asarray(Image.fromarray(smooth[:, ::-1].copy()).rotate(angle, Image.Resampling.BILINEAR))
        for angle in (degrees, -degrees)
    ]
    inside = (slice(8, 24), slice(8, 24))  # away from the borders, which Pillow does not reflect
    assert min(np.abs(turned[inside].astype(int) - c[inside].astype(int)).max() for c in candidates) <= 2
    assert (turned.sum(axis=-1) > 0).sum() > 1000  # no black corners


# --- batches ----------------------------------------------------------------------------------


def test_batches_go_through_everything_once():
    split = split_of(70)
    seen = list(batches(split, 32, torch.Generator().manual_seed(0)))
    assert [len(labels) for _, labels in seen] == [32, 32, 6]
    images = torch.cat([images for images, _ in seen]).flatten(1)
    labels = torch.cat([labels for _, labels in seen])
    everything = normalize(split.images).flatten(1)
    assert not torch.equal(images, everything)
    order = torch.cdist(images, everything).argmin(dim=1)
    assert torch.equal(order.sort().values, torch.arange(70)) and torch.equal(labels, split.labels[order])


def test_batches_keep_the_order_without_a_generator():
    split = split_of(20)
    assert torch.equal(torch.cat([images for images, _ in batches(split, 8)]), normalize(split.images))


def test_random_crops_are_windows_of_the_padded_image():
    images = split_of(60).images
    crops = random_crop(images, 3, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images, (0, 0, 3, 3, 3, 3))
    shifts = set()
    for crop, image in zip(crops, padded):
        shifts.add(next((i, j) for i in range(7) for j in range(7) if torch.equal(crop, image[i:i + 32, j:j + 32])))
    assert len(shifts) > 20 and {i for i, _ in shifts} == {j for _, j in shifts} == set(range(7))


def test_batches_crop():
    split = split_of(20)
    plain, cropped = (
        torch.cat([images for images, _ in batches(split, 8, torch.Generator().manual_seed(0), crop)]).flatten(1)
        for crop in (0, 4))
    assert cropped.shape == plain.shape and (cropped != plain).any(dim=1).sum() > 15


def test_shrink_keeps_grey_and_mirror():
    images = normalize(split_of(5).images)
    assert shrink(images, 32) is images
    small = shrink(images, 16)
    assert small.shape == (5, 3, 16, 16) and small.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(shrink(images.flip(3), 16), small.flip(3), atol=1e-5)
    assert torch.allclose(shrink(torch.full((1, 3, 32, 32), 0.7), 24), torch.full((1, 3, 24, 24), 0.7))
    assert torch.allclose(small.mean(), images.mean(), atol=0.02)


def test_normalize_against_torchvision():
    from torchvision.transforms import v2

    images = split_of(10).images
    reference = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(data.MEAN, data.STD)])
    assert torch.allclose(normalize(images), reference(images.permute(0, 3, 1, 2)), atol=1e-5)


def test_normalisation_constants(real_data):
    (train_split,) = load_cifar10(real_data, ("train",))
    pixels = train_split.images.view(-1, 3).double() / 255
    assert pixels.mean(dim=0).tolist() == pytest.approx(data.MEAN, abs=5e-5)
    assert pixels.std(dim=0).tolist() == pytest.approx(data.STD, abs=1e-4)


# --- spoilt images ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", data.corruptions())
def test_corruptions_change_images_a_little(name):
    images = split_of(6).images
    spoil = data.corruptions()[name]
    spoilt = spoil(images)
    assert spoilt.shape == images.shape and spoilt.dtype == torch.uint8 and torch.equal(spoilt, spoil(images))
    change = (spoilt.float() - images.float()).abs().mean()
    assert 1 < change < 60
    if name == "contrast":
        before, after = (x.float().std(dim=(1, 2)) for x in (images, spoilt))
        assert torch.allclose(after, 0.4 * before, rtol=0.05)
    if name == "gaussian blur":
        dot = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
        dot[0, 16, 16] = 255
        assert spoil(dot)[0, 16, 16, 0].item() == pytest.approx(255 * 0.57**2, abs=3)  # e**0 / sum(e**(-x*x/0.98))
    if name == "gaussian noise":
        assert (spoilt.float() - images.float()).std().item() == pytest.approx(0.08 * 255, rel=0.1)
