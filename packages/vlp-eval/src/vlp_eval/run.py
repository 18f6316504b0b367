"""From a checkpoint and the options of a benchmark to files: what the commands of `vlp-eval` do."""

import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from PIL.Image import Image
from vlp_core import distributed, models, recipe
from vlp_data.options import ConceptOptions
from vlp_data.text import Tokenizer, pre_caption
from vlp_data.transforms import eval_view

from vlp_eval import figures, predictions
from vlp_eval.captioning import PROMPT, evaluate_captioning, read_references
from vlp_eval.concepts import as_evaluated, reads_concepts
from vlp_eval.gallery import Gallery
from vlp_eval.grounding import evaluate_grounding, word_heat
from vlp_eval.inference import Reading, RowOptions
from vlp_eval.options import Captioning, Entailment, Evaluation, Grounding, Nlvr, Retrieval, Vqa
from vlp_eval.report import Scores
from vlp_eval.retrieval import evaluate_retrieval
from vlp_eval.statements import evaluate_entailment, evaluate_nlvr
from vlp_eval.vqa import evaluate_vqa, read_annotations, read_candidates


def retrieval(checkpoint: str, options: Retrieval) -> Scores:
    """`vlp-eval retrieval`. This and the other functions here print a table and write `BENCHMARK.json`, the
    predictions and `BENCHMARK.png` into `options.out`.

    Started by torchrun, the ranks share the work and rank 0 prints and writes. Raises ValueError,
    FileNotFoundError, `DataError` or `CheckpointError` for what a user can put right.
    """
    with _session(checkpoint, options) as session:
        gallery = retrieval_gallery(options)
        setup = session.load("retrieval")
        text = setup.settings.get("text", {})
        gallery = cleaned(gallery, options, setup.max_words)
        scores = evaluate_retrieval(
            setup.model,
            gallery,
            setup.tokenizer,
            view=setup.rows.view,
            concepts=setup.rows.concepts,
            max_tokens=options.max_tokens or text.get("max_tokens", 40),
            separator=text.get("separator", False),
            rerank=options.rerank,
            ties=options.ties,
            fold_size=options.fold_size,
            text_batch=options.text_batch,
            pair_batch=options.pair_batch,
            image_batch=options.image_batch,
            workers=options.workers,
            precision=options.precision,
            progress=_progress(),
        )
        return session.finish(
            scores, lambda scores: figures.retrieval_figure(scores, gallery, queries=options.figures)
        )


def vqa(checkpoint: str, options: Vqa) -> Scores:
    """`vlp-eval vqa`; the predictions are the file that the challenge's server takes."""
    with _session(checkpoint, options) as session:
        source = options.data.open()
        candidates = read_candidates(options.answers) if options.answers else None
        annotations = read_annotations(options.annotations) if options.annotations else None
        setup = session.load("vqa")
        scores = evaluate_vqa(
            setup.model,
            source,
            setup.tokenizer,
            setup.rows,
            candidates=candidates,
            k=options.k if candidates is None else min(options.k, len(candidates)),
            annotations=annotations,
            variant=options.rule,
            reading=setup.reading(options.max_words, options.max_tokens),
            answer_tokens=options.answer_tokens,
            beams=options.beams,
            pairs=options.pairs,
        )
        return session.finish(
            scores, lambda scores: figures.samples_figure(scores, source, queries=options.figures)
        )


def nlvr(checkpoint: str, options: Nlvr) -> Scores:
    """`vlp-eval nlvr`."""
    return _statements("nlvr", evaluate_nlvr, checkpoint, options)


def entailment(checkpoint: str, options: Entailment) -> Scores:
    """`vlp-eval entailment`."""
    return _statements("entailment", evaluate_entailment, checkpoint, options)


def _statements(
    task: models.Task,
    evaluate: Callable[..., Scores],
    checkpoint: str,
    options: Nlvr | Entailment,
) -> Scores:
    with _session(checkpoint, options) as session:
        source = options.data.open()
        setup = session.load(task)
        scores = evaluate(
            setup.model,
            source,
            setup.tokenizer,
            setup.rows,
            reading=setup.reading(options.max_words, options.max_tokens),
        )
        return session.finish(
            scores, lambda scores: figures.samples_figure(scores, source, queries=options.figures)
        )


