"""Assembled models: made by name, written to and read from export folders.

An export folder holds `model.safetensors` (our tensor names), `config.json` and what the text needs
(vocabulary files):

    {"model": "xvlm", "arguments": {...}, "image_size": 224,
     "text": {"kind": "bert", "files": ["vocab.txt"], "max_tokens": 40, "max_words": 30}}

`concepts` among the settings says how concepts are read (options of the data side). What goes with a model
while it is trained stands beside it in `momentum.safetensors`: a momentum teacher ("teacher." before its
names) and a queue ("queue."). `load` needs neither.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from vlp_core.concepts import ConceptEncoder, ConceptVision, image_encoder
from vlp_core.heads import MaskedImageDecoder
from vlp_core.models.fusion import stages
from vlp_core.models.fusion.captioning import CaptionModel
from vlp_core.models.fusion.entailment import EntailmentModel
from vlp_core.models.fusion.nlvr import NlvrModel
from vlp_core.models.fusion.stages import Method, Stage, Task, method_of, model_name, stage_of, task_arguments
from vlp_core.models.fusion.vqa import VqaModel
from vlp_core.models.vicha.model import Vicha
from vlp_core.models.xvlm.model import Xvlm
from vlp_core.momentum import FeatureQueue
from vlp_core.text.bert import Bert
from vlp_core.weights import Checkpoint, CheckpointError, files, loading, read_checkpoint
from vlp_core.weights import load as load_weights
from vlp_core.weights.adapter import groups

MOMENTUM = ("teacher", "queue")
"""What can stand in `momentum.safetensors`."""

__all__ = [
    "CaptionModel",
    "Description",
    "EntailmentModel",
    "Loaded",
    "Method",
    "NlvrModel",
    "Stage",
    "Task",
    "Vicha",
    "VqaModel",
    "Xvlm",
    "create",
    "describe",
    "load",
    "method_of",
    "model_name",
    "save",
    "stage_of",
    "start_from",
    "task_arguments",
]


def create(name: str, **arguments: Any) -> nn.Module:
    """Make a model with fresh weights.

    Args:
        name: "xvlm", "vicha", "nlvr", "entailment", "vqa" or "captioning".
        arguments: What JSON can hold. `concepts` {"layers": 2, "place": "first" | "last", "visible_padding":
            true} makes the image encoder see visual concepts (`vlp_core.concepts`; their BERT is like `text`
            with so many layers). `vision` is {"kind": "swin" | "clip" | "vit", ...} with the arguments of
            that encoder, `text` (and `decoder` of VQA) those of `Bert`, whose `image_width` is filled in; the
            rest goes to the model.

    Raises:
        ValueError: Unknown name, kind, or sizes that do not fit; TypeError: an argument that the model or
            encoder does not take.
    """
    if name not in _MODELS:
        raise ValueError(f"model {name!r} is not known; choose among {', '.join(_MODELS)}")
    return _MODELS[name](**arguments)


def save(
    folder: str | Path,
    model: nn.Module,
    *,
    name: str,
    arguments: Mapping[str, Any],
    settings: Mapping[str, Any] | None = None,
    text_files: Iterable[str | Path] = (),
    momentum: Mapping[str, nn.Module] | None = None,
) -> None:
    """Write an export folder that `load` reads; `name` and `arguments` are those of `create`.

    Args:
        folder: Made where it is not there.
        model: Model.
        name, arguments: Those of `create`.
        settings: Further keys of config.json (`image_size`, `text`, `concepts`).
        text_files: Are copied beside it.
        momentum: "teacher" and "queue", for training that goes on from here with `start_from`; None leaves
            them out.

    Raises:
        ValueError: Another key in `momentum`.
    """
    if unknown := sorted(set(momentum or ()) - set(MOMENTUM)):
        raise ValueError(f"momentum holds {', '.join(unknown)}; it takes {' and '.join(MOMENTUM)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files.write(folder / "model.safetensors", model.state_dict())
    beside = folder / "momentum.safetensors"
    if momentum:
        state = {
            f"{part}.{key}": x for part, module in momentum.items() for key, x in module.state_dict().items()
        }
        files.write(beside, state)
    else:  # one of an earlier export into this folder would belong to another model
        beside.unlink(missing_ok=True)
    for file in text_files:
        shutil.copyfile(file, folder / Path(file).name)
    config = {"model": name, "arguments": dict(arguments), **(settings or {})}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


class Loaded(NamedTuple):
    """A model in evaluation mode, its name for `create`, and its settings.

    `settings` holds what config.json says beside model and arguments, with the names in `text.files` made
    full paths; for an official checkpoint `image_size` and `text.kind`, for the file holds no vocabulary, and
    `concepts` where the model sees some.
    """

    model: nn.Module
    name: str
    settings: dict[str, Any]


class Description(NamedTuple):
    """What a checkpoint holds: the stage of training, name and arguments for `create`, settings as in
    `Loaded`, and the method whose recipes and `task_arguments` go on from it."""

    stage: Stage
    name: str
    arguments: dict[str, Any]
    settings: dict[str, Any]
    method: Method


def describe(path: str | Path) -> Description:
    """What an export folder or an official checkpoint holds, without making the model; `task_arguments` goes
    on from there.

    Raises:
        FileNotFoundError, CheckpointError: As `load`.
    """
    path = Path(path)
    if path.is_dir():
        return _describe_folder(path)
    return _describe_official(read_checkpoint(path))


def load(path: str | Path, *, task: Task | None = None, arguments: Mapping[str, Any] | None = None) -> Loaded:
    """Read an export folder, or an official checkpoint (`.th`, `.pth`, `.safetensors`) of X-VLM, ViCHA or
    ALBEF.

    Args:
        path: Folder or file.
        task: What the model is to be evaluated on. A checkpoint that has no trained values for all that this
            needs (a pre-training file where answers, captions or NLVR2 classes are wanted) is refused with
            the way out. None takes any.
        arguments: Arguments of `create` for an official checkpoint, where what the file says is not enough;
            by default they are inferred from its `config` and from the shapes of its tensors.

    Raises:
        FileNotFoundError: No such file, or a folder without config.json.
        CheckpointError: The file is broken, does not fit, is of the wrong stage for `task`, or what it lacks
            for `arguments` to be inferred.
    """
    path = Path(path)
    if path.is_dir():
        if arguments is not None:
            raise ValueError(
                f"{path} says in config.json how its model is built; arguments cannot change that"
            )
        found = _describe_folder(path)
        if task is not None:
            stages.require_task(found.stage, task, str(path), found.method)
        model = create(found.name, **found.arguments)
        load_weights(model, path / "model.safetensors", resize=False)
        return Loaded(model.eval(), found.name, found.settings)
    from vlp_core.models.vicha import checkpoints as vicha
    from vlp_core.models.xvlm import checkpoints as xvlm

    checkpoint = read_checkpoint(path)
    method, stage = _official(checkpoint, str(path))
    if task is not None:
        stages.require_task(stage, task, str(path), method)
    found = _describe_official(checkpoint, arguments)
    model = create(found.name, **found.arguments)
    (vicha if method == "vicha" else xvlm).load(model, checkpoint.state)
    return Loaded(model.eval(), found.name, found.settings)


def start_from(
    model: nn.Module,
    path: str | Path,
    *,
    teacher: nn.Module | None = None,
    queue: FeatureQueue | None = None,
) -> loading.Loaded:
    """Start training a model from an export folder or an official checkpoint of the same or an earlier stage.

    Both go through one conversion (`vlp_core.models.fusion.stages`): fusion layers doubled for NLVR2, an answer
    decoder made of the fusion layers, position tables resized, and so on.

    Args:
        model: Made by `create`; `task_arguments` gives the arguments that fit a pre-training model.
        path: Folder or file.
        teacher: Momentum teacher of `model`, made by `vlp_core.momentum.teacher_of` before this call; filled
            from the checkpoint's teacher, or from `model` once that is filled where the checkpoint has none.
        queue: Queue of features; goes on with the checkpoint's, or stays as it is where the checkpoint has
            none. Identities that the checkpoint lacks stay unknown.

    Returns:
        What was loaded and resized, what stays fresh (`missing`), and what of the checkpoint is not used
        (`unexpected`, in its names). Our names of teacher and queue begin with "teacher." and "queue.".

    Raises:
        FileNotFoundError: No such file, or a folder without config.json.
        CheckpointError: The model cannot start from this stage, or the tensors do not fit.
    """
    path = Path(path)
    if not path.is_dir():
        return _start_from_official(model, path, teacher, queue)
    found = _describe_folder(path)
    kind = found.arguments["text"].get("kind", "bert")
    if kind != model.text.kind:
        raise CheckpointError(
            f"{path} was trained with {kind}, the text encoder of this model is {model.text.kind}"
        )
    momentum = _momentum(path)
    others: dict[str, loading.Loaded] = {}
    result = stages.start(model, found.stage, files.read(path / "model.safetensors"), name=str(path))
    if teacher is not None and momentum["teacher"]:
        report = stages.start(teacher, found.stage, momentum["teacher"], name=f"the teacher of {path}")
        others["teacher"] = report._replace(unexpected=tuple(f"teacher.{key}" for key in report.unexpected))
    elif teacher is not None:
        stages.copy_to_teacher(model, teacher)
    if queue is not None and momentum["queue"]:
        others["queue"] = stages.start_queue(queue, momentum["queue"], name=str(path))
    given = {"teacher": teacher, "queue": queue}
    unused = tuple(
        f"{part}.{key}" for part, state in momentum.items() for key in state if given[part] is None
    )
    result = stages.joined(result, **others)
    return result._replace(unexpected=result.unexpected + unused)


def _momentum(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Teacher and queue of an export folder, by part; empty where there are none."""
    parts: dict[str, dict[str, torch.Tensor]] = {part: {} for part in MOMENTUM}
    file = folder / "momentum.safetensors"
    state = files.read(file) if file.is_file() else {}
    if foreign := [key for key in state if key.partition(".")[0] not in MOMENTUM]:
        raise CheckpointError(
            f"{file} holds {groups(foreign)}; only {' and '.join(MOMENTUM)} can stand there"
        )
    for key, tensor in state.items():
        part, _, rest = key.partition(".")
        parts[part][rest] = tensor
    return parts


