import hashlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from benchmarks.strangers import make_tensors, split_layers, write_checkpoint, write_keras_2
from mobilenet_jax.models.init import init_variables
from mobilenet_jax.models.network import create_model
from mobilenet_jax.weights import WeightsError, fetch
from mobilenet_jax.weights.card import HALF
from mobilenet_jax.weights.keras_names import KERAS
from mobilenet_jax.weights.load import load_weights
from mobilenet_jax.weights.save import save_weights
from mobilenet_jax.weights.transformers_names import TRANSFORMERS


class _Server(ThreadingHTTPServer):
    """Gives `files`, parts too; `cut` bytes of an answer are the last it sends; `asked` are the paths and ranges."""

    daemon_threads = True

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.headers: dict[str, str] = {}
        self.asked: list[tuple[str, str, str | None]] = []
        self.cut: int | None = None
        self.shift = 0  # bytes by which a part starts too late
        self.sized = True  # false: answers have no Content-Length
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"


class _Handler(BaseHTTPRequestHandler):
    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server, asked = self.server, self.headers["Range"]
        server.asked.append((self.command, self.path, asked))
        data = server.files.get(self.path.lstrip("/"))
        if data is None:
            self.send_error(404)
            return
        start = int(asked.removeprefix("bytes=").split("-")[0]) + server.shift if asked else 0
        if asked and start >= len(data):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            self.end_headers()
            return
        self.send_response(206 if asked else 200)
        for name, value in server.headers.items():
            self.send_header(name, value)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        if server.sized:
            self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[start:][: server.cut])


@pytest.fixture
def server(monkeypatch, tmp_path):
    server = _Server()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(fetch, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(fetch, "TORCHVISION_URL", server.url)
    monkeypatch.setattr(fetch, "KERAS_URL", server.url)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def refuse(_) -> None:
    """Check a file without a checksum: these tests have none."""
    raise AssertionError("the file has a checksum")


DATA = np.random.default_rng(0).bytes(3_000_000)
SHA256 = hashlib.sha256(DATA).hexdigest()


def test_a_download_that_breaks_off_is_continued(server, tmp_path):
    server.files["w.pth"] = DATA
    published, path = fetch.Published(f"{server.url}w.pth", digest=SHA256[:8]), tmp_path / "cache" / "w.pth"
    for cut, reached in ((1_000_000, 1_000_000), (500_000, 1_500_000)):
        server.cut = cut
        with pytest.raises(WeightsError, match=f"broke off after {reached:,} of 3,000,000 bytes; the same command"):
            fetch.download(published, path, check=refuse)
        assert not path.exists()
    server.cut = None
    fetch.download(published, path, check=refuse)
    assert path.read_bytes() == DATA
    assert [asked for _, _, asked in server.asked] == [None, "bytes=1000000-", "bytes=1500000-"]
    assert [file.name for file in path.parent.iterdir()] == ["w.pth"]


def test_a_server_that_gives_no_parts_and_a_part_that_is_whole(server, tmp_path):
    server.files["w.pth"] = DATA
    published, path = fetch.Published(f"{server.url}w.pth", digest=SHA256[:8]), tmp_path / "w.pth"
    part = tmp_path / "w.pth.part"
    part.write_bytes(DATA)  # ended between the last byte and the rename
    fetch.download(published, path, check=refuse)
    assert path.read_bytes() == DATA
    path.unlink()
    part.write_bytes(b"of something else")
    with pytest.raises(WeightsError, match="it was deleted"):
        fetch.download(published, path, check=refuse)
    fetch.download(published, path, check=refuse)
    assert path.read_bytes() == DATA


def test_downloads_at_the_same_time_are_one(server, tmp_path):
    server.files["w.pth"] = DATA
    published, path = fetch.Published(f"{server.url}w.pth", digest=SHA256[:8]), tmp_path / "w.pth"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: fetch.download(published, path, check=refuse), range(4)))
    assert path.read_bytes() == DATA
    assert len(server.asked) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["w.pth"]


def test_an_answer_that_does_not_fit_is_one_sentence(server, tmp_path):
    server.files["w.pth"] = DATA
    published, path = fetch.Published(f"{server.url}w.pth", digest=SHA256[:8]), tmp_path / "w.pth"
    part = tmp_path / "w.pth.part"
    server.sized = False
    with pytest.raises(WeightsError, match=r"w\.pth cannot be downloaded: the server does not state its size$"):
        fetch.download(published, path, check=refuse)
    assert list(tmp_path.iterdir()) == []
    server.sized = True
    part.write_bytes(DATA[:1000])
    server.shift = 5
    with pytest.raises(WeightsError, match=r"cannot be continued: bytes 1000- were asked for, .* bytes 1005-2999999/"):
        fetch.download(published, path, check=refuse)
    assert part.read_bytes() == DATA[:1000]


