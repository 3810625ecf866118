"""The classes of weights and those of a data set: the same classes, in another order perhaps."""

from collections.abc import Sequence


def match_classes(known: Sequence[str] | None, count: int, names: Sequence[str], *, data: str) -> list[int]:
    """Return, for each class of the data, the index of the same class among the `count` classes of the weights.

    Classes are matched by name if the weights know their names. Folders of ImageNet are named by WordNet numbers, whose
    order is the order of the classes. Raises ValueError unless data and weights have the same classes.
    """
    if len(names) != count:
        raise ValueError(f"{data} has {len(names)} classes and the weights {count}; they must be the same classes")
    is_wordnet = all(len(name) == 9 and name[0] == "n" and name[1:].isdecimal() for name in names)
    if known is None or list(known) == list(names) or (is_wordnet and count == 1000):
        return list(range(count))
    if odd := sorted(set(names) ^ set(known)):
        raise ValueError(
            f"the classes of {data} and of the weights differ: only one of them has {', '.join(odd[:4])}"
            f"{f' and {len(odd) - 4} more' if len(odd) > 4 else ''}"
        )
    return [list(known).index(name) for name in names]


def reorder_classes(variables: dict, order: Sequence[int]) -> dict:
    """Return the variables with a classifier whose class i is class `order[i]` of the given one."""
    classifier = {name: leaf[..., order] for name, leaf in variables["params"]["classifier"].items()}
    return {**variables, "params": {**variables["params"], "classifier": classifier}}
