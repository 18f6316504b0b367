"""Assembled models: made by name, written to and read from export folders.

An export folder holds `model.safetensors` (our tensor names), `config.json` and what the text needs (vocabulary files):

    {"model": "xvlm", "arguments": {...}, "image_size": 224,
     "text": {"kind": "bert", "files": ["vocab.txt"], "max_tokens": 40, "max_words": 30}}
"""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from vlp_core.models.xvlm import Xvlm
from vlp_core.models.xvlm_tasks import XvlmCaption, XvlmNlvr, XvlmVqa
from vlp_core.text.bert import Bert
from vlp_core.weights import CheckpointError, files, read_checkpoint
from vlp_core.weights import load as load_weights

__all__ = ["Loaded", "Xvlm", "XvlmCaption", "XvlmNlvr", "XvlmVqa", "create", "load", "save"]


def create(name: str, **arguments: Any) -> nn.Module:
    """Make a model with fresh weights.

    Args:
        name: "xvlm", "xvlm_nlvr", "xvlm_vqa" or "xvlm_caption".
        arguments: What JSON can hold. `vision` is {"kind": "swin" | "clip" | "vit", ...} with the arguments of that encoder, `text` (and
            `decoder` of VQA) those of `Bert`, whose `image_width` is filled in; the rest goes to the model.

    Raises:
        ValueError: Unknown name, kind, or sizes that do not fit; TypeError: an argument that the model or encoder does not take.
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
) -> None:
    """Write an export folder that `load` reads; `name` and `arguments` are those of `create`.

    `settings` are further keys of config.json (`image_size`, `text`); `text_files` are copied beside it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files.write(folder / "model.safetensors", model.state_dict())
    for file in text_files:
        shutil.copyfile(file, folder / Path(file).name)
    config = {"model": name, "arguments": dict(arguments), **(settings or {})}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


class Loaded(NamedTuple):
    """A model in evaluation mode, its name for `create`, and its settings.

    `settings` holds what config.json says beside model and arguments, with the names in `text.files` made full paths; for an official
    checkpoint `image_size` and `text.kind`, for the file holds no vocabulary.
    """

    model: nn.Module
    name: str
    settings: dict[str, Any]


def load(path: str | Path, *, arguments: Mapping[str, Any] | None = None) -> Loaded:
    """Read an export folder, or an official checkpoint (`.th`, `.pth`, `.safetensors`) of X-VLM.

    Args:
        path: Folder or file.
        arguments: Arguments of `create` for an official checkpoint, where what the file says is not enough; by default they are
            inferred from its `config` and from the shapes of its tensors.

    Raises:
        FileNotFoundError: No such file, or a folder without config.json.
        CheckpointError: The file is broken, does not fit, or what it lacks for `arguments` to be inferred.
    """
    path = Path(path)
    if path.is_dir():
        return _load_folder(path, arguments)
    from vlp_core.weights import xvlm

    checkpoint = read_checkpoint(path)
    name = xvlm.model_name(xvlm.layout(checkpoint.state))
    chosen = xvlm.infer_arguments(checkpoint) if arguments is None else dict(arguments)
    model = create(name, **chosen)
    xvlm.load(model, checkpoint.state)
    size = chosen["vision"]["image_size"]
    return Loaded(
        model.eval(), name, {"image_size": size, "text": {"kind": chosen["text"]["kind"], "files": []}}
    )


def _load_folder(folder: Path, arguments: Mapping[str, Any] | None) -> Loaded:
    if arguments is not None:
        raise ValueError(f"{folder} says in config.json how its model is built; arguments cannot change that")
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found; an export folder holds config.json and model.safetensors")
    try:
        config = json.loads(file.read_text())
        name, chosen = config.pop("model"), config.pop("arguments")
    except (json.JSONDecodeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{file} must be a JSON object with model and arguments: {error!r}") from error
    model = create(name, **chosen)
    load_weights(model, folder / "model.safetensors", resize=False)
    if "files" in config.get("text", {}):
        config["text"]["files"] = [str(folder / entry) for entry in config["text"]["files"]]
    return Loaded(model.eval(), name, config)


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


def _encoders(vision: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, nn.Module]:
    image = _vision(vision["kind"], {key: value for key, value in vision.items() if key != "kind"})
    return {"vision": image, "text": Bert(**{"image_width": image.width, **text})}


def _xvlm(*, vision: Mapping[str, Any], text: Mapping[str, Any], **arguments: Any) -> Xvlm:
    return Xvlm(**_encoders(vision, text), **arguments)


def _xvlm_nlvr(*, vision: Mapping[str, Any], text: Mapping[str, Any], **arguments: Any) -> XvlmNlvr:
    return XvlmNlvr(**_encoders(vision, {"layers_per_image_projection": 2, **text}), **arguments)


def _xvlm_vqa(*, vision: Mapping[str, Any], text: Mapping[str, Any], decoder: Mapping[str, Any]) -> XvlmVqa:
    encoders = _encoders(vision, text)
    shape: dict[str, Any] = {"image_width": encoders["text"].width, "fusion_layer": 0, **decoder}
    return XvlmVqa(**encoders, decoder=Bert(**shape))


def _xvlm_caption(*, vision: Mapping[str, Any], text: Mapping[str, Any]) -> XvlmCaption:
    return XvlmCaption(**_encoders(vision, text))


_MODELS: dict[str, Callable[..., nn.Module]] = {
    "xvlm": _xvlm,
    "xvlm_nlvr": _xvlm_nlvr,
    "xvlm_vqa": _xvlm_vqa,
    "xvlm_caption": _xvlm_caption,
}
