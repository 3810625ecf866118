import collections
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from configs import base
from mobilenet_jax.data import transforms
from mobilenet_jax.data.decode import decode_image, open_croppable


def data_config(**values) -> Any:
    config: Any = base.get_config()
    config.data.update(values)
    return config.data


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)


def test_evaluation_equals_resize_then_crop_where_that_is_exact():
    # 64 x 96 to 32 / 0.5 = 64 on the shorter side is no resize at all: the crop is the middle 32 x 32.
    image = noise(64, 96)
    cropped = transforms.resize_and_center_crop(image, 32, crop_share=0.5, interpolation="bilinear")
    np.testing.assert_array_equal(cropped, image[16:48, 32:64])


PRESETS = {
    "torchvision_256": {"size": 224, "crop_share": 224 / 256, "interpolation": "bilinear"},
    "torchvision_232": {"size": 224, "crop_share": 224 / 232, "interpolation": "bilinear"},
    "timm_256_95_bicubic": {"size": 256, "crop_share": 0.95, "interpolation": "bicubic"},
    "timm_224_9_bicubic": {"size": 224, "crop_share": 0.9, "interpolation": "bicubic"},
    "keras_nearest": {"size": 224, "crop_share": 1.0, "interpolation": "nearest", "squash": True},
    "keras_bilinear": {"size": 224, "crop_share": 1.0, "interpolation": "bilinear", "squash": True},
}


@pytest.mark.parametrize(
    "photograph", ["astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg"]
)
@pytest.mark.parametrize("preset", PRESETS)
def test_trap_24_and_trap_25_photographs_are_prepared_as_the_frameworks_do(preset, photograph):
    """Rows and columns 3, 10, 17, ... of what they make of scikit-image's photographs, to a grey level.

    preprocessing.npz was written with Pillow 13.0: torchvision 0.29.1, MobileNet_V2_Weights.IMAGENET1K_V1 (256) and _V2
    (232) .transforms() with mean 0 and std 1, times 255; timm 1.0.31, create_transform((3, S, S), is_training=False,
    crop_pct=, interpolation=, mean=(0, 0, 0), std=(1, 1, 1)), times 255; Keras 3.15.1, utils.load_img(path,
    target_size=(224, 224), interpolation=). With that Pillow there is no difference at any pixel.
    """
    skimage = pytest.importorskip("skimage")
    image = decode_image(Path(skimage.__file__).parent / "data" / photograph, name=photograph)
    with np.load(Path(__file__).parent / "preprocessing.npz") as stored:
        golden = stored[f"{preset}_{Path(photograph).stem}"]
    result = transforms.resize_and_center_crop(image, **PRESETS[preset])[3::7, 3::7]
    assert np.abs(result.astype(int) - golden).max() <= 1


def test_an_extremely_long_image_is_resized_in_part_alone():
    image = np.repeat(noise(10, 100), 10, axis=1)  # aspect 100 of 10 pixels
    cut = transforms.resize_and_center_crop(image, 16, crop_share=0.8, interpolation="bilinear")
    whole = Image.fromarray(image).resize((2000, 20), Image.Resampling.BILINEAR)
    expected = np.asarray(whole)[2:18, 992:1008].astype(int)
    assert np.abs(cut - expected).max() <= 1
    long = np.zeros((1, 2**20, 3), np.uint8)  # to 224 pixels: 150 GB
    assert transforms.resize_and_center_crop(long, 224, crop_share=1.0, interpolation="bilinear").max() == 0


def test_trap_25_interpolation_is_antialiased_and_by_name():
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    small = transforms.resize_and_center_crop(stripes, 64, crop_share=1.0, interpolation="bilinear")
    assert np.abs(small[:, 4:-4].astype(int) - 127).max() <= 1  # sampling without a filter gives 0 or 255
    image = noise(64, 64)
    bilinear, bicubic = (
        transforms.resize_and_center_crop(image, 32, crop_share=1.0, interpolation=name)
        for name in ("bilinear", "bicubic")
    )
    assert np.abs(bilinear.astype(int) - bicubic).mean() > 1


