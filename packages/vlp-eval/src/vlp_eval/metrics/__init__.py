"""Metrics: functions of arrays, lists and ids; none of them sees a model."""

from collections.abc import Collection, Hashable


def same_ids(
    first: Collection[Hashable], second: Collection[Hashable], first_name: str, second_name: str
) -> None:
    """Raise ValueError unless both hold the same ids, at least one: a sample left out or added would change
    the result unseen."""
    if not second:
        raise ValueError(f"no {second_name}: a share of nothing is not defined")
    for ids, others, name, other_name in (
        (first, second, first_name, second_name),
        (second, first, second_name, first_name),
    ):
        known = set(others)
        rest = [one for one in ids if one not in known]
        if rest:
            raise ValueError(
                f"{len(rest)} of the {name} are not among the {other_name}, the first is {rest[0]!r}"
            )
