"""METEOR and SPICE, which exist as Java programs only: pycocoevalcap (the extra `vlp-eval[caption-java]`)
runs them.

METEOR 1.5 works with Java 8 to 17 and holds 2 GB; SPICE wants Java 8 to 11 and downloads 400 MB of models at
its first use.
"""

import shutil
from collections.abc import Hashable, Mapping, Sequence
from importlib import import_module
from typing import Any, TypeVar

from vlp_eval.metrics.captioning import Corpus, tokenized

Id = TypeVar("Id", bound=Hashable)

_PROGRAMS = {
    "meteor": ("pycocoevalcap.meteor.meteor", "Meteor"),
    "spice": ("pycocoevalcap.spice.spice", "Spice"),
}


def judge(
    captions: Mapping[Id, str], references: Mapping[Id, Sequence[str]], metrics: Sequence[str]
) -> dict[str, Corpus]:
    """Each metric of captions against their references, as fractions: of the set, and of each id in order of
    the references.

    Raises ValueError for an unknown metric, and where the package or Java is missing.
    """
    programs = {name: _program(name) for name in metrics}
    ids = list(references)
    guess = tokenized({one: [captions[one]] for one in ids})
    truth = tokenized(references)
    # The programs read texts by key and take the keys' order for their own.
    lines = [{one: [" ".join(words) for words in texts[one]] for one in ids} for texts in (truth, guess)]
    found = {}
    for name, program in programs.items():
        value, each = program.compute_score(*lines)
        if name == "spice":
            each = [one["All"]["f"] for one in each]
        found[name] = Corpus(float(value), [float(one) for one in each])
    return found


def _program(name: str) -> Any:
    if name not in _PROGRAMS:
        raise ValueError(f"metric {name!r} is not known; choose among {', '.join(_PROGRAMS)}")
    if shutil.which("java") is None:
        raise ValueError(f"{name} needs Java, which is not installed here; leave it out of java=[...]")
    module, program = _PROGRAMS[name]
    try:
        return getattr(import_module(module), program)()
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{name} needs the package {error.name}: install vlp-eval[caption-java], or leave it out of "
            "java=[...]"
        ) from error