def test_evaluation_upsamples_the_digits_size_and_survives_extreme_shapes():
    image = noise(8, 8)
    expected = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(
        transforms.resize_and_center_crop(image, 32, crop_share=1.0, interpolation="bilinear"), expected
    )
    for shape in ((1, 100_000), (100_000, 1), (1, 1), (3, 2)):
        for crop_share in (0.875, 1.0):
            result = transforms.resize_and_center_crop(
                noise(*shape), 224, crop_share=crop_share, interpolation="bicubic"
            )
            assert result.shape == (224, 224, 3)


def test_inception_crop_statistics():
    rng = np.random.default_rng(0)
    draws = [
        transforms.draw_crop((400, 600), rng, area_range=(0.08, 1.0), aspect_range=(3 / 4, 4 / 3))
        for _ in range(20_000)
    ]
    left, top, width, height = np.array(draws).T
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (left + width <= 600).all()
    assert (top + height <= 400).all()
    area, aspect = width * height / (400 * 600), width / height
    assert area.min() == pytest.approx(0.08, abs=0.005)
    assert aspect.min() > 0.74
    assert aspect.max() < 1.35
    # Areas up to 400 * 400 * 3/4 fit at any aspect in the range, so below that share they stay uniform.
    free = area[area < 0.5]
    counts = np.histogram(free, bins=6, range=(0.08, 0.5))[0]
    assert np.abs(counts / counts.mean() - 1).max() < 0.08
    # Log-uniform: the median of the freely drawn ones is 1.
    assert np.median(aspect[area < 0.5]) == pytest.approx(1.0, abs=0.01)
    # Places are uniform over what is left: the mean of left / (600 - width) is a half.
    assert (left / np.maximum(600 - width, 1))[area < 0.5].mean() == pytest.approx(0.5, abs=0.01)


def test_inception_crop_falls_back_to_the_centre():
    rng = np.random.default_rng(0)
    ranges = {"area_range": (1.0, 1.0), "aspect_range": (3 / 4, 4 / 3)}
    assert transforms.draw_crop((100, 1000), rng, **ranges) == (433, 0, 133, 100)
    assert transforms.draw_crop((1000, 100), rng, **ranges) == (0, 433, 100, 133)
    assert transforms.draw_crop((1, 1000), rng, **ranges)[3] == 1


def test_inception_crop_shows_the_drawn_rectangle():
    image = noise(40, 60)
    options: dict = {"area_range": (0.3, 0.6), "aspect_range": (0.5, 2.0)}
    left, top, width, height = transforms.draw_crop((40, 60), np.random.default_rng(3), **options)
    crop = Image.fromarray(image[top : top + height, left : left + width])
    expected = np.asarray(crop.resize((32, 32), Image.Resampling.BICUBIC))
    rng = np.random.default_rng(3)
    result = transforms.crop_inception(image, rng, size=32, interpolation="bicubic", flip=False, **options)
    np.testing.assert_array_equal(result, expected)


def test_fast_crops_draw_as_exact_ones():
    file = io.BytesIO()
    Image.fromarray(noise(160, 240)).save(file, "JPEG")
    jpeg = open_croppable(file.getvalue(), name="a", or_whole=True)
    assert jpeg is not None
    options: dict = {"area_range": (0.08, 1), "aspect_range": (3 / 4, 4 / 3), "interpolation": "bilinear", "flip": True}
    for seed in range(30):
        fast, exact = np.random.default_rng(seed), np.random.default_rng(seed)
        transforms.crop_inception(jpeg, fast, size=16, fast=True, **options)
        transforms.crop_inception(decode_image(file.getvalue(), name="a"), exact, size=16, **options)
        assert fast.bit_generator.state == exact.bit_generator.state


