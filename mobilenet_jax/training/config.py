"""A config as flat, plain data."""

import json
from collections.abc import Iterator
from typing import Any


def flatten_config(config) -> dict[str, Any]:
    """{"optim.name": "sgd", ...} as JSON gives it back."""

    def walk(section: dict, prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in section.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", value

    return json.loads(json.dumps(dict(walk(config.to_dict(), ""))))
