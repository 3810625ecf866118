"""The page of the format web: what its folder holds, and what it answers in a browser."""

import base64
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.export_table import draw_variables
from mobilenet_jax import export_weights
from mobilenet_jax.data.transforms import resize_and_center_crop
from mobilenet_jax.exporting import litertjs
from mobilenet_jax.exporting.contract import read_exported
from mobilenet_jax.exporting.litertjs import LiteRTJSError, install_litertjs, read_litertjs
from mobilenet_jax.exporting.report import format_report
from mobilenet_jax.inference.predict import predict
from mobilenet_jax.models.network import MobileNet
from mobilenet_jax.models.spec import Conv, Spec
from mobilenet_jax.weights.card import IMAGENET
from tests.cards import make_test_card
from tests.exporting.chromium import find_chromium, open_page, serve

SIZE = 32


@pytest.fixture(scope="module")
def weights():
    """A network of two convolutions, for photographs."""
    spec = Spec(name="tiny", stem=Conv(filters=8, stride=2), blocks=(), head=Conv(filters=16, stride=2), num_classes=7)
    card = make_test_card(
        spec,
        name="tiny/<photos>",
        preprocessing=replace(IMAGENET, image_size=SIZE),
        class_names=["cat", "dog", "<b>bold</b>", "tea & cake", "ship", "snail", "Zürich"],
    )
    return MobileNet(spec), draw_variables(spec), card


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Smooth pictures of several sizes, as PNG."""
    folder, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for i, (width, height) in enumerate([(150, 101), (90, 160), (32, 32)]):
        small = Image.fromarray(rng.integers(256, size=(6, 8, 3), dtype=np.uint8))
        small.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def exported(weights, photographs, tmp_path_factory):
    """(folder, report) of a page that compares float with int8; the files of LiteRT.js are empty."""
    out, calibration = tmp_path_factory.mktemp("page"), str(photographs[0].parent)
    with pytest.MonkeyPatch.context() as patch:
        places = [place for place, _ in litertjs._FILES.values()]
        patch.setattr(litertjs, "read_litertjs", lambda *, offline: dict.fromkeys(places, b""))
        report = export_weights(weights, format="web", out=out, quantize="int8", calibration=calibration)
    return out, report


@pytest.fixture
def npm_folder(tmp_path, monkeypatch):
    """A folder with files that stand for LiteRT.js, an empty cache, and no npm."""
    files, modules = {}, tmp_path / "installed" / "node_modules"
    for name, (place, _) in litertjs._FILES.items():
        data = f"file {name}".encode()
        (modules / name).parent.mkdir(parents=True, exist_ok=True)
        (modules / name).write_bytes(data)
        files[name] = (place, hashlib.sha256(data).hexdigest())
    monkeypatch.setattr(litertjs, "_FILES", files)
    monkeypatch.setattr(litertjs, "CACHE", tmp_path / "cache")
    monkeypatch.setenv("PATH", str(tmp_path))
    return modules.parent


def _install_npm(folder: Path, script: str) -> None:
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755)


def test_litertjs_is_kept_and_checked(npm_folder, tmp_path):
    with pytest.raises(
        LiteRTJSError, match="npm, which fetches it, is not installed; install npm, or run `npm install"
    ):
        read_litertjs()
    with pytest.raises(LiteRTJSError, match=r"is not in .*cache, and downloads are off"):
        read_litertjs(offline=True)
    install_litertjs(npm_folder)
    files = read_litertjs(offline=True)
    assert files["wasm-utils/index.js"] == b"file @litertjs/wasm-utils/dist/index.js"
    kept = tmp_path / "cache" / "@litertjs/core/dist/index.js"
    kept.write_text("damaged")
    with pytest.raises(LiteRTJSError, match="is not in"):
        read_litertjs(offline=True)
    install_litertjs(npm_folder / "node_modules")
    assert read_litertjs() == files


def test_npm_is_called_once_and_what_it_fetches_is_checked(npm_folder, tmp_path):
    _install_npm(tmp_path, "echo 'npm error code E404' >&2; exit 1")
    with pytest.raises(LiteRTJSError, match=r"npm could not fetch LiteRT.js: npm error code E404"):
        read_litertjs()
    # $5 is the folder of --prefix.
    copy = f'/bin/cp -r {npm_folder}/node_modules "$5"; echo "$@" >> {tmp_path}/calls'
    _install_npm(tmp_path, f'{copy}; echo changed > "$5/node_modules/@litertjs/core/dist/index.js"')
    with pytest.raises(
        LiteRTJSError, match=r"what npm fetched has another @litertjs/core/dist/index.js than release 2"
    ):
        read_litertjs()
    assert not (tmp_path / "cache").exists()
    _install_npm(tmp_path, copy)
    assert read_litertjs() == read_litertjs()
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 2
    assert calls[1].startswith("install @litertjs/core@2.5.3 @litertjs/wasm-utils@2.5.3 --prefix")
    assert "--ignore-scripts" in calls[1]


@pytest.mark.parametrize(("change", "said"), [("remove", "has no"), ("write", "has another")])
def test_another_litertjs_is_refused(npm_folder, change, said):
    file = npm_folder / "node_modules/@litertjs/core/wasm/litert_wasm_internal.js"
    file.unlink() if change == "remove" else file.write_text("another release")
    with pytest.raises(LiteRTJSError, match=f"{said} @litertjs/core/wasm/litert_wasm_internal.js"):
        install_litertjs(npm_folder)


def test_the_report_of_a_page_has_both_networks(exported):
    out, report = exported
    assert report == json.loads((out / "report.json").read_text())
    assert report["models"]["none"]["max_difference"] < 1e-5
    assert report["models"]["int8"]["simulation_equal"] == 1.0
    assert {"QUANTIZE", "DEQUANTIZE"} <= report["models"]["int8"]["operations"].keys()  # float ends
    lines = format_report(report).splitlines()
    assert [line.split()[1] for line in lines if line.startswith("file ")] == [
        "models/tiny_photos_.tflite",
        "models/tiny_photos__int8.tflite",
    ]
    assert lines[-1] == f"open it: python -m http.server --directory {out}"


def test_the_folder_is_whole_and_asks_no_other_server(exported):
    out, _ = exported
    entries = json.loads((out / "models.json").read_text())["models"]
    assert [entry["label"] for entry in entries] == ["float32", "int8"]
    assert [(out / entry["file"]).stat().st_size for entry in entries] == [entry["bytes"] for entry in entries]
    assert all(json.loads((out / e["contract"]).read_text())["input"]["shape"] == [1, SIZE, SIZE, 3] for e in entries)
    page = {path.name: path.read_text() for path in out.iterdir() if path.suffix in (".html", ".js", ".css", ".svg")}
    addresses = set(re.findall(r"https?://[\w.]+", "".join(page.values())))
    assert addresses == {"http://www.w3.org", "http://localhost"}  # of SVG, and in the advice to start a server
    imports = json.loads(re.findall(r'<script type="importmap">(.*?)</script>', page["index.html"], re.DOTALL)[0])
    named = [*imports["imports"].values(), *re.findall(r'(?:href|src)="([^"]+)"', page["index.html"])]
    named += re.findall(r'(?:from|register\() ?"(\./[^"]+|\w+\.js)"', "".join(page.values()))
    assert len(named) >= 9
    assert [name for name in named if not (out / name).is_file()] == []
    assert all(f'id="{name}"' in page["index.html"] for name in re.findall(r'\$\("([\w-]+)"\)', page["page.js"]))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"quantize": "int8"}, "quantize int8 needs calibration"),
        ({"batch": 2}, "preprocess, float_ends and batch are not for the format web"),
        ({"preprocess": True}, "preprocess, float_ends and batch are not for the format web"),
    ],
)
def test_a_page_that_cannot_be_made_leaves_no_file(npm_folder, weights, tmp_path, options, said):
    install_litertjs(npm_folder)
    with pytest.raises(ValueError, match=said):
        export_weights(weights, format="web", out=tmp_path / "page", **options)
    assert not (tmp_path / "page").exists()


@pytest.fixture(scope="module")
def browser(exported, tmp_path_factory):
    """(the page in Chromium, a function that stops its server)."""
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("Chromium is not installed")
    try:
        runtime = read_litertjs(offline=True)
    except LiteRTJSError as error:
        pytest.skip(f"{error}; an export with --format=web fetches it")
    for place, data in runtime.items():
        (exported[0] / "litertjs" / place).write_bytes(data)
    server = serve(exported[0])
    address = server.__enter__()
    stopped = []

    def stop() -> None:
        if not stopped:
            stopped.append(True)
            server.__exit__(None, None, None)

    try:
        with open_page(chromium, tmp_path_factory.mktemp("profile")) as page:
            page.resize(390, 844)
            page.open(address)
            page.wait("document.body?.dataset.state === 'ready'")
            yield page, stop
    finally:
        stop()


def _read_answers(page) -> list[list[tuple[str, float]]]:
    """The answers of each network that the page shows."""
    shown = page.evaluate(
        "[...document.querySelectorAll('.network')].map((card) => [...card.querySelectorAll('li')].map("
        "(line) => [line.querySelector('.name').textContent, Number(line.dataset.probability)]))"
    )
    return [[tuple(line) for line in card] for card in shown]


def _show(page, photograph: Path) -> None:
    page.choose_file("#file", photograph)
    page.wait("document.body.dataset.state === 'answered'")
    page.evaluate("document.body.dataset.state = ''")


def test_the_page_answers_as_jax(browser, weights, photographs):
    page, _ = browser
    for photograph, wanted in zip(photographs, predict(weights, photographs), strict=True):
        _show(page, photograph)
        (answers,) = _read_answers(page)
        assert [name for name, _ in answers] == [answer.name for answer in wanted.answers]
        np.testing.assert_allclose([p for _, p in answers], [a.probability for a in wanted.answers], atol=1e-5)
        assert wanted.answers[0].name in page.evaluate("document.getElementById('status').textContent")


def test_the_pixels_of_the_page_are_those_of_pillow(browser):
    page, _ = browser
    rng = np.random.default_rng(1)
    cases, wanted = [], []
    for height, width in ((90, 61), (61, 90), (32, 32), (20, 31), (200, 40), (101, 37)):
        for interpolation in ("bilinear", "bicubic", "nearest"):
            for crop_share, squash in ((0.875, False), (1.0, True)):
                image = rng.integers(256, size=(height, width, 3), dtype=np.uint8)
                wanted.append(
                    resize_and_center_crop(
                        image, SIZE, crop_share=crop_share, interpolation=interpolation, squash=squash
                    )
                )
                rgba = np.dstack([image, np.full((height, width), 255, np.uint8)])
                card = {"image_size": SIZE, "crop_share": crop_share, "interpolation": interpolation, "squash": squash}
                data = base64.b64encode(rgba.tobytes()).decode()
                cases.append({"width": width, "height": height, "data": data, "card": card})
    got = page.evaluate(
        f"""import("./pixels.js").then(({{ resizeAndCrop }}) => {json.dumps(cases)}.map((given) => {{
          const data = Uint8ClampedArray.from(atob(given.data), (letter) => letter.charCodeAt(0));
          return Array.from(resizeAndCrop({{ ...given, data }}, given.card));
        }}))"""
    )
    for case, pixels, expected in zip(cases, got, wanted, strict=True):
        np.testing.assert_array_equal(np.array(pixels).reshape(expected.shape), expected, err_msg=str(case["card"]))


def test_the_page_is_used_by_keyboard_and_compares_two_networks(browser, exported, photographs):
    page, _ = browser
    _show(page, photographs[1])
    page.evaluate("document.activeElement.blur()")
    reached = []
    for _ in range(3):
        page.press("Tab", 9)
        reached.append(page.evaluate("document.activeElement.id"))
    assert reached == ["file", "camera-button", "compare"]
    page.press(" ", 32)
    page.wait("document.querySelectorAll('.network').length === 2 && document.body.dataset.state === 'answered'")
    assert page.evaluate("document.activeElement.id") == "compare"
    ours, int8 = _read_answers(page)
    (wanted,) = predict(read_exported(exported[0] / "models" / "tiny_photos__int8.tflite"), [photographs[1]])
    np.testing.assert_allclose([p for _, p in int8], [a.probability for a in wanted.answers], atol=1e-5)
    assert [name for name, _ in int8] == [answer.name for answer in wanted.answers]
    assert ours != int8
    assert "answers are in both lists" in page.evaluate("document.getElementById('difference').textContent")
    page.press(" ", 32)
    page.wait("document.querySelectorAll('.network').length === 1")


def test_the_camera_is_answered_until_a_photo_is_taken(browser):
    page, _ = browser
    page.evaluate("document.getElementById('networks').replaceChildren()")
    page.evaluate("document.getElementById('camera-button').click()")
    page.wait("document.querySelectorAll('.network li').length === 5")
    shown = "['photo', 'camera', 'shoot', 'choose'].filter((id) => document.getElementById(id).offsetHeight)"
    assert page.evaluate(shown) == ["camera", "shoot"]
    assert page.evaluate("document.activeElement.id") == "shoot"
    assert page.evaluate("document.getElementById('status').ariaLive") == "off"
    page.press("\r", 13)
    page.wait("document.body.dataset.state === 'answered'")
    assert page.evaluate(shown) == ["photo", "choose"]
    assert page.evaluate("document.activeElement.id") == "camera-button"
    page.evaluate("document.getElementById('camera-button').click()")
    page.wait("document.getElementById('shoot').offsetHeight > 0")
    page.press("Escape", 27)
    page.wait("document.getElementById('choose').offsetHeight > 0")
    assert page.evaluate("document.getElementById('camera').srcObject === null")


def test_the_page_says_what_it_cannot_read_and_fits_a_phone(browser, photographs, tmp_path):
    page, _ = browser
    (tmp_path / "no picture.png").write_text("text")
    page.choose_file("#file", tmp_path / "no picture.png")
    page.wait("document.body.dataset.state === 'failed'")
    said = page.evaluate("document.querySelector('[role=alert]:not([hidden])').textContent")
    assert said == "no picture.png is no picture that this browser can read."
    _show(page, photographs[0])
    assert page.evaluate("document.getElementById('error').hidden")
    page.resize(320, 640)
    assert page.evaluate("document.documentElement.scrollWidth") == 320
    low = (
        "[...document.querySelectorAll('button, .button')].filter((b) => b.offsetHeight && b.offsetHeight < 44).length"
    )
    assert page.evaluate(low) == 0
    assert not [message for message in page.messages if "adapters" not in message]  # of WebGPU, which nothing uses


def test_the_page_opens_without_its_server(browser, exported, photographs):
    page, stop = browser
    names = [f"models/{path.name}" for path in (exported[0] / "models").iterdir()]
    page.wait(f"Promise.all({names}.map((name) => caches.match(name))).then((kept) => kept.every(Boolean))")
    _show(page, photographs[2])
    answers = _read_answers(page)
    stop()
    page.evaluate("document.body.dataset.state = 'old'")
    page.call("Page.reload")
    page.wait("document.body?.dataset.state === 'ready'")
    _show(page, photographs[2])
    assert _read_answers(page) == answers
