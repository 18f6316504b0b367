"""Two-way maps between the tensor names of a checkpoint source and ours.

An `Adapter` is an ordered tuple of explicit rows. Every row is linear and can be undone, so one adapter
serves three purposes: reading an official state dict (`to_ours`), writing one (`to_source`), and mapping a
dict of gradients to the source's names for comparison (`gradients=True`). Names are templates: `{i}` stands
for one component of a dotted name, `{rest...}` for one or more of them.

    Adapter((
        Fuse(("layers.{i}.q.{p}", "layers.{i}.k.{p}", "layers.{i}.v.{p}"), "blocks.{i}.attention.qkv.{p}"),
        Rename("layers.{i}.fc1.{p}", "blocks.{i}.mlp.up.{p}"),
        Rename("cls_token", "class_token", leading=2),
        Tied("decoder.weight", of="embeddings.word.weight"),
        Buffer("position_ids", lambda: torch.arange(197)[None]),
        Drop("head.{rest...}"),
    ))

For every name the first row that matches decides.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


class CheckpointError(ValueError):
    """A checkpoint cannot be read, does not fit the model, or does not follow its source's layout."""


_PLACEHOLDER = re.compile(r"\{(\w+)(\.\.\.)?\}")


def _pattern(template: str) -> re.Pattern[str]:
    """`a.{i}.{rest...}` as a regular expression with named groups; a repeated placeholder must repeat its
    text."""
    parts: list[str] = []
    seen: set[str] = set()
    end = 0
    for found in _PLACEHOLDER.finditer(template):
        parts.append(re.escape(template[end : found.start()]))
        name, rest = found.groups()
        parts.append(f"(?P={name})" if name in seen else f"(?P<{name}>{'.+' if rest else '[^.]+'})")
        seen.add(name)
        end = found.end()
    parts.append(re.escape(template[end:]))
    return re.compile("".join(parts))


def _fill(template: str, values: Mapping[str, str]) -> str:
    return _PLACEHOLDER.sub(lambda found: values[found.group(1)], template)


def _placeholders(template: str) -> set[str]:
    return {found.group(1) for found in _PLACEHOLDER.finditer(template)}


def _same_placeholders(*templates: str) -> None:
    first, *others = templates
    for other in others:
        if _placeholders(first) != _placeholders(other):
            raise ValueError(f"rows must be reversible: {first!r} and {other!r} have different placeholders")


@dataclass(frozen=True)
class Rename:
    """One tensor under another name; `leading` is the number of axes of length one in front that only the
    source has."""

    source: str
    ours: str
    leading: int = 0

    def __post_init__(self) -> None:
        _same_placeholders(self.source, self.ours)


@dataclass(frozen=True)
class Fuse:
    """Several equally shaped tensors of the source, joined along axis 0 in the order given, are one of
    ours."""

    sources: tuple[str, ...]
    ours: str

    def __post_init__(self) -> None:
        _same_placeholders(self.ours, *self.sources)


@dataclass(frozen=True)
class Tied:
    """A second name, in the source, of the tensor the source calls `of`; values must be equal when both are
    there.

    A source that holds only this name is read as if it stood under `of`. Gradients have it under `of` only.
    """

    source: str
    of: str

    def __post_init__(self) -> None:
        _same_placeholders(self.source, self.of)


@dataclass(frozen=True)
class Buffer:
    """A tensor the source stores and we compute: ignored when reading, made by `make()` when writing.
    `source` is a plain name."""

    source: str
    make: Callable[[], Tensor]


@dataclass(frozen=True)
class Drop:
    """Names of the source that have no counterpart here and are ignored on purpose; they cannot be written
    back."""

    source: str


Rule = Rename | Fuse | Tied | Buffer | Drop


class Translation(NamedTuple):
    """What `Adapter.translate` found: our state, and the source's names that no row mentions."""

    ours: dict[str, Tensor]
    unmatched: tuple[str, ...]


