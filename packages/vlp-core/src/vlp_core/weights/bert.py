"""Tensor names of BERT and RoBERTa in Hugging Face's layout, which X-VLM's `xbert.py` and `xroberta.py` follow."""

import torch
from torch import nn

from vlp_core.text.bert import Bert
from vlp_core.weights.adapter import Adapter, Buffer, Drop, Fuse, Rename, Rule, Tied
from vlp_core.weights.loading import Loaded, load

_LAYER = "encoder.layer.{i}."


def encoder(text: Bert) -> Adapter:
    """Names below `bert.` or `roberta.`, for an encoder of the size and sharing of `text`."""
    rules: list[Rule] = [
        Rename("embeddings.word_embeddings.weight", "word_embedding.weight"),
        Rename("embeddings.position_embeddings.weight", "position_embedding.weight"),
        Rename("embeddings.token_type_embeddings.weight", "type_embedding.weight"),
        Buffer(
            "embeddings.position_ids",
            lambda: torch.arange(text.position_embedding.num_embeddings)[None],
        ),
    ]
    first, group = text.fusion_layer, text.layers_per_image_projection
    # Fusion layers that share a projection hold it under each layer's name in the source, and once here.
    rules += [
        Tied(
            f"encoder.layer.{layer}.crossattention.self.{part}.{{p}}",
            of=f"encoder.layer.{layer - (layer - first) % group}.crossattention.self.{part}.{{p}}",
        )
        for layer in range(first, len(text.layers))
        if (layer - first) % group
        for part in ("key", "value")
    ]
    rules += [
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
    ]
    for source, ours in (
        ("embeddings.LayerNorm", "embedding_norm"),
        (f"{_LAYER}attention.output.LayerNorm", "layers.{i}.attention_norm"),
        (f"{_LAYER}crossattention.output.LayerNorm", "layers.{i}.cross_norm"),
        (f"{_LAYER}output.LayerNorm", "layers.{i}.output_norm"),
    ):
        rules += _norm(source, ours)
    return Adapter(tuple(rules))


def _norm(source: str, ours: str) -> list[Rule]:
    # The files of 2018 say gamma and beta; they are read, and written with today's names.
    return [
        Rename(f"{source}.weight", f"{ours}.weight"),
        Rename(f"{source}.bias", f"{ours}.bias"),
        Rename(f"{source}.gamma", f"{ours}.weight"),
        Rename(f"{source}.beta", f"{ours}.bias"),
    ]


def language_model(text: Bert, *, text_prefix: str = "text.", head_prefix: str = "mlm_head.") -> Adapter:
    """Names of `BertForMaskedLM` / `RobertaForMaskedLM` for a model that holds `text` and a `MaskedLanguageHead` at our prefixes."""
    roberta = text.kind == "roberta"
    base = "roberta." if roberta else "bert."
    head = "lm_head." if roberta else "cls.predictions."
    transform = "lm_head." if roberta else "cls.predictions.transform."
    return Adapter(
        (
            Tied(f"{head}decoder.weight", of=f"{base}embeddings.word_embeddings.weight"),
            Tied(f"{head}decoder.bias", of=f"{head}bias"),
            Rename(f"{head}bias", f"{head_prefix}bias"),
            Rename(f"{transform}dense.{{p}}", f"{head_prefix}dense.{{p}}"),
            *_norm(transform + ("layer_norm" if roberta else "LayerNorm"), f"{head_prefix}norm"),
        )
    ) + encoder(text).prefixed(source=base, ours=text_prefix)


def published(text: Bert, *, text_prefix: str = "text.", head_prefix: str = "mlm_head.") -> Adapter:
    """As `language_model`, for the published weights, whose pooler and next-sentence head have no counterpart here."""
    base = "roberta." if text.kind == "roberta" else "bert."
    return language_model(text, text_prefix=text_prefix, head_prefix=head_prefix) + Adapter(
        (Drop(f"{base}pooler.{{rest...}}"), Drop("cls.seq_relationship.{rest...}"))
    )


def load_published(model: nn.Module, path: str) -> Loaded:
    """Start the `text` encoder and `mlm_head` of `model` from published BERT or RoBERTa weights.

    Cross-attention is not in such a file and keeps its initial values, as everything outside text encoder and head.

    Raises:
        CheckpointError: See `vlp_core.weights.load`.
    """
    parts = nn.ModuleDict({"text": model.text, "mlm_head": model.mlm_head})
    return load(
        parts,
        path,
        published(model.text),
        allow_missing=("text.layers.*.cross", "text.layers.*.cross_norm"),
    )
