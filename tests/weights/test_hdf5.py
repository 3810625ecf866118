import resource
import shutil
import struct
import sys
import time
import zipfile

import h5py
import numpy as np
import pytest

from mobilenet_jax.models.zoo import make_spec
from mobilenet_jax.weights import WeightsError, hdf5
from mobilenet_jax.weights.keras_names import KERAS
from mobilenet_jax.weights.load import load_weights, read_tensors

NORM = ("gamma", "beta", "moving_mean", "moving_variance")


def write_keras_2(path, layers: dict[str, dict[str, np.ndarray]]) -> None:
    """The layout of the published files: names of fixed length in attributes, weights in groups within groups."""
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [name.encode() for name in layers]
        for layer, weights in layers.items():
            group = file.create_group(layer)
            group.attrs["weight_names"] = [f"{layer}/{name}:0".encode() for name in weights]
            for name, values in weights.items():
                group.create_dataset(f"{layer}/{name}:0", data=values)


def write_keras_3(path, layers: dict[str, list]) -> None:
    with h5py.File(path, "w") as file:
        for i, (layer, weights) in enumerate(layers.items()):
            variables = file.create_group(f"layers/layer_{i}/vars")
            variables.attrs["name"] = layer
            for j, values in enumerate(weights):
                variables.create_dataset(str(j), data=values)


ONES = np.ones(2, np.float32)


def test_variables_of_keras_3_are_named_by_their_layer_and_place(tmp_path):
    path = tmp_path / "w.weights.h5"
    write_keras_3(path, {"bn_Conv1": [ONES * i for i in range(4)], "Conv1": [ONES], "predictions": [ONES, 5 * ONES]})
    tensors, _ = read_tensors(path)
    assert tensors.keys() == {
        *(f"bn_conv1/{leaf}" for leaf in NORM),
        "conv1/kernel",
        "predictions/kernel",
        "predictions/bias",
    }
    assert [tensors[f"bn_conv1/{leaf}"][0] for leaf in NORM] == [0, 1, 2, 3]
    assert tensors["predictions/bias"][0] == 5


def test_names_of_keras_2_become_todays(tmp_path):
    path = tmp_path / "w.h5"
    layers = {
        "conv_dw_1": {"depthwise_kernel": ONES},
        "expanded_conv/expand/BatchNorm": dict.fromkeys(NORM, ONES),
        "expanded_conv/squeeze_excite/Conv_1": {"kernel": ONES, "bias": ONES},
        "Logits": {"kernel": ONES},
    }
    write_keras_2(path, layers)
    assert list(read_tensors(path)[0]) == [
        "conv_dw_1/kernel",
        *(f"expanded_conv_expand_bn/{leaf}" for leaf in NORM),
        "expanded_conv_squeeze_excite_conv_1/kernel",
        "expanded_conv_squeeze_excite_conv_1/bias",
        "logits/kernel",
    ]


def test_a_file_of_forgotten_names_is_read_by_order(tmp_path):
    spec = make_spec("mobilenet_v2", width=0.25, num_classes=4, convention="keras")
    generator = np.random.default_rng(0)
    layers: dict[str, dict[str, np.ndarray]] = {}
    for name, slot in KERAS.list_slots(spec).items():
        layer, leaf = name.split("/")
        layers.setdefault(f"mobl_{layer}_x", {})[leaf] = generator.uniform(0.5, 1, slot.shape).astype(np.float32)
    write_keras_2(tmp_path / "w.h5", layers)
    model, variables, card = load_weights(tmp_path / "w.h5")
    assert (model.spec, card["name"]) == (spec, "keras/MobileNetV2")
    expected = layers["mobl_block_3_project_x"]["kernel"]
    np.testing.assert_array_equal(variables["params"]["block_03"]["project"]["conv"]["kernel"], expected)
    layers.pop("mobl_predictions_x")
    layers["mobl_more_x"] = {"kernel": ONES}
    write_keras_2(tmp_path / "w.h5", layers)
    with pytest.raises(WeightsError, match="does not fit keras/"):
        load_weights(tmp_path / "w.h5")


def test_what_lies_in_another_file_is_not_followed(tmp_path):
    secret, path = tmp_path / "secret.bin", tmp_path / "w.weights.h5"
    secret.write_bytes(bytes(8))
    write_keras_3(tmp_path / "other.h5", {"conv": [ONES]})

    def link_external(file):
        file["layers/a/vars/0"] = h5py.ExternalLink("other.h5", "/layers/layer_0/vars/0")

    def link_soft(file):
        file["layers/a/vars/0"] = h5py.SoftLink("/x")

    def store_external(file):
        file.create_dataset("layers/a/vars/0", (2,), np.float32, external=[(str(secret), 0, 8)])

    def link_group(file):
        file["layers"] = h5py.ExternalLink("other.h5", "/layers")

    def map_virtually(file):
        layout = h5py.VirtualLayout((2,), np.float32)
        layout[:] = h5py.VirtualSource("other.h5", "/layers/layer_0/vars/0", (2,))
        file.create_virtual_dataset("layers/a/vars/0", layout)

    for write in (link_external, link_soft, store_external, link_group, map_virtually):
        with h5py.File(path, "w") as file:
            write(file)
        with pytest.raises(WeightsError, match=r"it has no (dataset|group) '.*' in|lies in another file"):
            read_tensors(path)


