import random
import resource

import pytest

from benchmarks.mutate import IMAGES, mutate, read_image, try_file, write_image
from mobilenet_jax.data.image_files import list_images


def test_folders_give_their_images_at_any_depth_in_order(tmp_path):
    wanted = [tmp_path / name for name in ("b.JPG", "c.webp", "a/2.png", "a/10.jpeg", "z/y/x.png")]
    for path in [*wanted, tmp_path / "notes.txt", tmp_path / "._b.jpg", tmp_path / "z" / "x.npy"]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / "z" / "loop").symlink_to(tmp_path)
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    expected = ["b.JPG", "c.webp", "loop.png", "a/10.jpeg", "a/2.png", "z/y/x.png"]
    assert list_images([tmp_path]) == [tmp_path / name for name in expected]
    other = tmp_path / "notes.txt"  # given by name, a file is an image whatever it is called
    assert list_images([other, str(tmp_path / "a")]) == [other, *(tmp_path / "a" / n for n in ("10.jpeg", "2.png"))]


@pytest.mark.parametrize("name", IMAGES)
def test_mutated_images_are_read_or_refused_in_a_sentence(tmp_path, name):
    """A dozen of each; benchmarks/mutate.py makes thousands."""
    source = tmp_path / name
    write_image(source)
    data, before = source.read_bytes(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes, path = [], tmp_path / f"mutated{source.suffix}"
    for i in range(12):
        path.write_bytes(mutate(data, random.Random(f"{name} {i}")))
        outcomes.append(try_file(path, read_image))
    assert "refused" in outcomes
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # kB
