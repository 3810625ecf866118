"""The page of config keys."""

from pathlib import Path

from benchmarks import config_page
from mobilenet_jax.training.rules import RULES

PAGE = Path(__file__).parents[2] / "docs" / "config.md"


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == config_page.make_page(config_page.BASE.read_text())


def test_each_key_has_a_comment():
    comments = config_page.read_comments(config_page.BASE.read_text())
    assert comments.keys() == RULES.keys()
    assert all(comments.values())
    assert comments["data.pad"] == 'pixels, for crop="pad"'
    assert comments["optim.decay_rules"].startswith("(pattern, factor) for parameter paths")
