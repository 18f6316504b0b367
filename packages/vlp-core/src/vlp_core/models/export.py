"""Export folders: a model on disk, with all that is needed to make it again and to use it.

    model.safetensors     its tensors, under our names
    config.json           family, stage, arguments, view, reading and further settings (`Description`)
    vocabulary files      what the tokenizer needs
    momentum.safetensors  where training goes on from here: momentum teacher and queue

    {"family": "mine", "stage": "vqa", "arguments": {...},
     "view": {"kind": "squash", "size": 384},
     "reading": {"tokenizer": {"kind": "wordpiece", "files": ["vocab.txt"]}, "vocabulary": 30522,
                 "clean": "question", "max_words": 30, "max_tokens": 40, "separator": false}}

Earlier versions wrote `model`, `image_size` and `text` instead of family, stage, view and reading; such
folders are read as if they had been written today.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from vlp_core.models import companions
from vlp_core.models.family import Description, every
from vlp_core.weights import files
from vlp_core.weights.adapter import CheckpointError

MODEL = "model.safetensors"
CONFIG = "config.json"

KEYS = tuple(field for field in Description._fields if field != "settings")
"""Keys of config.json that are no settings."""


def tokenizer_kind(text_kind: str) -> str:
    """The kind of tokenizer that a kind of text encoder reads with; earlier versions called both alike."""
    return {"bert": "wordpiece"}.get(text_kind, text_kind)


def write(
    folder: str | Path,
    model: nn.Module,
    description: Description,
    *,
    text_files: Iterable[str | Path] = (),
    momentum: Mapping[str, nn.Module] | None = None,
) -> None:
    """Write an export folder; see `vlp_core.models.save`.

    Raises:
        ValueError: A setting under a name that config.json needs otherwise, a file of the tokenizer that is
            not among `text_files`, something else in `momentum` than a teacher and a queue.
    """
    sources = [Path(file) for file in text_files]
    config = {key: value for key, value in description._asdict().items() if key != "settings"}
    if taken := sorted(set(description.settings) & set(KEYS)):
        raise ValueError(f"settings cannot hold {', '.join(taken)}; give it as an argument")
    if description.reading is not None:
        config["reading"] = _with_names(description.reading, {file.name for file in sources})
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    companions.write(folder, momentum)
    files.write(folder / MODEL, model.state_dict())
    for file in sources:
        shutil.copyfile(file, folder / file.name)
    text = json.dumps({**config, **description.settings}, indent=2)
    (folder / CONFIG).write_text(text + "\n")


def _with_names(reading: Mapping[str, Any], copied: set[str]) -> dict[str, Any]:
    """`reading` with the files of its tokenizer by name, as they lie in the folder."""
    tokenizer = reading["tokenizer"]
    names = [Path(file).name for file in tokenizer["files"]]
    if absent := [name for name in names if name not in copied]:
        raise ValueError(f"the tokenizer needs {', '.join(absent)}; give the path among text_files")
    return {**reading, "tokenizer": {**tokenizer, "files": names}}


def describe(folder: Path) -> Description:
    """What an export folder holds, of this version or of an earlier one.

    Raises:
        FileNotFoundError: A folder without config.json.
        CheckpointError: A config.json that is not as it should be.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found; an export folder holds {CONFIG} and {MODEL}")
    try:
        config = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} must be a JSON object, not a {type(config).__name__}")
    if "family" not in config and "model" in config:
        config = _upgraded(config, file)
    if absent := [key for key in KEYS if key not in config]:
        raise CheckpointError(f"{file} lacks {', '.join(absent)}; it must hold {', '.join(KEYS)}")
    reading = config["reading"]
    if reading is not None:
        tokenizer = reading["tokenizer"]
        paths = [str(folder / name) for name in tokenizer["files"]]
        config["reading"] = {**reading, "tokenizer": {**tokenizer, "files": paths}}
    settings = {key: value for key, value in config.items() if key not in KEYS}
    return Description(**{key: config[key] for key in KEYS}, settings=settings)


def _upgraded(config: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """A config.json of an earlier version in the form of today.

    Which family a model belongs to was not written down; each family says whether it takes a model for its
    own (`Family.earlier`).
    """
    if absent := [key for key in ("model", "arguments") if key not in config]:
        raise CheckpointError(f"{file} lacks {', '.join(absent)}")
    model, arguments = config["model"], config["arguments"]
    owners = {
        family.name: found
        for family in every()
        if family.earlier is not None and (found := family.earlier(model, arguments)) is not None
    }
    if len(owners) != 1:
        raise CheckpointError(
            f"{file} was written by an earlier version, and its model {model!r} belongs to "
            + (f"several families: {', '.join(owners)}" if owners else "no installed family")
        )
    ((family, found),) = owners.items()
    text = config.get("text", {})
    kind = text.get("kind", arguments["text"].get("kind", "bert"))
    reading = {
        "tokenizer": {"kind": tokenizer_kind(kind), "files": text.get("files", [])},
        "vocabulary": arguments["text"]["vocabulary"],
        **{key: text[key] for key in ("max_words", "max_tokens", "separator") if key in text},
        "clean": "question" if found.stage == "vqa" else "caption",
    }
    return {
        "family": family,
        "stage": found.stage,
        "arguments": found.arguments,
        "view": {"kind": "squash", "size": config.get("image_size", arguments["vision"]["image_size"])},
        "reading": reading,
        **{key: x for key, x in config.items() if key not in ("model", "arguments", "image_size", "text")},
    }
