"""Print docs/config.md, the table of all keys of a config: python -m benchmarks.config_page > docs/config.md

Defaults and meanings are from configs/base.py and its comments, the valid values and units from the table that checks
them.
"""

import re
from pathlib import Path
from typing import Any

from configs import base
from mobilenet_jax.training.rules import RULES

BASE = Path(__file__).parents[1] / "configs" / "base.py"
HEAD = """# Config keys

These are all keys of a config, from `configs/base.py`. `--config.KEY=VALUE` overrides a key. A value that is not valid
is refused before the run begins. A default of none means that the key is not set. `benchmarks/config_page.py` writes
this page.
"""


def read_comments(text: str) -> dict[str, str]:
    """Return the comment of each key in the text of base.py: the lines above it, then the rest of its own line."""
    comments, above = {}, []
    for line in text.splitlines():
        if found := re.match(
            r"    (?:config\.)?([a-z_]+(?:\.\w+)*) = (?!.*ConfigDict)(?:[^#\"]|\"[^\"]*\")*(?:# (.*))?$", line
        ):
            comments[found[1]] = " ".join([*above, found[2] or ""]).strip()
        found = re.match(r"    # (.*)", line)
        above = [*above, found[1]] if found else []
    return comments


def _get_default(config: Any, key: str) -> str:
    for part in key.split("."):
        config = config[part]
    return "none" if config is None else repr(config)


def make_page(text: str) -> str:
    """Return the page for the text of base.py."""
    config, comments = base.get_config(), read_comments(text)
    lines = [HEAD]
    section = None
    for key, rule in RULES.items():
        if (first := key.partition(".")[0] if "." in key else "") != section:
            section = first
            lines += [
                f"\n## {section or 'The run'}\n",
                "| key | default | valid | unit | meaning |",
                "|---|---|---|---|---|",
            ]
        cells = (f"`{key}`", f"`{_get_default(config, key)}`", rule.valid, rule.unit, comments[key])
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


if __name__ == "__main__":
    print(make_page(BASE.read_text()), end="")