def test_shift_moves_every_way_equally_over_black():
    image = noise(6, 7) | 1  # no black pixel of its own
    rng = np.random.default_rng(0)
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    windows = {padded[y : y + 6, x : x + 7].tobytes(): (y, x) for y in range(5) for x in range(5)}
    counts = collections.Counter(windows[transforms.shift(image, rng, pad=2).tobytes()] for _ in range(5000))
    assert len(counts) == 25
    assert max(abs(count - 200) for count in counts.values()) < 5 * 200**0.5
    np.testing.assert_array_equal(transforms.shift(image, rng, pad=0), image)


@pytest.mark.parametrize("crop", ["resize", "inception"])
def test_flip_mirrors_half_of_the_images(crop):
    whole = {"crop": crop, "area_range": (1.0, 1.0), "aspect_range": (1.0, 1.0)}
    transform = transforms.make_train_transform(data_config(flip=True, **whole))
    image, rng = noise(32, 32), np.random.default_rng(0)
    flipped = 0
    for _ in range(2000):
        result = transform(image, rng)
        mirrored = np.array_equal(result, image[:, ::-1])
        assert mirrored or np.array_equal(result, image)
        flipped += mirrored
    assert flipped == pytest.approx(1000, abs=5 * 500**0.5)


def test_color_jitter_changes_by_at_most_its_strength():
    grey = np.full((8, 8, 3), 100, np.uint8)
    rng = np.random.default_rng(0)
    means = np.array([transforms.jitter_color(grey, rng, strength=0.4).mean() for _ in range(2000)])
    # On flat grey, contrast and saturation do nothing: what is left is the uniform brightness factor.
    assert 59 <= means.min() < 62
    assert 138 < means.max() <= 140
    assert means.mean() == pytest.approx(100, abs=1.5)
    np.testing.assert_array_equal(transforms.jitter_color(noise(8, 8), rng, strength=0.0), noise(8, 8))
    # Saturation: the spread between channels of a flat coloured image changes as well.
    red = np.full((8, 8, 3), (200, 100, 100), np.uint8)
    ratios = [
        np.ptp(out := transforms.jitter_color(red, rng, strength=0.4)[0, 0].astype(float)) / out.mean()
        for _ in range(200)
    ]
    assert max(ratios) / min(ratios) > 1.8


def test_color_jitter_order_is_random(monkeypatch):
    called = []

    def spy(name):
        original = getattr(ImageEnhance, name)
        monkeypatch.setattr(ImageEnhance, name, lambda image: called.append(name) or original(image))

    for name in ("Brightness", "Contrast", "Color"):
        spy(name)
    rng = np.random.default_rng(0)
    for _ in range(600):
        transforms.jitter_color(noise(4, 4), rng, strength=0.4)
    orders = collections.Counter(tuple(called[i : i + 3]) for i in range(0, len(called), 3))
    assert len(orders) == 6
    assert all(len(set(order)) == 3 for order in orders)
    assert all(60 < count < 145 for count in orders.values())


@pytest.mark.parametrize("name", transforms.OPERATIONS)
def test_randaugment_operations_grow_with_the_level(name):
    image = Image.fromarray(np.asarray(Image.fromarray(noise(8, 8)).resize((64, 64))))
    changes = []
    for level in (0.1, 0.9):
        result = transforms.OPERATIONS[name](image, level)
        assert result.size == image.size
        assert result.mode == "RGB"
        changes.append(np.abs(np.asarray(result).astype(int) - np.asarray(image)).mean())
    if name == "identity":
        assert changes == [0, 0]
    elif name in ("autocontrast", "equalize"):
        assert changes[0] == changes[1]
    else:
        assert changes[0] < changes[1]


