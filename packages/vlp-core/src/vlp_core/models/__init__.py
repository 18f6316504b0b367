"""Assembled models of all installed families: made by name, written to and read from export folders.

A family is a row (`vlp_core.models.family`), found through entry points; what stands here knows none by name.
The format of export folders is `vlp_core.models.export`'s.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from vlp_core.models import companions, export
from vlp_core.models.family import Description, Family, Official, Stage, every, families, find, require_start
from vlp_core.momentum import FeatureQueue
from vlp_core.weights import Checkpoint, CheckpointError, LoadReport, read, read_checkpoint
from vlp_core.weights import load as load_weights
from vlp_core.weights.adapter import groups

__all__ = [
    "Description",
    "Family",
    "Loaded",
    "Official",
    "Stage",
    "create",
    "derive",
    "describe",
    "families",
    "find",
    "load",
    "save",
    "start_from",
]


class Loaded(NamedTuple):
    """A model in evaluation mode, and what else its checkpoint says: the fields of `Description`."""

    model: nn.Module
    family: str
    stage: str
    arguments: dict[str, Any]
    view: dict[str, Any] | None
    reading: dict[str, Any] | None
    settings: dict[str, Any]


def create(family: str, stage: str, /, **arguments: Any) -> nn.Module:
    """Make the model of a stage of training, with initial values.

    Args:
        family: Name of an installed family (`families`).
        stage: Name of one of its stages.
        arguments: What the stage's `create` takes; all that JSON can hold.

    Raises:
        ValueError: A family or stage that is not known, sizes that do not fit.
        TypeError: An argument that the model does not take.
    """
    return find(family).stage(stage).create(**arguments)


def derive(family: str, stage: str, pretrained: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `create` for a stage that starts from the model of pre-training.

    Args:
        family, stage: As in `create`.
        pretrained: Arguments of the model of pre-training. The image size stays; change `vision` of what is
            returned for another one.

    Raises:
        ValueError: A family or stage that is not known.
    """
    return find(family).stage(stage).derive(pretrained)


def save(
    folder: str | Path,
    model: nn.Module,
    *,
    family: str,
    stage: str,
    arguments: Mapping[str, Any],
    view: Mapping[str, Any] | None = None,
    reading: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    text_files: Iterable[str | Path] = (),
    momentum: Mapping[str, nn.Module] | None = None,
) -> None:
    """Write an export folder that `load`, `describe` and `start_from` read.

    Args:
        folder: Made where it is not there.
        model: Model.
        family, stage, arguments: Those of `create`.
        view: How images are made for it, None where that is not known; `reading` likewise for texts, None
            for a model without text. See `Description`.
        reading: Its tokenizer's files may be paths; names are written.
        settings: Further keys of config.json.
        text_files: Paths of the tokenizer's files, which are copied into the folder.
        momentum: "teacher" and "queue", for training that goes on from here; None leaves them out.

    Raises:
        ValueError: A family or stage that is not known, a file of the tokenizer that is not among
            `text_files`, another key in `momentum`, a name in `settings` that is an argument.
    """
    find(family).stage(stage)
    description = Description(
        family,
        stage,
        dict(arguments),
        None if view is None else dict(view),
        None if reading is None else dict(reading),
        dict(settings or {}),
    )
    export.write(folder, model, description, text_files=text_files, momentum=momentum)


def describe(path: str | Path) -> Description:
    """What an export folder or an official checkpoint holds, without making the model.

    Raises:
        FileNotFoundError, CheckpointError: As `load`.
    """
    path = Path(path)
    if path.is_dir():
        return export.describe(path)
    checkpoint = read_checkpoint(path)
    return _files(_official_family(checkpoint, path)).describe(checkpoint, None)


def load(
    path: str | Path, *, ability: str | None = None, arguments: Mapping[str, Any] | None = None
) -> Loaded:
    """Read an export folder, or an official checkpoint (`.th`, `.pth`, `.safetensors`) of an installed
    family.

    Args:
        path: Folder or file.
        ability: What the model is to be evaluated on. A checkpoint of a stage that has no trained values for
            all that this needs (pre-training where answers, captions or NLVR2 classes are wanted) is refused
            with the way out. None takes any.
        arguments: Arguments of `create` for an official checkpoint, where what the file says is not enough;
            by default they are inferred from its `config` and from the shapes of its tensors.

    Raises:
        FileNotFoundError: No such file, or a folder without config.json.
        CheckpointError: The file is broken, does not fit, lacks `ability`, or what it lacks for `arguments`
            to be inferred.
        ValueError: `arguments` with a folder, a family or stage that is not installed.
    """
    path = Path(path)
    if path.is_dir():
        if arguments is not None:
            raise ValueError(
                f"{path} says in config.json how its model is built; arguments cannot change that"
            )
        found = export.describe(path)
        _require_ability(find(found.family), found.stage, ability, path)
        model = create(found.family, found.stage, **found.arguments)
        load_weights(model, path / export.MODEL, resize=False)
        return Loaded(model.eval(), *found)
    checkpoint = read_checkpoint(path)
    family = _official_family(checkpoint, path)
    official = _files(family)
    _require_ability(family, official.stage(checkpoint.state), ability, path)
    found = official.describe(checkpoint, arguments)
    model = create(found.family, found.stage, **found.arguments)
    official.load(model, checkpoint.state, stage=found.stage, name=str(path))
    return Loaded(model.eval(), *found)