def _start_from_official(
    model: nn.Module, path: Path, teacher: nn.Module | None, queue: FeatureQueue | None
) -> loading.Loaded:
    from vlp_core.models.vicha import checkpoints as vicha
    from vlp_core.models.xvlm import checkpoints as xvlm

    checkpoint = read_checkpoint(path)
    if _official(checkpoint, str(path))[0] == "vicha":
        return vicha.load_pretrained(model, checkpoint.state, teacher=teacher, queue=queue, name=str(path))
    result = xvlm.load_pretrained(model, checkpoint.state, name=str(path))
    if teacher is not None:  # X-VLM has no teacher, nor a queue
        stages.copy_to_teacher(model, teacher)
    return result


def _official(checkpoint: Checkpoint, name: str = "this") -> tuple[Method, Stage]:
    """Whose official file this is, by its names, and of which stage."""
    from vlp_core.models.vicha import checkpoints as vicha
    from vlp_core.models.xvlm import checkpoints as xvlm

    if vicha.recognises(checkpoint.state):
        return "vicha", vicha.layout(checkpoint.state)
    if xvlm.recognises(checkpoint.state):
        return "xvlm", xvlm.layout(checkpoint.state)
    raise CheckpointError(
        f"{name} is no checkpoint of X-VLM, ViCHA or ALBEF; it holds {groups(checkpoint.state)}"
    )


