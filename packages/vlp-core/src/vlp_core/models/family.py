"""A family of models as a row: its stages of training, its official files, and how one stage follows another.

A package that brings a family declares its row in pyproject.toml, and so does this one for its own:

    [project.entry-points."vlp.models"]
    mine = "my_package.family:FAMILY"

The name of the entry point is that of the family. Rows are read when somebody asks for them; nothing
registers itself at import.

Words. A *stage* is a stage of training ("pretrain", "vqa"): it decides which model is made. An *ability* is
what a model can be evaluated on ("retrieval", "vqa"). A *layout* is a set of names for tensors and stages
that several families may share, so that a model of one starts from exports of another.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, NamedTuple

from torch import Tensor, nn

from vlp_core.weights.adapter import CheckpointError
from vlp_core.weights.files import Checkpoint
from vlp_core.weights.loading import LoadReport

GROUP = "vlp.models"
"""Group of the entry points that name families."""


class Description(NamedTuple):
    """What an export folder or an official file holds.

    family, stage, arguments: Those of `vlp_core.models.create`.
    view: How images are made for the model: a `kind` with its options, as `vlp_data.views` reads it; None
        where nothing is known.
    reading: How texts become ids: `tokenizer` (`kind`, and `files` as full paths; empty where a file holds no
        vocabulary), `vocabulary` (how many ids the model knows), and where it is known `clean`, `max_words`,
        `max_tokens`, `separator`. None for a model without text.
    settings: What else config.json holds, such as `concepts` (how concepts are read) and `prompt`.
    """

    family: str
    stage: str
    arguments: dict[str, Any]
    view: dict[str, Any] | None
    reading: dict[str, Any] | None
    settings: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage of training of a family.

    name: Unique in its layout.
    create: Makes the model of the stage, with initial values, from keyword arguments that JSON can hold.
    starts_from: Names of the stages whose models it can start from.
    abilities: What its models can be evaluated on, because all that it needs was trained.
    derive: Its arguments from those of the model of pre-training; by default the same.
    """

    name: str
    create: Callable[..., nn.Module]
    starts_from: tuple[str, ...]
    abilities: tuple[str, ...] = ()
    derive: Callable[[Mapping[str, Any]], dict[str, Any]] = dict


@dataclass(frozen=True, kw_only=True)
class Official:
    """The checkpoint files that the authors of a family publish. `state` are the tensors of such a file.

    recognise: `recognise(state)`: whether a file is of this family, whatever the stage.
    stage: `stage(state)`: of which stage; raises CheckpointError where no stage fits.
    describe: `describe(checkpoint, arguments)`: what the file holds; `arguments` None infers them from
        shapes and from the config beside the tensors, and raises CheckpointError for what nothing tells.
    load: `load(model, state, stage=, name=)` fills a model of the same stage.
    start: `start(model, state, stage=, teacher=, queue=, name=)` starts a model of `stage` from the same or
        an earlier stage, and with it a momentum teacher and a queue of features where they are not None.
    write: `write(path, model, teacher=None, queue=None)` makes such a file.

    `name` is what messages call the file. `load` and `start` return the report of
    `vlp_core.models.start_from`, and raise CheckpointError where a file does not fit.
    """

    recognise: Callable[[Mapping[str, Tensor]], bool]
    stage: Callable[[Mapping[str, Tensor]], str]
    describe: Callable[[Checkpoint, Mapping[str, Any] | None], Description]
    load: Callable[..., LoadReport]
    start: Callable[..., LoadReport]
    write: Callable[..., None]


class Earlier(NamedTuple):
    """Stage and arguments of an export folder that an earlier version wrote."""

    stage: str
    arguments: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models.

    name: As that of its entry point.
    about: One line for people, with the paper.
    stages: Its stages of training.
    layout: Names of tensors and stages: a model starts from exports of any family with its layout.
    start: `start(model, state, stage=, found=, name=)` brings the tensors of an export (our names, described
        by `found`) to a model of `stage`, which follows the stage of the export. Returns a `LoadReport`;
        raises CheckpointError where they do not fit.
    official: Its official files; None where there are none.
    earlier: `earlier(model, arguments)`: stage and arguments of an export folder that named no family, from
        the `model` and `arguments` of its config.json; None where it belongs to another family. Families that
        are younger than such folders leave it out.
    """

    name: str
    about: str
    stages: tuple[Stage, ...]
    layout: str
    start: Callable[..., LoadReport]
    official: Official | None = None
    earlier: Callable[[str, Mapping[str, Any]], Earlier | None] | None = None

    def stage(self, name: str) -> Stage:
        """The stage of that name.

        Raises:
            ValueError: A name that the family does not have.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        known = ", ".join(stage.name for stage in self.stages)
        raise ValueError(f"stage {name!r} is not known; the stages of {self.name} are {known}")


def families() -> Mapping[str, EntryPoint]:
    """Installed families by name, in alphabetical order; no row is loaded for it.

    Raises:
        ValueError: Two packages that bring a family of one name.
    """
    found: dict[str, EntryPoint] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        if point.name in found:
            raise ValueError(
                f"family {point.name!r} is brought by {found[point.name].value} and by {point.value} "
                f"(entry points {GROUP}); uninstall one of their packages"
            )
        found[point.name] = point
    return found


def find(name: str) -> Family:
    """The row of a family.

    Raises:
        ValueError: A name that is not known, or an entry point that names no `Family` of its name.
    """
    points = families()
    if name not in points:
        raise ValueError(
            f"family {name!r} is not known; "
            + (f"choose among {', '.join(points)}" if points else f"no package brings one ({GROUP})")
        )
    row = points[name].load()
    if not isinstance(row, Family) or row.name != name:
        found = f"the family {row.name!r}" if isinstance(row, Family) else f"a {type(row).__name__}"
        raise ValueError(
            f"entry point {GROUP} {name} = {points[name].value} must name its Family, not {found}"
        )
    return row


def every() -> list[Family]:
    """The rows of all installed families, in alphabetical order."""
    return [find(name) for name in families()]


def require_start(found: str, wanted: str, starts_from: Collection[str], name: str) -> None:
    """Refuse to start a model of the stage `wanted` from a checkpoint `name` of a stage that it does not
    follow.

    Raises:
        CheckpointError: With the stages that it follows.
    """
    if found not in starts_from:
        raise CheckpointError(
            f"{name} is a {found} checkpoint; a {wanted} model starts from {' or '.join(starts_from)}"
        )