def test_a_416_without_a_part_is_one_sentence(server, tmp_path, monkeypatch):
    monkeypatch.setattr(_Handler, "do_GET", lambda self: self.send_error(416))
    with pytest.raises(WeightsError, match=r"w\.pth cannot be downloaded: HTTP Error 416"):
        fetch.download(fetch.Published(f"{server.url}w.pth"), tmp_path / "w.pth", check=refuse)
    assert list(tmp_path.iterdir()) == []


def test_a_file_without_a_checksum_must_load_before_it_is_kept_and_is_then_pinned(server, tmp_path):
    _, _, tensors = make_tensors(KERAS, "mobilenet_v1", width=0.25, num_classes=3)
    weights = {layer: [] for layer in split_layers(tensors)}
    for name in tensors:
        weights[name.rpartition("/")[0]].append(name)
    write_keras_2(tmp_path / "w.h5", {layer: {n: tensors[n] for n in names} for layer, names in weights.items()})
    data, name = (tmp_path / "w.h5").read_bytes(), "keras/MobileNet_025"
    write_keras_2(tmp_path / "other.h5", {"conv": {"conv/kernel": np.ones((3, 3), np.float32)}})
    file = "mobilenet/mobilenet_2_5_224_tf.h5"
    for content, message in (
        (data[: len(data) // 2], "it is damaged"),
        (b"<!DOCTYPE html><html>log in here</html>", "it is a web page"),
        ((tmp_path / "other.h5").read_bytes(), "does not fit keras/"),
    ):
        server.files[file] = content
        with pytest.raises(WeightsError, match=rf"_tf\.h5 cannot be loaded and was deleted: .*{message}"):
            load_weights(name)
        assert list(fetch.CACHE.iterdir()) == []
    server.files[file] = data
    assert load_weights(name)[2]["name"] == name
    path = fetch.CACHE / "mobilenet_2_5_224_tf.h5"
    pin = path.with_name(f"{path.name}.sha256")
    assert pin.read_text() == hashlib.sha256(data).hexdigest()
    assert load_weights(name, offline=True)[0].spec.num_classes == 3
    path.write_bytes(data[:-1] + b"!")
    with pytest.raises(
        WeightsError, match=rf"{path.name} has changed since it was downloaded; delete it and {pin.name}"
    ):
        load_weights(name, offline=True)


def test_a_part_that_is_longer_than_the_file_is_thrown_away(server, tmp_path):
    server.files["w.pth"] = DATA
    (tmp_path / "w.pth.part").write_bytes(DATA + b"of something else")
    published = fetch.Published(f"{server.url}w.pth", digest=SHA256[:8])
    fetch.download(published, tmp_path / "w.pth", check=refuse)
    assert (tmp_path / "w.pth").read_bytes() == DATA
    assert [asked for _, _, asked in server.asked] == [f"bytes={len(DATA) + 17}-", None]


def test_content_of_another_checksum_is_deleted_and_said(server, tmp_path):
    server.files["w.pth"] = DATA[:-1] + b"!"
    published = fetch.Published(f"{server.url}w.pth", digest=SHA256[:8])
    with pytest.raises(WeightsError, match=f"has sha256 [0-9a-f]{{64}}, not {SHA256[:8]}\\.\\.\\.: it was deleted"):
        fetch.download(published, tmp_path / "w.pth", check=refuse)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_reached_is_one_sentence(server, tmp_path):
    with pytest.raises(WeightsError, match=r"w\.pth cannot be downloaded: HTTP Error 404"):
        fetch.download(fetch.Published(f"{server.url}w.pth"), tmp_path / "w.pth", check=refuse)
    with pytest.raises(WeightsError, match=r"cannot be downloaded: .*refused"):
        fetch.download(fetch.Published("http://127.0.0.1:9/w.pth"), tmp_path / "w.pth", check=refuse)


def test_names_become_the_files_their_frameworks_publish():
    tv, keras = "https://download.pytorch.org/models/", "https://storage.googleapis.com/tensorflow/keras-applications/"
    for name, url, digest in (
        ("torchvision/mobilenet_v2", f"{tv}mobilenet_v2-7ebf99e0.pth", "7ebf99e0"),
        ("torchvision/mobilenet_v2.IMAGENET1K_V1", f"{tv}mobilenet_v2-b0353104.pth", "b0353104"),
        ("torchvision/mobilenet_v3_small", f"{tv}mobilenet_v3_small-047dcff4.pth", "047dcff4"),
        ("keras/MobileNet_025", f"{keras}mobilenet/mobilenet_2_5_224_tf.h5", ""),
        (
            "keras/MobileNetV2_035",
            f"{keras}mobilenet_v2/mobilenet_v2_weights_tf_dim_ordering_tf_kernels_0.35_224.h5",
            "",
        ),
        (
            "keras/MobileNetV3Large",
            f"{keras}mobilenet_v3/weights_mobilenet_v3_large_224_1.0_float.h5",
            "59e551e166be033d707958cf9e29a6a7",
        ),
    ):
        assert fetch.is_remote(name)
        published = fetch.find_published(name)
        assert (published.url, published.digest) == (url, digest)
    for name in ("keras/MobileNetV2_060", "timm/mobilenetv2_100", "torchvision/vgg16"):
        with pytest.raises(
            WeightsError, match=f"no published weights '{name}' are known; valid: torchvision/mobilenet_v2"
        ):
            fetch.find_published(name)
    with pytest.raises(WeightsError, match="no weights V9 of mobilenet_v2; valid: IMAGENET1K_V2, IMAGENET1K_V1"):
        fetch.find_published("torchvision/mobilenet_v2.V9")
    assert not fetch.is_remote("runs/mine")
    assert not fetch.is_remote("weights.pth")


def write_weights(path, *, convention: str) -> None:
    model = create_model("mobilenet_v2", width=0.25, num_classes=3, convention=convention)
    card = {"name": "", "model": "mobilenet_v2", "width": 0.25, "convention": convention}
    card |= {"preprocessing": asdict(HALF), "class_names": None, "source": {}, "metrics": {}, "notes": []}
    save_weights(path, model, init_variables(model, seed=0), card, format=convention)


def test_a_name_is_loaded_once_it_is_there_without_a_network(server, tmp_path, monkeypatch):
    write_weights(tmp_path / "w.pth", convention="torchvision")
    data = (tmp_path / "w.pth").read_bytes()
    file = f"mobilenet_v2-{hashlib.sha256(data).hexdigest()[:8]}.pth"
    monkeypatch.setitem(fetch._TORCHVISION["mobilenet_v2"], "IMAGENET1K_V2", file)
    with pytest.raises(WeightsError, match=r"torchvision/mobilenet_v2 is not in .*cache, and downloads are off"):
        load_weights("torchvision/mobilenet_v2", offline=True)
    assert server.asked == []
    server.files[file] = data
    for offline in (False, True, False):
        model, _, card = load_weights("torchvision/mobilenet_v2", offline=offline)
        assert model.spec.num_classes == 3
        assert (card["name"], card["source"]["file"]) == ("torchvision/mobilenet_v2", file)
    assert server.asked == [("GET", f"/{file}", None)]


def test_the_hub_gives_weights_with_their_preprocessing(server, tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", server.url.rstrip("/"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    template = server.url + "{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    write_weights(tmp_path / "w.safetensors", convention="timm")
    given = {"tag": "ra_in1k", "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.5, 0.5], "crop_pct": 0.95}
    given |= {"input_size": [3, 256, 256], "interpolation": "bicubic"}
    config = {"architecture": "mobilenetv2_025", "pretrained_cfg": given}
    files = {"model.safetensors": (tmp_path / "w.safetensors").read_bytes(), "config.json": json.dumps(config).encode()}
    server.files = {f"timm/mine/resolve/main/{name}": data for name, data in files.items()}
    server.headers = {"X-Repo-Commit": "0" * 40}
    with pytest.raises(WeightsError, match="hf:timm/mine cannot be downloaded: "):
        load_weights("hf:timm/mine", offline=True)
    for offline in (False, True):
        _, _, card = load_weights("hf:timm/mine", offline=offline)
        assert card["name"] == "timm/mobilenetv2_025.ra_in1k"
        assert card["preprocessing"] == {
            "image_size": 256,
            "crop_share": 0.95,
            "interpolation": "bicubic",
            "squash": False,
            "mean": [127.5, 127.5, 127.5],
            "std": [63.75, 127.5, 127.5],
        }
    # transformers: an older repository, in PyTorch's format
    _, _, tensors = make_tensors(TRANSFORMERS, "mobilenet_v1", width=0.1, num_classes=2)
    write_checkpoint(tmp_path / "hub.bin", tensors)
    older = {"pytorch_model.bin": (tmp_path / "hub.bin").read_bytes()}
    older["config.json"] = json.dumps({"model_type": "mobilenet_v1", "id2label": {"0": "cat", "1": "dog"}}).encode()
    older["preprocessor_config.json"] = json.dumps({"size": 128, "crop_size": 64}).encode()
    server.files |= {f"google/mine/resolve/main/{name}": data for name, data in older.items()}
    for offline in (False, True):
        _, _, card = load_weights("hf:google/mine", offline=offline)
        assert (card["name"], card["class_names"]) == ("transformers/mobilenet_v1", ["cat", "dog"])
        assert (card["preprocessing"]["image_size"], card["preprocessing"]["crop_share"]) == (64, 0.5)
    with pytest.raises(WeightsError, match="hf:timm/none cannot be downloaded: "):
        load_weights("hf:timm/none")
    server.files["timm/odd/resolve/main/config.json"] = b'{"architecture": "resnet"}'
    server.files["timm/odd/resolve/main/model.safetensors"] = files["model.safetensors"]
    with pytest.raises(
        WeightsError, match=r"the config.json of hf:timm/odd is not timm's: 'pretrained_cfg' is missing"
    ):
        load_weights("hf:timm/odd")