def _describe_folder(folder: Path) -> Description:
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found; an export folder holds config.json and model.safetensors")
    try:
        config = json.loads(file.read_text())
        name, arguments = config.pop("model"), config.pop("arguments")
    except (json.JSONDecodeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{file} must be a JSON object with model and arguments: {error!r}") from error
    if "files" in config.get("text", {}):
        config["text"]["files"] = [str(folder / entry) for entry in config["text"]["files"]]
    with torch.device("meta"):
        stage = stage_of(create(name, **arguments))
    return Description(stage, name, arguments, config, method_of(name, arguments))


def _describe_official(checkpoint: Checkpoint, arguments: Mapping[str, Any] | None = None) -> Description:
    from vlp_core.models.vicha import checkpoints as vicha
    from vlp_core.models.xvlm import checkpoints as xvlm

    method, stage = _official(checkpoint)
    source = vicha if method == "vicha" else xvlm
    chosen = source.infer_arguments(checkpoint) if arguments is None else dict(arguments)
    settings: dict[str, Any] = {
        "image_size": chosen["vision"]["image_size"],
        "text": {"kind": chosen["text"].get("kind", "bert"), "files": []},
    }
    if chosen.get("concepts") is not None:
        settings["concepts"] = dict(vicha.CONCEPTS)
    return Description(stage, model_name(stage, method), chosen, settings, method)


def _vision(kind: str, arguments: dict[str, Any]) -> nn.Module:
    match kind:
        case "swin":
            from vlp_core.vision import SwinTransformer

            return SwinTransformer(**arguments)
        case "clip":
            from vlp_core.vision import ClipVisionTransformer

            return ClipVisionTransformer(**arguments)
        case "vit":
            from vlp_core.vision import VisionTransformer

            return VisionTransformer(**arguments)
        case _:
            raise ValueError(f"vision kind {kind!r} is not known; choose swin, clip or vit")


def _encoders(
    vision: Mapping[str, Any], text: Mapping[str, Any], concepts: Mapping[str, Any] | None = None
) -> dict[str, nn.Module]:
    image = _vision(vision["kind"], {key: value for key, value in vision.items() if key != "kind"})
    if concepts is not None:
        image = _with_concepts(image, text, concepts)
    shape: dict[str, Any] = {"image_width": image.width, **text}
    return {"vision": image, "text": Bert(**shape)}


def _with_concepts(image: nn.Module, text: Mapping[str, Any], concepts: Mapping[str, Any]) -> ConceptVision:
    """The words have a BERT of their own that is like the text encoder's first layers."""
    shape = {key: value for key, value in text.items() if key != "fusion_layer"}
    words = Bert(**{**shape, "layers": concepts["layers"]})
    encoder = ConceptEncoder(text=words, width=image.width)
    return ConceptVision(
        encoder=image,
        concepts=encoder,
        **{key: value for key, value in concepts.items() if key != "layers"},
    )


def _xvlm(
    *,
    vision: Mapping[str, Any],
    text: Mapping[str, Any],
    concepts: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> Xvlm:
    return Xvlm(**_encoders(vision, text, concepts), **arguments)


def _vicha(
    *,
    vision: Mapping[str, Any],
    text: Mapping[str, Any],
    concepts: Mapping[str, Any] | None = None,
    masked_image: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> Vicha:
    encoders = _encoders(vision, text, concepts)
    decoder = None
    if masked_image is not None:
        image = image_encoder(encoders["vision"])
        decoder = MaskedImageDecoder(
            image_width=image.width, patch=image.patch_size, image_size=image.image_size, **masked_image
        )
    return Vicha(**encoders, masked_image=decoder, **arguments)


def _nlvr(
    *,
    vision: Mapping[str, Any],
    text: Mapping[str, Any],
    concepts: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> NlvrModel:
    return NlvrModel(**_encoders(vision, {"layers_per_image_projection": 2, **text}, concepts), **arguments)


def _entailment(
    *,
    vision: Mapping[str, Any],
    text: Mapping[str, Any],
    concepts: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> EntailmentModel:
    return EntailmentModel(**_encoders(vision, text, concepts), **arguments)


def _vqa(
    *,
    vision: Mapping[str, Any],
    text: Mapping[str, Any],
    decoder: Mapping[str, Any],
    concepts: Mapping[str, Any] | None = None,
) -> VqaModel:
    encoders = _encoders(vision, text, concepts)
    shape: dict[str, Any] = {"image_width": encoders["text"].width, "fusion_layer": 0, **decoder}
    return VqaModel(**encoders, decoder=Bert(**shape))


def _captioning(
    *, vision: Mapping[str, Any], text: Mapping[str, Any], concepts: Mapping[str, Any] | None = None
) -> CaptionModel:
    return CaptionModel(**_encoders(vision, text, concepts))


_MODELS: dict[str, Callable[..., nn.Module]] = {
    "xvlm": _xvlm,
    "vicha": _vicha,
    "nlvr": _nlvr,
    "entailment": _entailment,
    "vqa": _vqa,
    "captioning": _captioning,
}
