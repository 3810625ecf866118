"""A spec as JSON, as it stands in weight files and checkpoints. No JAX here."""

import dataclasses
from typing import get_args, get_origin, get_type_hints

from mobilenet_jax.models.spec import Conv, Row, Spec, check_choice

_ROWS_LIMIT = 1_000  # the largest network has 53


def to_json(spec: Spec) -> dict:
    """Return the spec as plain data."""
    rows = [{"name": name, "kind": type(row).__name__, **dataclasses.asdict(row)} for name, row, _ in spec.rows()]
    fields = dataclasses.asdict(spec)
    return {**{k: v for k, v in fields.items() if k not in ("stem", "blocks", "head")}, "rows": rows}


def from_json(data: dict) -> Spec:
    """Return the spec that `to_json` wrote; raise ValueError, naming the key, for anything else."""
    kinds = {kind.__name__: kind for kind in get_args(Row)}
    rows: dict[str, Row] = {}
    if not isinstance(data.get("rows"), list):
        raise ValueError("it has no list of rows")
    if len(data["rows"]) > _ROWS_LIMIT:
        raise ValueError(f"it has {len(data['rows']):,} rows; valid: at most {_ROWS_LIMIT:,}")
    for i, row in enumerate(data["rows"]):
        if not isinstance(row, dict) or not isinstance(row.get("name"), str):
            raise ValueError(f"row {i} has no name")
        check_choice(f"kind of row {row['name']}", row.get("kind"), tuple(kinds))
        rows[row["name"]] = _read_fields(kinds[row["kind"]], row, f"row {row['name']}")
    if not isinstance(rows.get("stem"), Conv):
        raise ValueError("its rows have no stem")
    head = rows.pop("head", None)
    stem, *blocks = rows.values()
    spec = _read_fields(Spec, {**data, "stem": stem, "blocks": tuple(blocks), "head": head}, "spec")
    if [name for name, _, _ in spec.rows()][: len(rows)] != list(rows):
        raise ValueError(f"rows are called {', '.join(rows)}; valid: stem, block_00, block_01, ...")
    return spec


# Fields that older files lack, with the values that those networks have.
_NEW_FIELDS = {"sum_activation": "linear"}


def _read_fields(cls: type, data: dict, where: str):
    """Return `cls` with the entries of `data`, each checked by its field's type; dicts become nested dataclasses."""
    hints, values = get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        valid = get_args(hints[field.name]) or (hints[field.name],)
        value = data.get(field.name, _NEW_FIELDS.get(field.name))
        nested = [kind for kind in valid if dataclasses.is_dataclass(kind)]
        if isinstance(value, dict) and len(nested) == 1:
            value = _read_fields(nested[0], value, f"{where}.{field.name}")  # pyright: ignore[reportArgumentType]
        if type(value) is int and float in valid:
            value = float(value)
        if type(value) not in valid and get_origin(hints[field.name]) is not tuple:
            names = " or ".join(kind.__name__ for kind in valid)
            raise ValueError(f"{where}.{field.name} is {value!r}; valid: {names}")
        values[field.name] = value
    return cls(**values)
