"""Tensor names of BERT and RoBERTa in Hugging Face's layout, which X-VLM's `xbert.py` and `xroberta.py`
follow."""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from vlp_core.text.bert import Bert
from vlp_core.weights.adapter import Adapter, Buffer, Drop, Fuse, Rename, Rule, Tied
from vlp_core.weights.files import read
from vlp_core.weights.loading import LoadReport, load

Kind = Literal["bert", "roberta"]

_LAYER = "encoder.layer.{i}."

_NOT_KEPT = {
    kind: Adapter((Drop(f"{kind}.pooler.{{rest...}}"), Drop("cls.seq_relationship.{rest...}")))
    for kind in ("bert", "roberta")
}
_FRESH = ("text.layers.*.cross", "text.layers.*.cross_norm")


def encoder_adapter(text: Bert, *, source_prefix: str = "", prefix: str = "") -> Adapter:
    """Names below `bert.` or `roberta.`, for an encoder with the sharing of `text`.

    `source_prefix`, `prefix`: before every name of the source and of ours.
    """
    first, group = text.fusion_layer, text.layers_per_image_projection
    # Fusion layers that share a projection hold it under each layer's name in the source, and once here.
    shared: list[Rule] = [
        Tied(
            f"encoder.layer.{layer}.crossattention.self.{part}.{{p}}",
            of=f"encoder.layer.{layer - (layer - first) % group}.crossattention.self.{part}.{{p}}",
        )
        for layer in range(first, len(text.layers))
        if (layer - first) % group
        for part in ("key", "value")
    ]
    rules: list[Rule] = [
        Rename("embeddings.word_embeddings.weight", "word_embedding.weight"),
        Rename("embeddings.position_embeddings.weight", "position_embedding.weight"),
        Rename("embeddings.token_type_embeddings.weight", "type_embedding.weight"),
        Buffer("embeddings.position_ids", partial(_position_ids, text.position_embedding.num_embeddings)),
        Fuse(
            tuple(f"{_LAYER}attention.self.{part}.{{p}}" for part in ("query", "key", "value")),
            "layers.{i}.attention.query_key_value.{p}",
        ),
        Rename(f"{_LAYER}attention.output.dense.{{p}}", "layers.{i}.attention.out.{p}"),
        Rename(f"{_LAYER}crossattention.self.query.{{p}}", "layers.{i}.cross.query.{p}"),
        Fuse(
            tuple(f"{_LAYER}crossattention.self.{part}.{{p}}" for part in ("key", "value")),
            "layers.{i}.cross.key_value.{p}",
        ),
        Rename(f"{_LAYER}crossattention.output.dense.{{p}}", "layers.{i}.cross.out.{p}"),
        Rename(f"{_LAYER}intermediate.dense.{{p}}", "layers.{i}.expand.{p}"),
        Rename(f"{_LAYER}output.dense.{{p}}", "layers.{i}.contract.{p}"),
        *_norm("embeddings.LayerNorm", "embedding_norm"),
        *_norm(f"{_LAYER}attention.output.LayerNorm", "layers.{i}.attention_norm"),
        *_norm(f"{_LAYER}crossattention.output.LayerNorm", "layers.{i}.cross_norm"),
        *_norm(f"{_LAYER}output.LayerNorm", "layers.{i}.output_norm"),
    ]
    return Adapter((*shared, *rules)).prefixed(source=source_prefix, ours=prefix)


def head_adapter(kind: Kind, *, source_prefix: str = "", prefix: str = "mlm_head.") -> Adapter:
    """Names of the head of `BertForMaskedLM` or `RobertaForMaskedLM`; its output projection is the word
    embedding."""
    roberta = kind == "roberta"
    head = "lm_head." if roberta else "cls.predictions."
    transform = head if roberta else f"{head}transform."
    return Adapter(
        (
            Tied(f"{head}decoder.weight", of=f"{kind}.embeddings.word_embeddings.weight"),
            Tied(f"{head}decoder.bias", of=f"{head}bias"),
            Rename(f"{head}bias", "bias"),
            Rename(f"{transform}dense.{{p}}", "dense.{p}"),
            *_norm(transform + ("layer_norm" if roberta else "LayerNorm"), "norm"),
        )
    ).prefixed(source=source_prefix, ours=prefix)


def language_model_adapter(
    text: Bert, *, source_prefix: str = "", prefix: str = "text.", head_prefix: str = "mlm_head."
) -> Adapter:
    """Names of `BertForMaskedLM` or `RobertaForMaskedLM` for a model with `text` and a `MaskedLanguageHead`
    at our prefixes."""
    return head_adapter(text.kind, source_prefix=source_prefix, prefix=head_prefix) + encoder_adapter(
        text, source_prefix=f"{source_prefix}{text.kind}.", prefix=prefix
    )


def load_published_layers(
    text: Bert, state: Mapping[str, Tensor] | str | Path, *, head: nn.Module | None = None
) -> LoadReport:
    """Start an encoder from the embedding and as many lower layers of published BERT or RoBERTa weights as it
    has.

    For encoders with fewer layers than the file (concepts, an answer decoder). Layers above, the pooler and
    the next-sentence head are left out; cross-attention is not in such a file and keeps its initial values.

    Args:
        text: Encoder to fill.
        state: The file, or its state dict.
        head: `MaskedLanguageHead` of `text`, filled too; None leaves the file's head out.

    Raises:
        CheckpointError: A file with fewer layers; see also `vlp_core.weights.load`.
    """
    name = str(state) if isinstance(state, str | Path) else "the state dict"
    found = read(state) if isinstance(state, str | Path) else state
    above = re.compile(rf"{text.kind}\.encoder\.layer\.(\d+)\.")
    kept = {
        key: tensor
        for key, tensor in found.items()
        if (layer := above.match(key)) is None or int(layer[1]) < len(text.layers)
    }
    parts = nn.ModuleDict({"text": text} if head is None else {"text": text, "mlm_head": head})
    return load(
        parts,
        kept,
        language_model_adapter(text) + _NOT_KEPT[text.kind],
        allow_missing=_FRESH,
        allow_unexpected=() if head is not None else ("mlm_head",),
        name=name,
    )


def load_published(model: nn.Module, state: dict[str, Tensor] | str | Path) -> LoadReport:
    """Start `model.text` and `model.mlm_head` from published BERT or RoBERTa weights.

    Cross-attention is not in such a file and keeps its initial values. The pooler, the next-sentence head and
    old names (gamma, beta) are understood.

    Raises:
        CheckpointError: See `vlp_core.weights.load`.
    """
    parts = nn.ModuleDict({"text": model.text, "mlm_head": model.mlm_head})
    adapter = language_model_adapter(model.text) + _NOT_KEPT[model.text.kind]
    return load(parts, state, adapter, allow_missing=_FRESH)


def _norm(source: str, ours: str) -> list[Rule]:
    # The files of 2018 say gamma and beta; they are read, and written with today's names.
    return [
        Rename(f"{source}.weight", f"{ours}.weight"),
        Rename(f"{source}.bias", f"{ours}.bias"),
        Rename(f"{source}.gamma", f"{ours}.weight"),
        Rename(f"{source}.beta", f"{ours}.bias"),
    ]


def _position_ids(positions: int) -> Tensor:
    return torch.arange(positions)[None]