def test_randaugment_operations_at_full_magnitude():
    image = noise(331, 331)
    apply = {
        name: np.asarray(operation(Image.fromarray(image), 1.0)) for name, operation in transforms.OPERATIONS.items()
    }
    np.testing.assert_array_equal(apply["posterize"], image & 0xF0)
    np.testing.assert_array_equal(apply["solarize"], 255 - image)
    np.testing.assert_array_equal(apply["translate_x"][:, :181], image[:, 150:])
    assert (apply["translate_x"][:, 182:] == 128).all()
    np.testing.assert_array_equal(apply["translate_y"][:181], image[150:])
    assert np.abs(apply["brightness"].astype(int) - np.minimum(image * 1.9, 255)).max() <= 1
    dark = np.asarray(transforms.OPERATIONS["brightness"](Image.fromarray(image), -1.0))
    assert np.abs(dark.astype(int) - image * 0.1).max() <= 1


def test_randaugment_draws_layers_with_probability():
    image, rng = noise(16, 16), np.random.default_rng(0)
    np.testing.assert_array_equal(
        transforms.apply_randaugment(image, rng, layers=2, magnitude=9, probability=0.0), image
    )

    def share_changed(**options):
        results = [transforms.apply_randaugment(image, rng, magnitude=9, **options) for _ in range(2000)]
        return np.mean([not np.array_equal(result, image) for result in results])

    one = share_changed(layers=1, probability=1.0)  # 13 of 14 operations change noise, nearly always
    assert 0.7 < one < 13 / 14 + 0.02
    assert share_changed(layers=1, probability=0.5) == pytest.approx(one / 2, abs=0.05)
    assert share_changed(layers=2, probability=0.5) == pytest.approx(1 - (1 - one / 2) ** 2, abs=0.05)


def test_erasing_rate_area_aspect_and_noise():
    image, rng = np.full((100, 100, 3), 7, np.uint8), np.random.default_rng(0)
    areas, aspects, filled = [], [], []
    for _ in range(4000):
        result = transforms.erase(image, rng, probability=0.25)
        changed = (result != 7).any(axis=2)
        if changed.any():
            rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
            h, w = np.ptp(rows) + 1, np.ptp(columns) + 1
            areas.append(h * w / 10_000)
            aspects.append(h / w)
            filled.append(result[changed].ravel())
    assert len(areas) == pytest.approx(1000, abs=5 * (4000 * 0.25 * 0.75) ** 0.5)
    assert min(areas) == pytest.approx(0.02, abs=0.003)
    assert max(areas) < 0.34
    assert np.mean(areas) == pytest.approx((0.02 + 0.33) / 2, abs=0.012)
    assert 0.28 < min(aspects) < 0.36
    assert 2.8 < max(aspects) < 3.5
    assert np.exp(np.mean(np.log(aspects))) == pytest.approx(1, abs=0.08)
    noise_values = np.concatenate(filled)
    assert noise_values.mean() == pytest.approx(127.5, abs=1)
    assert noise_values.std() == pytest.approx(73.9, abs=1)
    assert (image == 7).all()  # the argument is never written to


EVERYTHING = {
    "crop": "inception",
    "flip": True,
    "color_jitter": 0.4,
    "randaugment_layers": 2,
    "erasing": 0.5,
    "image_size": 24,
}


@pytest.mark.parametrize("crop", transforms.CROPS)
def test_an_example_is_a_function_of_its_generator(crop):
    transform = transforms.make_train_transform(data_config(**{**EVERYTHING, "crop": crop}))
    image = noise(50, 70)
    image.flags.writeable = False
    results = [transform(image, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert all(result.shape == (24, 24, 3) and result.dtype == np.uint8 for result in results)
    np.testing.assert_array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])


def test_training_without_augmentation_is_evaluation():
    config = data_config(crop="resize", crop_share=0.875, interpolation="bicubic", image_size=28)
    image = noise(50, 70)
    trained = transforms.make_train_transform(config)(image, np.random.default_rng(0))
    np.testing.assert_array_equal(trained, transforms.make_eval_transform(config)(image))


def test_random_crops_are_never_sampled_without_a_filter():
    image, configs = noise(50, 70), [data_config(crop="inception", interpolation=i) for i in ("nearest", "bilinear")]
    one, other = (transforms.make_train_transform(c).augment(image, np.random.default_rng(0)) for c in configs)
    np.testing.assert_array_equal(one, other)
