"""Recipes of earlier versions: keys and values that have other names today.

A recipe file and the recipe.yaml of a run folder are read as if they had been written today, so that a file
of a user's own keeps working and a run goes on where it was. Nothing here imports torch.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Values = dict[str, Any]
Change = Callable[[Values], list[str]]
"""Brings values up to date in place; says what it renamed, one sentence without a full stop each."""


def upgrade(values: Mapping[str, Any]) -> tuple[Values, list[str]]:
    """Plain values of a recipe in the form of today, and what was renamed; values of today stay as they
    are."""
    found = _copy(values)
    return found, [note for change in CHANGES for note in change(found)]


def announce(file: object, notes: Sequence[str]) -> None:
    """One log line, on rank 0, for a file in which something was renamed."""
    if notes and os.environ.get("RANK", "0") == "0":
        import logging  # here, because most starts have nothing to say

        logging.getLogger(__name__).warning(
            "%s is of an earlier version; read with %s", file, ", ".join(notes)
        )


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _section(values: Values, *keys: str) -> Values | None:
    """A section inside of others, None where there is none."""
    found: Any = values
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else None


def _renamed(section: Values | None, where: str, before: str, after: str) -> list[str]:
    """Another name for a key of a section."""
    if section is None or before not in section or after in section:
        return []
    section[after] = section.pop(before)
    return [f"{where}.{before} as {where}.{after}"]


def _view(values: Values) -> list[str]:
    """The one view of before is one of several kinds; its key `view` is called `crop`."""
    view = _section(values, "data", "view")
    if view is None or "kind" in view:
        return []
    view["kind"] = "squash"
    notes = ["data.view as data.view.kind=squash"]
    if renamed := _renamed(view, "data.view", "view", "crop"):
        view["crop"] = {"random_resized_crop": "random", "resize": "none"}.get(view["crop"], view["crop"])
        notes = [*notes, *renamed]
    return notes


def _tokenizer(values: Values) -> list[str]:
    """A tokenizer has the name of what it does, not that of a model."""
    tokenizer = _section(values, "data", "tokenizer")
    if tokenizer is None or tokenizer.get("kind", "bert") != "bert":
        return []
    given = "kind" in tokenizer
    tokenizer["kind"] = "wordpiece"
    return ["data.tokenizer.kind=bert as wordpiece"] if given else []


def _region_images(values: Values) -> list[str]:
    """Streams of regions."""
    found = []
    for name in ("regions", "train"):
        found += _renamed(_section(values, "data", name), f"data.{name}", "pictures", "images")
    return found


def _gather_gradient(values: Values) -> list[str]:
    if values.get("gather_gradient") != "full":
        return []
    values["gather_gradient"] = "sum"
    return ["gather_gradient=full as sum"]


def _answers(values: Values) -> list[str]:
    """`max_tokens` of written answers; that of the benchmark is of the question."""
    answers = _section(values, "answers")
    if answers is None or answers.get("mode") != "generate" or "answer_tokens" in answers:
        return []
    return _renamed(answers, "answers", "max_tokens", "answer_tokens")


def _heat(values: Values) -> list[str]:
    """The layer of heat maps had a default."""
    heat = _section(values, "heat")
    if heat is None or "layer" in heat:
        return []
    heat["layer"] = 9
    return ["heat.layer=9"]


CHANGES: tuple[Change, ...] = (_view, _tokenizer, _region_images, _gather_gradient, _answers, _heat)
