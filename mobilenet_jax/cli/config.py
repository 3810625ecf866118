"""Config files and their overrides on the command line. Nothing here imports JAX."""

import difflib
import sys
from pathlib import Path

from mobilenet_jax.cli.exit_codes import UsageError


def split_overrides(argv: list[str]) -> tuple[list[str], list[str]]:
    """Return the arguments without the overrides, and the overrides --config.KEY=VALUE."""
    overrides = [argument for argument in argv if argument.startswith("--config.")]
    return [argument for argument in argv if argument not in overrides], overrides


def load_config(path: str, overrides: list[str]):
    """Load the locked config of a file `path[:argument]`, with overrides applied.

    Raises UsageError for a missing file, a file that raises, a misspelt key or a value of another type. Its sentence
    names the valid choices.
    """
    from absl import flags
    from ml_collections import config_flags

    file = Path(path.split(":")[0])
    if not file.is_file():
        known = ", ".join(sorted(str(p) for p in file.parent.glob("*.py") if p.stem not in ("base", "datasets")))
        raise UsageError(f"{file} is not a file; valid: {known or 'the path of a config file'}")
    # Config files import each other as `configs.NAME`, so the parent of `configs` must be on the path, wherever the
    # command runs and however deep in `configs` the file lies.
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
        config.keys()  # if the file raised an OSError, ml_collections raises it here
    except Exception as error:  # a config file is the user's code, and may raise anything
        # A message of absl contains the whole traceback of the config file; its last line is the error.
        said = (str(error).strip().splitlines() or ["no message"])[-1].removeprefix("ValueError: ")
        kind = "" if isinstance(error, flags.Error | ValueError) else f"{type(error).__name__}: "
        raise UsageError(f"{path}: {kind}{said}") from error
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
        # A value has no keys: `--config.seed.x=1` is refused with "none, it is a value".
        keys = sorted(section.keys()) if hasattr(section, "keys") else []
        if part not in keys:
            close = difflib.get_close_matches(part, keys, n=1)
            hint = f", did you mean {close[0]}?" if close else ""
            raise UsageError(f"{walked} has no key {part!r}{hint}; valid: {', '.join(keys) or 'none, it is a value'}")
        section, walked = section[part], f"{walked}.{part}"
    if hasattr(section, "keys"):
        raise UsageError(f"{walked} is a section; set one of its keys: {', '.join(sorted(section.keys()))}")


def apply_preprocessing(config, card: dict, overrides: list[str]) -> None:
    """Copy the preprocessing of a weights card into the config, except for keys that are overridden."""
    overridden = {override.partition("=")[0] for override in overrides}
    for key, value in card["preprocessing"].items():
        if f"--config.data.{key}" not in overridden:
            config.data[key] = tuple(value) if isinstance(value, list) else value
