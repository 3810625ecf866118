"""Config files: read with the overrides of a command line, and made flat. No JAX here."""

import difflib
import sys
from pathlib import Path

from mobilenet_jax.cli.exit_codes import UsageError


def split_overrides(argv: list[str]) -> tuple[list[str], list[str]]:
    """(all other arguments, those that override a key of the config)."""
    overrides = [argument for argument in argv if argument.startswith("--config.")]
    return [argument for argument in argv if argument not in overrides], overrides


def load_config(path: str, overrides: list[str]):
    """The locked config of a file `path[:argument]` with overrides applied.

    Raises UsageError, naming what would be valid, for a missing file, a misspelt key or a value of another type.
    """
    from absl import flags
    from ml_collections import config_flags

    file = Path(path.split(":")[0])
    if not file.is_file():
        known = ", ".join(sorted(str(p) for p in file.parent.glob("*.py") if p.stem not in ("base", "datasets")))
        raise UsageError(f"{file} is not a file; valid: {known or 'the path of a config file'}")
    # Config files import each other as `configs.NAME`, from wherever the command runs; those of studies lie deeper.
    folders = file.absolute().parents
    sys.path.insert(0, str(next((f for f in folders if f.name == "configs"), folders[0]).parent))

    def read(arguments: list[str]):
        command = ["main", f"--config={path}", *arguments]
        values = flags.FlagValues()
        config_flags.DEFINE_config_file("config", flag_values=values, lock_config=True, sys_argv=command)
        values(command)
        return values.config

    try:
        config = read([])
    except (flags.Error, AttributeError, ImportError, SyntaxError, TypeError, ValueError) as error:
        # What a config file raises comes with its traceback in the message.
        said = str(error).strip().splitlines()[-1].removeprefix("ValueError: ")
        raise UsageError(f"{path}: {said}") from error
    for override in overrides:
        _check_override(config, override)
    try:
        return read(overrides)
    except (flags.Error, TypeError, ValueError) as error:
        raise UsageError(f"{' '.join(overrides)}: {error}") from error


def _check_override(config, override: str) -> None:
    name, equals, _ = override.partition("=")
    if not equals:
        raise UsageError(f"{override} has no value; write {override}=VALUE")
    section, walked = config, "--config"
    for part in name.split(".")[1:]:
        # A section, or a leaf that something is asked of.
        keys = sorted(section.keys()) if hasattr(section, "keys") else []
        if part not in keys:
            close = difflib.get_close_matches(part, keys, n=1)
            hint = f", did you mean {close[0]}?" if close else ""
            raise UsageError(f"{walked} has no key {part!r}{hint}; valid: {', '.join(keys) or 'none, it is a value'}")
        section, walked = section[part], f"{walked}.{part}"
    if hasattr(section, "keys"):
        raise UsageError(f"{walked} is a section; set one of its keys: {', '.join(sorted(section.keys()))}")


def apply_preprocessing(config, card: dict, overrides: list[str]) -> None:
    """Have images prepared as a card of weights says, but for what is overridden."""
    overridden = {override.partition("=")[0] for override in overrides}
    for key, value in card["preprocessing"].items():
        if f"--config.data.{key}" not in overridden:
            config.data[key] = tuple(value) if isinstance(value, list) else value