def test_arrays_larger_than_the_file_are_never_read(tmp_path):
    path = tmp_path / "w.weights.h5"
    with h5py.File(path, "w") as file:  # allocated when written: a few kB on the disk
        file.create_dataset("layers/a/vars/0", (1 << 20, 1 << 20), np.float32, chunks=(1024, 1024), compression="gzip")
    with pytest.raises(WeightsError, match=r"its array .* of shape \[1048576, 1048576\] is larger than the file"):
        read_tensors(path)
    with zipfile.ZipFile(tmp_path / "w.keras", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.weights.h5", bytes(10_000_000))
    with pytest.raises(WeightsError, match="is larger than the file"):
        read_tensors(tmp_path / "w.keras")


def test_a_length_that_hdf5_would_believe_takes_no_memory(tmp_path):
    path = tmp_path / "w.weights.h5"
    write_keras_3(path, {"a_name_of_27_characters____": [ONES]})
    data = path.read_bytes()
    descriptor = struct.pack("<IQ", 27, data.index(b"GCOL"))  # of the string: its length, and the heap it is in
    assert data.count(descriptor) == 1
    path.write_bytes(data.replace(descriptor, struct.pack("<IQ", 4_000_000_000, data.index(b"GCOL"))))
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    with pytest.raises(WeightsError, match=r"w\.weights\.h5 cannot be read: it is damaged or not a Keras file"):
        read_tensors(path)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < max(before + 1, 300_000)  # kB


def test_a_crash_and_a_hang_of_the_library_are_a_sentence(tmp_path, monkeypatch):
    write_keras_3(tmp_path / "w.h5", {"a": [ONES]})
    monkeypatch.setattr(hdf5.sys, "executable", "/bin/false")
    with pytest.raises(WeightsError, match="HDF5's library crashed on it, with code 1"):
        read_tensors(tmp_path / "w.h5")
    (tmp_path / "works").write_text("#!/bin/sh\nkill -XCPU $$\n")
    (tmp_path / "works").chmod(0o755)
    monkeypatch.setattr(hdf5.sys, "executable", str(tmp_path / "works"))
    with pytest.raises(WeightsError, match=r"did not finish reading it in 10 s of CPU time"):
        read_tensors(tmp_path / "w.h5")
    (tmp_path / "sleeps").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "sleeps").chmod(0o755)
    monkeypatch.setattr(hdf5.sys, "executable", str(tmp_path / "sleeps"))
    monkeypatch.setattr(hdf5, "_SECONDS", 0.2)
    with pytest.raises(WeightsError, match=r"did not finish reading it in 0\.2 s"):
        read_tensors(tmp_path / "w.h5")


def test_hdf5_of_something_else_is_refused(tmp_path):
    with h5py.File(tmp_path / "w.h5", "w") as file:
        file["data"] = ONES
    with pytest.raises(WeightsError, match="it has no group 'layers'"):
        read_tensors(tmp_path / "w.h5")


def test_names_repeated_15_000_times_are_refused(tmp_path):
    path = tmp_path / "w.h5"
    for name, count in (("layer_names", 4_000), ("layer_names", 15_000), ("weight_names", 15_000)):
        with h5py.File(path, "w") as file:
            group = file.create_group("a")
            group["k"] = ONES
            file.attrs["layer_names"] = np.array([b"a"] * (count if name == "layer_names" else 1))
            group.attrs["weight_names"] = np.array([b"k"] * (count if name == "weight_names" else 1))
        begun = time.monotonic()
        with pytest.raises(WeightsError, match=r"has two tensors called 'a/k'|has more than 5,000 names"):
            read_tensors(path)
        assert time.monotonic() - begun < 10


def test_models_in_each_other_have_an_end(tmp_path):
    with h5py.File(tmp_path / "w.h5", "w") as file:
        inner = file.create_group("layers/a/layers")
        inner["a"] = file["layers/a"]  # a hard link to itself
    with pytest.raises(WeightsError, match="it has more than 8 models in each other"):
        read_tensors(tmp_path / "w.h5")


@pytest.mark.skipif(shutil.which("ps") is None, reason="it needs the command ps, which macOS has")
def test_memory_is_watched_where_the_system_does_not_limit_it(tmp_path, monkeypatch):
    write_keras_3(tmp_path / "w.h5", {"a": [ONES]})
    monkeypatch.setattr(hdf5, "_WATCH", True)
    assert list(read_tensors(tmp_path / "w.h5")[0]) == ["a/kernel"]
    (tmp_path / "grows").write_text(
        f"#!{sys.executable}\nimport time\nmemory = bytearray(400_000_000)\ntime.sleep(60)\n"
    )
    (tmp_path / "grows").chmod(0o755)
    monkeypatch.setattr(hdf5.sys, "executable", str(tmp_path / "grows"))
    with pytest.raises(WeightsError, match=r"HDF5's library took more than 250,\d+,\d+ bytes of memory"):
        read_tensors(tmp_path / "w.h5")
