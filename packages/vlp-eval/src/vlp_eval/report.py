"""Results: what was measured, on what, and for every sample."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Result of one benchmark.

    `results` maps the name of a result ("dual", "reranked") to its numbers, in percent; empty where nothing
    could be compared with the truth. `hits` holds the counts behind them, `chance` what one gets without
    looking (the benchmark says how), `counts` the sizes. `samples` has one entry per sample, in order of the
    data, so that two runs can be compared sample by sample. `notes` are sentences that a reader of the
    numbers has to know. `shown` names the numbers of the table; empty shows all.
    """

    benchmark: str
    settings: Mapping[str, Any]
    counts: Mapping[str, int]
    results: Mapping[str, Mapping[str, float]]
    hits: Mapping[str, Mapping[str, int]]
    chance: Mapping[str, float] = field(default_factory=dict)
    samples: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    notes: Sequence[str] = ()
    shown: Sequence[str] = ()

    @property
    def metrics(self) -> Mapping[str, float]:
        """Numbers of the last result, which counts. Empty without one."""
        return list(self.results.values())[-1] if self.results else {}

    @classmethod
    def read(cls, text: str) -> "Scores":
        """Scores of the text that `json` made, in this version or an earlier one, which called `results`
        stages. Raises ValueError for another text."""
        try:
            content = json.loads(text)
            if "stages" in content:
                content["results"] = content.pop("stages")
            return cls(**content)
        except (TypeError, AttributeError, json.JSONDecodeError) as problem:
            raise ValueError(f"this is no report of vlp-eval: {problem}") from problem

    def json(self) -> str:
        """Everything as JSON text in ASCII, one sample per line; `Scores.read` gives it back."""
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
        """The numbers as text for a terminal: in percent with two decimals, the counts behind them in a
        second line."""
        columns = list(self.shown or self.metrics)
        first = max([8, *(len(name) for name in self.results)])
        rows = [["", *(_heading(key) for key in columns)]]
        for result, numbers in self.results.items():
            rows.append([result, *(f"{numbers[key]:.2f}" for key in columns)])
            hits = self.hits.get(result)
            if hits is not None:
                rows.append(["  hits", *(str(hits[key]) if key in hits else "" for key in columns)])
        if self.chance:
            rows.append(
                ["chance", *(f"{self.chance[key]:.2f}" if key in self.chance else "" for key in columns)]
            )
        widths = [max(9, 2 + max(len(row[n]) for row in rows)) for n in range(1, len(rows[0]))]
        lines = [f"{self.benchmark}: " + ", ".join(f"{count} {name}" for name, count in self.counts.items())]
        for row in rows if self.results else ():
            cells = "".join(f"{cell:>{width}}" for cell, width in zip(row[1:], widths, strict=True))
            lines.append(f"{row[0]:<{first}}{cells}".rstrip())
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def _heading(key: str) -> str:
    """tr_r1 -> TR@1"""
    direction, _, k = key.partition("_r")
    return f"{direction.upper()}@{k}" if k.isdigit() else key
