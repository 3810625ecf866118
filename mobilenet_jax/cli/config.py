"""Config files and their overrides on the command line. Nothing here imports JAX."""

import difflib
import re
import runpy
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mobilenet_jax.cli.exit_codes import UsageError
from mobilenet_jax.cli.recipes import find_config, find_recipes, make_importable

# {function of a config file: what a file without it is}
_WITHOUT = {"get_config": "it is not a config file", "sweep": "it is the config of a run, not of a study"}
_LISTED = 6  # keys in a message
_LETTERS = 300  # of the message of an error in a config file


def split_overrides(argv: list[str]) -> tuple[list[str], list[str]]:
    """Return the arguments without the overrides, and the overrides as --config.KEY=VALUE.

    The value of an override may be the next argument: --config.KEY VALUE.
    """
    arguments, overrides, waits = [], [], False
    for argument in argv:
        if waits and not argument.startswith("--"):
            overrides[-1] += f"={argument}"
            waits = False
        elif argument.startswith("--config."):
            overrides.append(argument)
            waits = "=" not in argument
        else:
            arguments.append(argument)
            waits = False
    return arguments, overrides


def load_config(path: str, overrides: list[str]):
    """Load the locked config of `path[:argument]`, with overrides applied.

    `path` is a config file or the name of a recipe, such as `v2`. Raises UsageError for a missing file, a file that
    raises, a config that has not the keys of configs/base.py, a misspelt key or a value of another type. Its sentence
    names the valid choices.
    """
    from absl import flags
    from ml_collections import config_flags

    argument = path.partition(":")[2]
    config = run_config_file(path, "get_config", *filter(None, [argument]))
    _check_keys(path, config)
    for override in overrides:
        _check_override(config, override)
    command, values = ["main", *overrides], flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=command)
        values(command)
    except (flags.Error, TypeError, ValueError) as error:
        raise UsageError(f"{' '.join(overrides)}: {error}") from error
    return values.config


def run_config_file(path: str, function: str, *arguments: str) -> Any:
    """Run the config file of `path[:argument]`, and return what its function returns for the arguments.

    The file may import the recipes as `configs`. Raises UsageError, in one sentence, if the file raises or has no such
    function.
    """
    file = find_config(path)
    make_importable(file)
    try:
        found = runpy.run_path(str(file))
        if function in found:
            return found[function](*arguments)
    except Exception as error:  # a config file is the user's code, and may raise anything
        raise UsageError(f"{path}: {_describe_error(error, file)}") from error
    raise UsageError(f"{path} has no {function}(): {_WITHOUT[function]}")


def _describe_error(error: Exception, file: Path) -> str:
    """Describe in one line what a config file raised, and where."""
    # An AttributeError of ml_collections has a KeyError inside, whose message may list all values of the config.
    inner = error.args[0] if error.args and isinstance(error.args[0], KeyError) else error
    text = str(inner.args[0]) if inner.args else ""
    if isinstance(inner, KeyError) and (key := re.match(r"(?:Key \"(\w+)\" does not exist|'(\w+)'(?:\n|$))", text)):
        close = re.search(r'Did you mean "(\w+)"', text)
        said = f"the config has no key {key[1] or key[2]!r}{f', did you mean {close[1]}?' if close else ''}"
    else:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        said = kind + (str(error).strip().splitlines() or ["no message"])[0][:_LETTERS]
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return f"{said} (line {lines[-1]})" if lines else said


def _check_keys(path: str, config: Any) -> None:
    """Raise UsageError unless a config has the keys of configs/base.py: all of them, and no other."""
    start = "start from base.get_config() of `from configs import base`"
    if not hasattr(config, "keys"):
        raise UsageError(f"{path}: get_config() returns {type(config).__name__}; {start}")
    base = runpy.run_path(str(find_recipes() / "base.py"))["get_config"]()
    known, given = set(_list_keys(base)), set(_list_keys(config))
    if missing := known - given:
        raise UsageError(f"{path}: the config has no {_shorten(missing)}; {start}")
    if unknown := given - known:
        raise UsageError(f"{path}: the config has {_shorten(unknown)}, which configs/base.py does not have; {start}")


def _list_keys(section: Any, prefix: str = "") -> Iterator[str]:
    for name in section.keys():  # noqa: SIM118 (a ConfigDict gives references for its items)
        value = section[name]
        if hasattr(value, "keys"):
            yield from _list_keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _shorten(keys: Iterable[str]) -> str:
    ordered = sorted(keys)
    more = f" and {len(ordered) - _LISTED} more keys" if len(ordered) > _LISTED else ""
    return f"{', '.join(ordered[:_LISTED])}{more}"


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
