"""Official checkpoint files of fusion families, in and out.

Their authors publish one layout for each stage of training: an image encoder, a text encoder in Hugging
Face's names, a decoder where there is one, heads at the top. What differs between families stands in an
`OfficialFiles`; what they have in common is here.

A file may hold three things under one roof: a model, its momentum teacher and a queue of features.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlp_core.models.companions import copy_to_teacher, start_queue
from vlp_core.models.export import tokenizer_kind
from vlp_core.models.family import Description, Official, require_start
from vlp_core.models.fusion.conversion import convert
from vlp_core.models.fusion.stages import STARTS
from vlp_core.momentum import FeatureQueue
from vlp_core.text.bert import Bert
from vlp_core.weights import files, loading
from vlp_core.weights.adapter import Adapter, CheckpointError, Rename, Tied, groups
from vlp_core.weights.bert import encoder_adapter, head_adapter, language_model_adapter
from vlp_core.weights.files import Checkpoint
from vlp_core.weights.loading import LoadReport
from vlp_core.weights.shapes import infer_text

TEXT = "text_encoder."
DECODER = "text_decoder."
ALIGNED = ("pretrain", "retrieval", "boxes", "nlvr_domain")
"""Stages whose models can have a shared space of images and texts."""


class Contents(NamedTuple):
    """What a file holds: model and teacher under the source's names of a model, the queue under ours; empty
    where it has none."""

    model: dict[str, Tensor]
    teacher: dict[str, Tensor]
    queue: dict[str, Tensor]


def model_alone(state: Mapping[str, Tensor]) -> Contents:
    """`split` of files that hold a model and nothing else."""
    return Contents(dict(state), {}, {})


def join_model_alone(contents: Contents) -> dict[str, Tensor]:
    """`join` of files that hold a model and nothing else.

    Raises:
        ValueError: A teacher or a queue.
    """
    if contents.teacher or contents.queue:
        raise ValueError("these files hold a model alone; leave teacher and queue out")
    return contents.model


class EarlierNames(NamedTuple):
    """Names in a checkpoint of an earlier stage: `head`, of its language head; `body`, of all else."""

    head: Adapter
    body: Adapter


@dataclass(frozen=True, kw_only=True)
class OfficialFiles:
    """The files of one family.

    family: Name of the family.
    title: What people call it, for messages.
    vision: Prefix of the image encoder, which tells the files of the family.
    stage_by: `stage_by(state, parts)`: stage of a file by the names of its parts (their first component, and
        their first two), or None.
    adapter: Between the names of a model, or of its teacher, and those of the file of its stage.
    earlier: `earlier(model, found)`: names in a file of another stage, for encoders like those of the model.
    infer: Arguments of the model of a file.
    settings: Further settings of a model with such arguments, for `Description`.
    computed: Ends of names that stand for nothing trained; they are not reported as unused.
    split, join: Tell model, teacher and queue of a file apart, and the inverse.
    """

    family: str
    title: str
    vision: str
    stage_by: Callable[[Mapping[str, Tensor], set[str]], str | None]
    adapter: Callable[[nn.Module], Adapter]
    earlier: Callable[[nn.Module, str], EarlierNames]
    infer: Callable[[Checkpoint], dict[str, Any]]
    settings: Callable[[Mapping[str, Any]], dict[str, Any]]
    computed: tuple[str, ...]
    split: Callable[[Mapping[str, Tensor]], Contents] = model_alone
    join: Callable[[Contents], dict[str, Tensor]] = join_model_alone

    def row(self) -> Official:
        """As part of the family's row."""
        return Official(
            recognise=self.recognise,
            stage=self.stage,
            describe=self.describe,
            load=self.load,
            start=self.start,
            write=self.write,
        )

    def recognise(self, state: Mapping[str, Tensor]) -> bool:
        """Whether names look like those of the family, whatever the stage."""
        return any(name.startswith(self.vision) for name in state)

    def stage(self, state: Mapping[str, Tensor]) -> str:
        """Which stage of training a file belongs to.

        Raises:
            CheckpointError: It is none of the family.
        """
        parts = {".".join(name.split(".")[:2]) for name in state} | {name.split(".")[0] for name in state}
        found = self.stage_by(state, parts) if self.recognise(state) else None
        if found is None:
            raise CheckpointError(f"this is no checkpoint of {self.title}; it holds {groups(state)}")
        return found

    def describe(self, checkpoint: Checkpoint, arguments: Mapping[str, Any] | None = None) -> Description:
        """What a file holds; `arguments` None infers them.

        Raises:
            CheckpointError: It is none of the family, or its arguments cannot be told.
        """
        chosen = self.infer(checkpoint) if arguments is None else dict(arguments)
        kind = tokenizer_kind(chosen["text"].get("kind", "bert"))
        return Description(
            family=self.family,
            stage=self.stage(checkpoint.state),
            arguments=chosen,
            view={"kind": "squash", "size": chosen["vision"]["image_size"]},
            reading={
                "tokenizer": {"kind": kind, "files": []},
                "vocabulary": chosen["text"]["vocabulary"],
            },
            settings=self.settings(chosen),
        )

    def load(
        self,
        model: nn.Module,
        source: Mapping[str, Tensor] | str | Path,
        *,
        stage: str,
        teacher: nn.Module | None = None,
        queue: FeatureQueue | None = None,
        name: str | None = None,
    ) -> LoadReport:
        """Fill a model of `stage` from a file of the same stage, and its teacher and queue where they are
        given.

        Position tables for another image size are resized, those of the teacher too.

        Args:
            model: The model to fill.
            source: File, or its state dict.
            stage: Stage of the model.
            teacher, queue: Filled too; None leaves those of the file out.
            name: What messages call the file; by default its path.

        Raises:
            CheckpointError: A file of another stage, or without the teacher or queue that is to be filled,
                with the way out; see also `vlp_core.weights.load`.
        """
        state, name = _open(source, name)
        found = self.stage(state)
        if found != stage:
            way = (
                "start training from it with vlp_core.models.start_from, then use the result"
                if found in STARTS[stage]
                else "nothing can be converted from one to the other"
            )
            raise CheckpointError(
                f"{name} is a {found} checkpoint of {self.title} where a {stage} one is expected; {way}"
            )
        contents = self.split(state)
        for what, part, values in (("teacher", teacher, contents.teacher), ("queue", queue, contents.queue)):
            if part is not None and not values:
                raise CheckpointError(f"{name} holds no {what}; leave {what} out, or use start")
        return self._begin(model, contents, teacher, queue, stage=stage, found=found, name=name)

    def start(
        self,
        model: nn.Module,
        source: Mapping[str, Tensor] | str | Path,
        *,
        stage: str,
        teacher: nn.Module | None = None,
        queue: FeatureQueue | None = None,
        name: str | None = None,
    ) -> LoadReport:
        """Start a model of `stage` from a file of the same or an earlier stage;
        `vlp_core.models.fusion.conversion` says what becomes of what.

        Args:
            model: The model to fill.
            source: File, or its state dict.
            stage: Stage of the model.
            teacher: Its momentum teacher, made by `teacher_of` before, so that both have the same fresh
                values where the file has none. Filled from the file's teacher; from the model, once that is
                filled, if the file has no teacher. None leaves a teacher that exists as it is.
            queue: Goes on with the file's features, where it has some; identities it lacks stay unknown.
            name: What messages call the file; by default its path.

        Returns:
            What was loaded, what stays fresh (`missing`, our names; those of the others begin with "teacher."
            or "queue."), and what of the file is not used (`unexpected`, its names).

        Raises:
            CheckpointError: The stage cannot start from this file, or names beyond the table's are missing or
                left over.
        """
        state, name = _open(source, name)
        found = self.stage(state)
        require_start(found, stage, STARTS[stage], name)
        return self._begin(model, self.split(state), teacher, queue, stage=stage, found=found, name=name)

    def write(
        self,
        path: str | Path,
        model: nn.Module,
        *,
        teacher: nn.Module | None = None,
        queue: FeatureQueue | None = None,
    ) -> None:
        """Write a model under the official names of its stage, buffers and second names included, with its
        teacher and queue; `.safetensors`, or {"model": ...} by torch.

        Raises:
            ValueError: A teacher or queue where the files of the family hold none.
            TypeError: A model that the family publishes no files of.
        """
        files.write(path, self.to_source(model, teacher=teacher, queue=queue))

    def to_source(
        self, model: nn.Module, *, teacher: nn.Module | None = None, queue: FeatureQueue | None = None
    ) -> dict[str, Tensor]:
        """What `write` writes."""
        return self.join(
            Contents(
                self.adapter(model).to_source(model.state_dict()),
                {} if teacher is None else self.adapter(teacher).to_source(teacher.state_dict()),
                {} if queue is None else dict(queue.state_dict()),
            )
        )

    def _begin(
        self,
        model: nn.Module,
        contents: Contents,
        teacher: nn.Module | None,
        queue: FeatureQueue | None,
        *,
        stage: str,
        found: str,
        name: str,
    ) -> LoadReport:
        """Model, teacher and queue from the contents of a file of stage `found`, and the report of all."""

        def fill(part: nn.Module, values: Mapping[str, Tensor], called: str) -> LoadReport:
            if found == stage:
                return loading.load(part, values, self.adapter(part), name=called)
            return self._convert(part, values, stage=stage, found=found, name=called)

        others: dict[str, LoadReport] = {}
        result = fill(model, contents.model, name)
        if teacher is not None and contents.teacher:
            report = fill(teacher, contents.teacher, f"the teacher of {name}")
            others["teacher"] = report._replace(unexpected=self._of_teacher(report.unexpected))
        elif teacher is not None:
            copy_to_teacher(model, teacher)
        if queue is not None and contents.queue:
            others["queue"] = start_queue(queue, contents.queue, name=name)
        result = result.joined(**others)
        unused = self.join(
            Contents(
                {},
                {} if teacher is not None else contents.teacher,
                {} if queue is not None else contents.queue,
            )
        )
        return result._replace(unexpected=result.unexpected + self._trained(unused))

    def _convert(
        self, model: nn.Module, state: Mapping[str, Tensor], *, stage: str, found: str, name: str
    ) -> LoadReport:
        """As `convert`, for tensors under official names; what is not used is reported under these."""
        head, body = self.earlier(model, found)
        if found == "pretrain" and not any(key.startswith(f"{TEXT}{model.text.kind}.") for key in state):
            raise CheckpointError(
                f"{name} was not pre-trained with {model.text.kind}, the text encoder of this model"
            )
        ours, unmatched = (head + body).translate(state)
        if unmatched:
            raise CheckpointError(f"{name} holds {len(unmatched)} unknown tensors: {groups(unmatched)}")
        result = convert(model, ours, stage=stage, found=found, name=name)
        used = {key: tensor.to("meta") for key, tensor in ours.items() if key not in result.unexpected}
        # The head's second name of the word embeddings is used only together with the head.
        with_head = any(key.startswith("mlm_head.") for key in used)
        taken = (head + body if with_head else body).to_source(used)
        return result._replace(unexpected=self._trained(key for key in state if key not in taken))

    def _trained(self, names: Iterable[str]) -> tuple[str, ...]:
        return tuple(name for name in names if not name.endswith(self.computed))

    def _of_teacher(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Names of a model as those of its teacher."""
        return tuple(self.join(Contents({}, {name: torch.empty(0) for name in names}, {})))


def _open(source: Mapping[str, Tensor] | str | Path, name: str | None) -> tuple[Mapping[str, Tensor], str]:
    if isinstance(source, str | Path):
        return files.read(source), name or str(source)
    return source, name or "the state dict"


# Names that families share
# ------------------------------------------------------------------------------------------------------------


def head_names(*, linear: Iterable[str], stacked: Iterable[str]) -> dict[str, Rename]:
    """Rows for heads at the top of a file, by our name: `linear` layers, and `stacked` ones that hold several
    by number; `temperature` besides."""
    return {
        "temperature": Rename("temp", "temperature"),
        **{name: Rename(f"{name}.{{p}}", f"{name}.{{p}}") for name in linear},
        **{name: Rename(f"{name}.{{i}}.{{p}}", f"{name}.{{i}}.{{p}}") for name in stacked},
    }


def text_adapter(model: nn.Module) -> Adapter:
    """Names of the text encoder in the file of a model's own stage, with its language head or its decoder."""
    if hasattr(model, "mlm_head"):
        return language_model_adapter(model.text, source_prefix=TEXT)
    adapter = encoder_adapter(model.text, source_prefix=TEXT, prefix="text.")
    if hasattr(model, "decoder"):
        adapter += language_model_adapter(
            model.decoder, source_prefix=DECODER, prefix="decoder.", head_prefix="lm_head."
        )
    return adapter


def earlier_text(text: Bert, found: str) -> EarlierNames:
    """Names of a text encoder like `text` in a file of the stage `found`; `body` holds those of the
    encoder."""
    if found != "pretrain":
        return EarlierNames(Adapter(()), encoder_adapter(text, source_prefix=TEXT, prefix="text."))
    encoder = encoder_adapter(text, source_prefix=f"{TEXT}{text.kind}.", prefix="text.")
    # Pre-training shares no projections, whatever the model does.
    untied = Adapter(tuple(rule for rule in encoder.rules if not isinstance(rule, Tied)))
    return EarlierNames(head_adapter(text.kind, source_prefix=TEXT), untied)


def infer_shared(state: Mapping[str, Tensor], found: str, *, head_width: int) -> dict[str, Any]:
    """Arguments of the text encoder of a file, of its decoder and its shared space where there are any.

    Raises:
        CheckpointError: A width that is no multiple of `head_width`.
    """
    arguments: dict[str, Any] = {
        "text": infer_text(state, DECODER if found == "captioning" else TEXT, head_width)
    }
    if found == "vqa":
        arguments["decoder"] = infer_text(state, DECODER, head_width)
    if found in ALIGNED and "vision_proj.weight" in state:
        arguments["embed_width"] = len(state["vision_proj.weight"])
    return arguments