def grounding(checkpoint: str, options: Grounding) -> Scores:
    """`vlp-eval grounding`; the image shows true and predicted boxes and, with by=heat, the heat of each
    word."""
    with _session(checkpoint, options) as session:
        source = options.data.open()
        setup = session.load("boxes" if options.by == "boxes" else "weak_grounding")
        reading = setup.reading(options.max_words, options.max_tokens)
        scores = evaluate_grounding(
            setup.model,
            source,
            setup.tokenizer,
            setup.rows,
            reading=reading,
            by=options.by,
            mode=options.mode,
            layer=options.layer,
            alpha=options.alpha,
        )
        heat = None
        if options.layer is not None:
            heat = partial(
                word_heat,
                setup.model,
                setup.tokenizer,
                view=setup.rows.view,
                concepts=setup.rows.concepts,
                reading=reading,
                mode=options.mode,
                layer=options.layer,
            )
        return session.finish(
            scores,
            lambda scores: figures.grounding_figure(scores, source, queries=options.figures, heat=heat),
        )


def captioning(checkpoint: str, options: Captioning) -> Scores:
    """`vlp-eval captioning`; the predictions are the file that COCO's server takes."""
    with _session(checkpoint, options) as session:
        source = options.data.open()
        references = read_references(options.references) if options.references else None
        setup = session.load("captioning")
        scores = evaluate_captioning(
            setup.model,
            source,
            setup.tokenizer,
            setup.rows,
            prompt=setup.settings.get("prompt", PROMPT) if options.prompt is None else options.prompt,
            beams=options.beams,
            max_tokens=options.max_tokens,
            min_tokens=options.min_tokens,
            length_penalty=options.length_penalty,
            references=references,
            java=options.java,
        )
        return session.finish(
            scores, lambda scores: figures.samples_figure(scores, source, queries=options.figures)
        )


def retrieval_gallery(options: Retrieval) -> Gallery:
    """The images and captions that the options name; texts are not cleaned yet."""
    gallery = Gallery.from_source(options.data.open(), limit=options.limit)
    if options.first_captions is not None:
        gallery = gallery.first_texts(options.first_captions)
    return gallery if options.repeated_captions else gallery.without_repeated_texts()


def cleaned(gallery: Gallery, options: Retrieval, max_words: int) -> Gallery:
    """The gallery with texts cleaned as the options say; `max_words` is what counts when they do not say."""
    if options.clean == "none":
        return gallery
    return gallery.map_texts(partial(pre_caption, max_words=options.max_words or max_words))


def tokenizer(files: Sequence[str], text: Mapping[str, Any], checkpoint: str) -> Tokenizer:
    """The tokenizer of `files`, else of the checkpoint's `text` settings; one file is WordPiece, two are
    RoBERTa's."""
    kind = text.get("kind", "bert")
    needed = {"bert": 1, "roberta": 2}[kind]
    chosen = tuple(files) or tuple(text.get("files", ()))
    if len(chosen) != needed:
        wanted = "tokenizer=[vocab.txt]" if needed == 1 else "tokenizer=[vocab.json,merges.txt]"
        raise ValueError(
            f"{checkpoint} has a {kind} text encoder, which takes {needed} tokenizer file(s), and "
            + (f"{list(chosen)} was given" if chosen else "holds none")
            + f"; give {wanted}"
        )
    return Tokenizer.wordpiece(chosen[0]) if kind == "bert" else Tokenizer.roberta(*chosen)


@dataclass(frozen=True, kw_only=True)
class _Setup:
    """A checkpoint ready for evaluation."""

    model: Any
    tokenizer: Tokenizer
    settings: Mapping[str, Any]
    """What the checkpoint says of itself."""
    rows: RowOptions

    @property
    def max_words(self) -> int:
        """Words of a text that the checkpoint was trained with; 30 where it does not say."""
        return self.settings.get("text", {}).get("max_words", 30)

    def reading(self, max_words: int | None, max_tokens: int | None) -> Reading:
        """How texts are read: as the options say, else as in training."""
        separator = self.settings.get("text", {}).get("separator", False)
        return Reading(max_words=max_words or self.max_words, max_tokens=max_tokens, separator=separator)


