"""Compare answers with other frameworks: `python benchmarks/parity.py [FOLDER_OF_CASES] [--case=NAME] [--json]`.

A case is a folder with a framework's weights and its answers to inputs (`case*.npz`: input, logits, features if there
are any); `benchmarks/transformers_cases.py` writes some. A row has the largest difference of any tensor over the
largest absolute value of the reference. The limit is 1e-4.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mobilenet_jax import load_weights
from mobilenet_jax.models.layers import LOWERINGS

LIMIT = 1e-4
CASES = Path(__file__).resolve().parents[2] / "shared" / "fixtures"


def compare_case(folder: Path, case: str, *, lowering: str, file: str | None = None) -> dict[str, float]:
    """Return {tensor: largest absolute difference over the reference's largest absolute value} of a case file."""
    meta = json.loads((folder / "meta.json").read_text())
    weights = folder / (file or next(iter(meta["weights"])))
    model, variables, _ = load_weights(weights, f"{meta['framework']}/{meta['name']}", lowering=lowering)
    with np.load(folder / case) as arrays:
        reference = {name: arrays[name] for name in arrays if name == "logits" or name.startswith("features_")}
        images = arrays["input"]
    names = tuple(name.removeprefix("features_") for name in reference if name != "logits")
    answers: Any = jax.jit(model.clone(precision="highest").apply, static_argnames="features")(
        variables, images, features=names
    )
    logits, features = answers if names else (answers, {})
    found = {"logits": logits, **{f"features_{name}": values for name, values in features.items()}}
    return {name: float(np.abs(found[name] - value).max() / np.abs(value).max()) for name, value in reference.items()}


def main() -> int:
    """Print the table; return the exit code, 1 if a difference is above the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=CASES, help="default: %(default)s")
    parser.add_argument("--case", default="*", help="pattern for the names of cases; default: all")
    parser.add_argument("--json", action="store_true", help="print the difference of every tensor as JSON")
    flags = parser.parse_args()
    rows = {}
    if not flags.json:
        print(f"{'case':<32}{'input':<15}{'lowering':<10}{'logits':>10}{'features':>10}")
    for folder in sorted(path.parent for path in flags.folder.glob(f"{flags.case}/meta.json")):
        for case in sorted(path.name for path in folder.glob("case*.npz")):
            for lowering in LOWERINGS:
                found = rows[f"{folder.name}/{case}/{lowering}"] = compare_case(folder, case, lowering=lowering)
                features = [value for name, value in found.items() if name != "logits"]
                if not flags.json:
                    what = f"{folder.name:<32}{case:<15}{lowering:<10}"
                    last = f"{max(features):.1e}" if features else "-"
                    print(f"{what}{found['logits']:>10.1e}{last:>10}", flush=True)
    if flags.json:
        print(json.dumps(rows))
    worst = max((max(found.values()) for found in rows.values()), default=np.inf)
    print(f"largest difference: {worst:.1e} of the reference's largest value; limit: {LIMIT:.0e}", file=sys.stderr)
    return int(not worst <= LIMIT)


if __name__ == "__main__":
    sys.exit(main())
