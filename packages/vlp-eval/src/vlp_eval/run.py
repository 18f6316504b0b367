"""From a checkpoint and the options of a benchmark to files: what the commands of `vlp-eval` do."""

import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from vlp_core import distributed, models, recipe
from vlp_data.text import Tokenizer, pre_caption
from vlp_data.transforms import eval_view

from vlp_eval.figures import retrieval_figure
from vlp_eval.gallery import Gallery
from vlp_eval.options import Retrieval
from vlp_eval.protocol import RetrievalModel
from vlp_eval.report import Scores
from vlp_eval.retrieval import evaluate_retrieval


def retrieval(checkpoint: str, options: Retrieval) -> Scores:
    """`vlp-eval retrieval`: prints the table, writes `retrieval.json` and `retrieval.png` into `options.out`.

    Started by torchrun, the ranks share the work and rank 0 prints and writes. Raises ValueError, FileNotFoundError, `DataError` or
    `CheckpointError` for what a user can put right.
    """
    start = time.monotonic()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)  # now, not after an hour of work
    device = _device(options.device)
    with _ranks(device):
        gallery = retrieval_gallery(options)
        loaded = models.load(checkpoint)
        if not hasattr(loaded.model, "encode_text"):
            raise ValueError(f"{checkpoint} holds the model {loaded.name}, which cannot encode a text alone")
        text = loaded.settings.get("text", {})
        gallery = cleaned(gallery, options, text.get("max_words", 30))
        words = tokenizer(options.tokenizer, text, checkpoint)
        known = loaded.model.text.word_embedding.num_embeddings
        if words.vocabulary != known:
            raise ValueError(
                f"the tokenizer has {words.vocabulary} tokens, {checkpoint} was trained with {known}: another vocabulary"
            )
        scores = evaluate_retrieval(
            cast(RetrievalModel, loaded.model.to(device)),
            gallery,
            words,
            view=partial(eval_view, size=loaded.settings["image_size"]),
            max_tokens=options.max_tokens or text.get("max_tokens", 40),
            separator=text.get("separator", False),
            rerank=options.rerank,
            ties=options.ties,
            fold_size=options.fold_size,
            image_batch=options.image_batch,
            text_batch=options.text_batch,
            pair_batch=options.pair_batch,
            workers=options.workers,
            precision=options.precision,
            progress=_progress(),
        )
        settings = {
            "checkpoint": checkpoint,
            **scores.settings,
            "options": recipe.dump(options),
            "versions": _versions(),
        }
        scores = replace(scores, settings=settings)
        if distributed.is_main():
            (out / "retrieval.json").write_text(scores.json(), encoding="utf-8")
            written = [out / "retrieval.json"]
            if options.figures:
                retrieval_figure(scores, gallery, queries=options.figures).save(out / "retrieval.png")
                written.append(out / "retrieval.png")
            print(scores.table())
            names = " and ".join(str(path) for path in written)
            print(f"{names} written, {time.monotonic() - start:.1f} s on {device}")
    return scores


def retrieval_gallery(options: Retrieval) -> Gallery:
    """The pictures and captions that the options name; texts are not cleaned yet."""
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
    """The tokenizer of `files`, else of the checkpoint's `text` settings; one file is WordPiece, two are RoBERTa's."""
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
