"""Weights of other frameworks and of our own: downloaded, read, checked, converted and written."""

FORMATS = ("safetensors", "torchvision", "timm")  # that `save_weights` writes; the first is ours
CLASSIFIERS = ("keep", "drop")  # what `load_weights` can do with the layers behind the pooling
_MESSAGE_LIMIT = 2000  # characters


class WeightsError(ValueError):
    """Weights that cannot be used. The message is one printable sentence, whatever names and values it quotes."""

    def __init__(self, message: str):
        super().__init__(printable(message, limit=_MESSAGE_LIMIT))


def printable(text: str, *, limit: int = 100) -> str:
    """Return text that came from a file with at most `limit` characters, and control characters escaped.

    Terminals obey control characters, and a file can hold megabytes in a name.
    """
    cut = text[:limit]
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)
    return escaped if len(text) <= limit else f"{escaped}... ({len(text):,} characters)"