@dataclass(frozen=True)
class Adapter:
    """Ordered rows that map the names of one checkpoint source to ours and back."""

    rules: tuple[Rule, ...]

    def __add__(self, other: "Adapter") -> "Adapter":
        return Adapter(self.rules + other.rules)

    def prefixed(self, *, source: str = "", ours: str = "") -> "Adapter":
        """The same rows with a prefix (`"vision_encoder."`) before every name of either side."""
        return Adapter(tuple(_prefixed(rule, source, ours) for rule in self.rules))

    def to_ours(self, state: Mapping[str, Tensor], *, gradients: bool = False) -> dict[str, Tensor]:
        """State dict of the source -> ours. Raises `CheckpointError` for a name that no row mentions.

        `gradients`: the dict holds gradients of some of the parameters (the source's buffers and second names
            are absent).
        """
        ours, unmatched = self.translate(state, gradients=gradients)
        if unmatched:
            raise CheckpointError(
                f"{len(unmatched)} tensors are unknown to this adapter: {groups(unmatched)}"
            )
        return ours

    def translate(self, state: Mapping[str, Tensor], *, gradients: bool = False) -> Translation:
        """As `to_ours`, with the unknown names returned instead of raised."""
        ours: dict[str, Tensor] = {}
        origin: dict[str, str] = {}
        unmatched: list[str] = []
        parts: dict[str, tuple[tuple[str, ...], dict[int, Tensor]]] = {}

        def place(name: str, tensor: Tensor, key: str) -> None:
            if name in ours:
                raise CheckpointError(f"{key} and {origin[name]} both stand for our {name}")
            ours[name], origin[name] = tensor, key

        for key, tensor in self._untied(state).items():
            found = self._find_source(key)
            if found is None:
                unmatched.append(key)
                continue
            rule, position, values = found
            match rule:
                case Rename():
                    place(_fill(rule.ours, values), _strip_leading(tensor, rule.leading, key), key)
                case Fuse():
                    name = _fill(rule.ours, values)
                    keys = tuple(_fill(template, values) for template in rule.sources)
                    mine = parts.setdefault(name, (keys, {}))[1]
                    mine[position] = tensor
                    if len(mine) == len(keys):
                        place(name, _join([mine[i] for i in range(len(keys))], keys), key)
                case Buffer() if gradients:
                    raise CheckpointError(f"{key} is a buffer and has no gradient")
                case Buffer() | Drop() | Tied():
                    pass
        for name, (keys, mine) in parts.items():
            if name not in ours:
                absent = [key for i, key in enumerate(keys) if i not in mine]
                raise CheckpointError(
                    f"{', '.join(absent)} missing: our {name} is made of {len(keys)} tensors of the source"
                )
        return Translation(ours, tuple(unmatched))

    def to_source(self, state: Mapping[str, Tensor], *, gradients: bool = False) -> dict[str, Tensor]:
        """Our state dict -> the source's, with its buffers and second names made again.

        Second names share memory with the first, as in the source. With `gradients`, buffers and second names
        are left out. Raises `CheckpointError` for a name that no row mentions.
        """
        source: dict[str, Tensor] = {}
        unmatched: list[str] = []
        for name, tensor in state.items():
            found = self._find_ours(name)
            if found is None:
                unmatched.append(name)
                continue
            rule, values = found
            if isinstance(rule, Rename):
                source[_fill(rule.source, values)] = tensor.reshape((1,) * rule.leading + tuple(tensor.shape))
            else:
                if len(tensor) % len(rule.sources):
                    raise CheckpointError(
                        f"{name} has {len(tensor)} rows, not divisible into {len(rule.sources)}: "
                        f"{rule.sources}"
                    )
                # Copies, not views: files of tensors that share one storage cannot be written as safetensors.
                source |= {
                    _fill(template, values): part.clone()
                    for template, part in zip(rule.sources, tensor.chunk(len(rule.sources)), strict=True)
                }
        if unmatched:
            raise CheckpointError(
                f"{len(unmatched)} of our tensors are unknown to this adapter: {groups(unmatched)}"
            )
        if not gradients:
            for rule in self.rules:
                if isinstance(rule, Tied):
                    self._tie(rule, source)
                elif isinstance(rule, Buffer):
                    source[rule.source] = rule.make()
        return source

    def knows(self, name: str) -> bool:
        """Whether a row mentions this name of ours."""
        return self._find_ours(name) is not None

    @cached_property
    def _source_patterns(self) -> list[tuple[re.Pattern[str], Rule, int]]:
        return [
            (_pattern(template), rule, position)
            for rule in self.rules
            for position, template in enumerate(rule.sources if isinstance(rule, Fuse) else (rule.source,))
        ]

    @cached_property
    def _our_patterns(self) -> list[tuple[re.Pattern[str], Rename | Fuse]]:
        return [(_pattern(rule.ours), rule) for rule in self.rules if isinstance(rule, Rename | Fuse)]

    def _find_source(self, key: str) -> tuple[Rule, int, dict[str, str]] | None:
        for pattern, rule, position in self._source_patterns:
            if found := pattern.fullmatch(key):
                return rule, position, found.groupdict()
        return None

    def _find_ours(self, name: str) -> tuple[Rename | Fuse, dict[str, str]] | None:
        for pattern, rule in self._our_patterns:
            if found := pattern.fullmatch(name):
                return rule, found.groupdict()
        return None

    def _untied(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`state` with every second name checked against, or standing in for, the first."""
        source: dict[str, Tensor] = {}
        second: list[tuple[str, str]] = []
        for key, tensor in state.items():
            found = self._find_source(key)
            if found is not None and isinstance(found[0], Tied):
                second.append((key, _fill(found[0].of, found[2])))
            else:
                source[key] = tensor
        for key, first in second:
            tensor, other = state[key], source.setdefault(first, state[key])
            if (
                tensor is not other
                and not (tensor.is_meta or other.is_meta)
                and not torch.equal(tensor, other)
            ):
                raise CheckpointError(f"{key} and {first} must be one tensor (tied) but differ")
        return source

    def _tie(self, rule: Tied, source: dict[str, Tensor]) -> None:
        pattern = _pattern(rule.of)
        for key in list(source):
            if found := pattern.fullmatch(key):
                source[_fill(rule.source, found.groupdict())] = source[key]


def _prefixed(rule: Rule, source: str, ours: str) -> Rule:
    match rule:
        case Rename():
            return replace(rule, source=source + rule.source, ours=ours + rule.ours)
        case Fuse():
            return replace(rule, sources=tuple(source + name for name in rule.sources), ours=ours + rule.ours)
        case Tied():
            return replace(rule, source=source + rule.source, of=source + rule.of)
        case Buffer() | Drop():
            return replace(rule, source=source + rule.source)


def _strip_leading(tensor: Tensor, leading: int, key: str) -> Tensor:
    if tensor.ndim < leading or any(length != 1 for length in tensor.shape[:leading]):
        raise CheckpointError(
            f"{key} has shape {list(tensor.shape)}, expected {leading} leading axes of length 1"
        )
    return tensor.reshape(tensor.shape[leading:])


def _join(tensors: list[Tensor], keys: tuple[str, ...]) -> Tensor:
    if len({tensor.shape for tensor in tensors}) > 1:
        found = ", ".join(f"{key} {list(tensor.shape)}" for key, tensor in zip(keys, tensors, strict=True))
        raise CheckpointError(f"these must have one shape: {found}")
    return torch.cat(tensors)


def groups(names: Iterable[str]) -> str:
    """Names summed up by prefix: `vision.stages (12, such as vision.stages.0.norm.weight), temperature
    (1)`."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(".".join(name.split(".")[:2]), []).append(name)
    return ", ".join(
        f"{prefix} ({len(members)}{'' if members == [prefix] else f', such as {members[0]}'})"
        for prefix, members in found.items()
    )
