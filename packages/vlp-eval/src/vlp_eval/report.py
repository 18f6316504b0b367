"""Results: what was measured, on what, and for every sample."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Result of one benchmark.

    `stages` maps the name of a stage ("dual", "reranked") to its numbers; recalls are in percent. `hits` holds the counts
    behind the recalls, `chance` the expectation of the same numbers for random scores, `counts` the sizes. `samples` has one
    entry per sample, in order of the gallery, so that two runs can be compared sample by sample. `notes` are sentences that a
    reader of the numbers has to know.
    """

    benchmark: str
    settings: Mapping[str, Any]
    counts: Mapping[str, int]
    stages: Mapping[str, Mapping[str, float]]
    hits: Mapping[str, Mapping[str, int]]
    chance: Mapping[str, float] = field(default_factory=dict)
    samples: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def metrics(self) -> Mapping[str, float]:
        """Numbers of the last stage: the result."""
        return list(self.stages.values())[-1]

    def json(self) -> str:
        """Everything as JSON text in ASCII, one sample per line; `Scores(**json.loads(text))` gives it back."""
        content = asdict(self)
        samples = content.pop("samples")
        head = json.dumps(content, indent=1, allow_nan=False)
        lists = [
            f" {json.dumps(name)}: [\n  "
            + ",\n  ".join(json.dumps(one, allow_nan=False) for one in each)
            + "\n ]"
            for name, each in samples.items()
        ]
        return head.removesuffix("\n}") + ',\n "samples": {\n' + ",\n".join(lists) + "\n }\n}\n"

    def table(self) -> str:
        """The numbers as text for a terminal: recalls in percent with two decimals, the counts behind them in a second line."""
        columns = [key for key in self.metrics if key in self.chance or key in ("r_mean", "rsum")]
        width = max([8, *(len(name) for name in self.stages)])
        rows = [["", *(_heading(key) for key in columns)]]
        for stage, numbers in self.stages.items():
            rows.append([stage, *(f"{numbers[key]:.2f}" for key in columns)])
            hits = self.hits[stage]
            rows.append(["  hits", *(str(hits[key]) if key in hits else "" for key in columns)])
        rows.append(["chance", *(f"{self.chance[key]:.2f}" if key in self.chance else "" for key in columns)])
        lines = [f"{self.benchmark}: " + ", ".join(f"{count} {name}" for name, count in self.counts.items())]
        lines += [f"{row[0]:<{width}}" + "".join(f"{cell:>9}" for cell in row[1:]).rstrip() for row in rows]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def _heading(key: str) -> str:
    """tr_r1 -> TR@1"""
    direction, _, k = key.partition("_r")
    return f"{direction.upper()}@{k}" if k.isdigit() else key