def start_from(
    model: nn.Module,
    path: str | Path,
    *,
    family: str,
    stage: str,
    teacher: nn.Module | None = None,
    queue: FeatureQueue | None = None,
) -> LoadReport:
    """Start training a model from an export folder or an official checkpoint of the same or an earlier stage.

    Both go through one conversion, that of the family. A model starts from checkpoints of every family with
    the layout of its own.

    Args:
        model: Made by `create(family, stage, ...)`; `derive` gives arguments that fit a model of
            pre-training.
        path: Folder or file.
        family, stage: Those of `model`.
        teacher: Momentum teacher of `model`, made by `vlp_core.momentum.teacher_of` before this call; filled
            from the checkpoint's teacher, or from `model` once that is filled where the checkpoint has none.
        queue: Queue of features; goes on with the checkpoint's, or stays as it is where the checkpoint has
            none. Identities that the checkpoint lacks stay unknown.

    Returns:
        What was loaded and resized, what stays fresh (`missing`), and what of the checkpoint is not used
        (`unexpected`, in its names). Our names of teacher and queue begin with "teacher." and "queue.".

    Raises:
        FileNotFoundError: No such file, or a folder without config.json.
        CheckpointError: The model cannot start from this family or stage, or the tensors do not fit.
        ValueError: A family or stage that is not known.
    """
    path = Path(path)
    own = find(family)
    wanted = own.stage(stage)
    if not path.is_dir():
        checkpoint = read_checkpoint(path)
        source = _official_family(checkpoint, path)
        official = _files(source)
        _require_start(own, wanted, source, official.stage(checkpoint.state), path)
        return official.start(
            model, checkpoint.state, stage=stage, teacher=teacher, queue=queue, name=str(path)
        )
    found = export.describe(path)
    _require_start(own, wanted, find(found.family), found.stage, path)

    def begin(part: nn.Module, state: Mapping[str, Tensor], name: str) -> LoadReport:
        return own.start(part, state, stage=stage, found=found, name=name)

    momentum = companions.read(path)
    others: dict[str, LoadReport] = {}
    result = begin(model, read(path / export.MODEL), str(path))
    if teacher is not None and momentum["teacher"]:
        report = begin(teacher, momentum["teacher"], f"the teacher of {path}")
        others["teacher"] = report._replace(unexpected=tuple(f"teacher.{key}" for key in report.unexpected))
    elif teacher is not None:
        companions.copy_to_teacher(model, teacher)
    if queue is not None and momentum["queue"]:
        others["queue"] = companions.start_queue(queue, momentum["queue"], name=str(path))
    given = {"teacher": teacher, "queue": queue}
    unused = tuple(
        f"{part}.{key}" for part, state in momentum.items() for key in state if given[part] is None
    )
    result = result.joined(**others)
    return result._replace(unexpected=result.unexpected + unused)


def _official_family(checkpoint: Checkpoint, path: Path) -> Family:
    """The family whose official files look like this one."""
    rows = [family for family in every() if family.official is not None]
    owners = [family for family in rows if _files(family).recognise(checkpoint.state)]
    if len(owners) == 1:
        return owners[0]
    names = ", ".join(family.name for family in owners or rows)
    raise CheckpointError(
        f"{path} looks like a checkpoint of several families: {names}"
        if owners
        else f"{path} is no official checkpoint of an installed family ({names}); it holds "
        f"{groups(checkpoint.state)}"
    )


def _files(family: Family) -> Official:
    if family.official is None:
        raise ValueError(f"family {family.name} has no official files")
    return family.official


def _require_start(own: Family, wanted: Stage, source: Family, found: str, path: Path) -> None:
    """Refuse a checkpoint that a model of the stage `wanted` cannot follow."""
    if source.layout != own.layout:
        raise CheckpointError(
            f"{path} is a checkpoint of {source.name}, whose layout is {source.layout!r}; a model of "
            f"{own.name} starts from checkpoints with the layout {own.layout!r}"
        )
    require_start(found, wanted.name, wanted.starts_from, str(path))


def _require_ability(family: Family, found: str, ability: str | None, path: Path) -> None:
    """Refuse a checkpoint of the stage `found` that lacks trained values for an ability."""
    if ability is None:
        return
    able = [stage for stage in family.stages if ability in stage.abilities]
    if not able:
        known = dict.fromkeys(each for stage in family.stages for each in stage.abilities)
        raise CheckpointError(
            f"{path} is a checkpoint of {family.name}, which cannot be evaluated on {ability!r}; it can be "
            f"on {', '.join(known) or 'nothing'}"
        )
    if found in (stage.name for stage in able):
        return
    names = " or ".join(stage.name for stage in able)
    way = (
        f"train a {names} model from it (`vlp-train ls {family.name}` lists recipes) and evaluate the export "
        "of that run"
        if any(found in stage.starts_from for stage in able)
        else f"give a {names} checkpoint"
    )
    raise CheckpointError(
        f"{path} is a {found} checkpoint, in which what {ability} needs was never trained; {way}"
    )