@dataclass(frozen=True, kw_only=True)
class _Session:
    """One command: where it runs, where it writes, since when."""

    checkpoint: str
    options: Evaluation
    device: torch.device
    out: Path
    start: float

    def load(self, task: models.Task) -> _Setup:
        """The model with its tokenizer, refused where it was not trained for the task."""
        loaded = models.load(self.checkpoint, task=task)
        text = loaded.settings.get("text", {})
        words = tokenizer(self.options.tokenizer, text, self.checkpoint)
        known = cast(Any, loaded.model).text.word_embedding.num_embeddings
        if words.vocabulary != known:
            raise ValueError(
                f"the tokenizer has {words.vocabulary} tokens, {self.checkpoint} was trained with {known}: another vocabulary"
            )
        return _Setup(
            model=loaded.model.to(self.device),
            tokenizer=words,
            settings=loaded.settings,
            rows=RowOptions(
                view=partial(eval_view, size=loaded.settings["image_size"]),
                concepts=self._concepts(task, loaded.model, loaded.settings),
                limit=self.options.limit,
                image_batch=self.options.image_batch,
                workers=self.options.workers,
                precision=self.options.precision,
                progress=_progress(),
            ),
        )

    def _concepts(self, task: models.Task, model: Any, settings: Mapping[str, Any]) -> ConceptOptions | None:
        """How concepts are read: as the options say, else as in training, with the padding and without the
        draws of the reference's evaluation."""
        if self.options.concepts is not None or not reads_concepts(model):
            return self.options.concepts
        trained = ConceptOptions(**settings.get("concepts", {}))
        return as_evaluated(trained, alike=task in ("retrieval", "weak_grounding", "boxes"))

    def finish(self, scores: Scores, figure: Callable[[Scores], Image]) -> Scores:
        """Write and print, on rank 0; returns the scores with what they were made by."""
        settings = {
            "checkpoint": self.checkpoint,
            **scores.settings,
            "options": recipe.dump(self.options),
            "versions": _versions(),
        }
        scores = replace(scores, settings=settings)
        if distributed.is_main():
            written = [self.out / f"{scores.benchmark}.json"]
            written[0].write_text(scores.json(), encoding="utf-8")
            if scores.benchmark != "retrieval":
                written.append(predictions.write(scores, self.out))
            if self.options.figures:
                written.append(self.out / f"{scores.benchmark}.png")
                figure(scores).save(written[-1])
            print(scores.table())
            *first, last = map(str, written)
            names = f"{', '.join(first)} and {last}" if first else last
            print(f"{names} written, {time.monotonic() - self.start:.1f} s on {self.device}")
        return scores


@contextmanager
def _session(checkpoint: str, options: Evaluation) -> Iterator[_Session]:
    start = time.monotonic()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)  # now, not after an hour of work
    device = _device(options.device)
    with _ranks(device):
        yield _Session(checkpoint=checkpoint, options=options, device=device, out=out, start=start)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device={name}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name}: torch finds no CUDA device; use device=cpu")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device


@contextmanager
def _ranks(device: torch.device) -> Iterator[None]:
    """Join the ranks that torchrun started, and leave them again."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _progress() -> Callable[[str, int, int], None] | None:
    """A line on the terminal that counts; nothing where no terminal is."""
    if not sys.stderr.isatty():
        return None
    shown = 0.0

    def say(stage: str, done: int, total: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if done == total:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        elif now - shown > 0.2:
            shown = now
            print(f"\r\033[K{stage} {done}/{total}", end="", file=sys.stderr, flush=True)

    return say


def _versions() -> dict[str, str]:
    packages = ("vlp-eval", "vlp-core", "vlp-data", "torch")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
