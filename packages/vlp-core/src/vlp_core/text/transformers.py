"""Any text encoder of Hugging Face's transformers, for models with two encoders; transformers is imported
when one is made.

Texts meet images in a shared space only: there are no fusion layers (`vlp_core.text.Bert` has them). Of a
folder that holds a whole CLIP the text tower is taken, of an encoder-decoder (T5) the encoder. Poolers of the
published models are left out; `pool` says which state stands for the text.

Shape letters: B texts, T tokens, W width.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

Pool = Literal["first", "last", "end"]


class TransformersText(nn.Module):
    """A text encoder of transformers.

    Args:
        path: Folder with `config.json` and, with `weights`, safetensors files. Nothing is downloaded.
        config: The content of a `config.json` in place of `path` (an export should not name a folder of one
            machine); weights are fresh.
        weights: Whether to load the weights of `path`, all of them or an error; False: fresh ones.
        pool: Which state stands for the text: "first" token (BERT's [CLS]), "last" real token (causal
            models), or the first "end" token (CLIP).
        end_id: Token of `pool` "end"; None: `eos_token_id` of the configuration, or in CLIP's old ones, which
            say 2, the last token of the vocabulary.

    Attributes:
        width: Channels of the states, W.
        vocabulary: Number of tokens.
        positions: Longest text in tokens; None: no limit.
        config: What makes the same architecture again (`TransformersText(config=...)`), as JSON can hold it.
        body: The model of transformers.

    Raises:
        ImportError: transformers is not installed.
        ValueError: Both or none of `path` and `config`; a folder without what is needed; an architecture that
            encodes no texts; weights that are missing.
    """

    def __init__(
        self,
        *,
        path: str | Path | None = None,
        config: Mapping[str, Any] | None = None,
        weights: bool = True,
        pool: Pool = "first",
        end_id: int | None = None,
    ) -> None:
        super().__init__()
        if (path is None) == (config is None):
            raise ValueError(
                "a text encoder of transformers is made from path or from config: give one of them"
            )
        if pool not in ("first", "last", "end"):
            raise ValueError(f"pool={pool!r} is not known; choose first, last or end")
        if end_id is not None and pool != "end":
            raise ValueError(f"end_id={end_id} belongs to pool=end, but pool is {pool}; leave it out")
        settings = _read_config(Path(path)) if path is not None else dict(config or {})
        shape = _text_config(settings)
        if path is not None and weights:
            self.body = _load(Path(path), shape)
        else:
            self.body = _fresh(shape)
        if self.body.main_input_name != "input_ids":
            raise ValueError(f"model type {shape.model_type} encodes no texts; take a text encoder")
        # Nobody reads what these make, and parameters without a gradient stop training on several ranks.
        for name in ("pooler", "head"):
            if isinstance(getattr(self.body, name, None), nn.Module):
                setattr(self.body, name, nn.Identity())
        self.pool: Pool = pool
        self.width: int = shape.hidden_size
        self.vocabulary: int = shape.vocab_size
        self.positions = _positions(self.body, shape)
        self.config: dict[str, Any] = json.loads(shape.to_json_string(use_diff=False))
        self.end_id = _end_id(shape) if end_id is None and pool == "end" else end_id

    def forward(self, ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
        """The state that stands for each text, [B, W]: `encode`, then `pooled`."""
        return self.pooled(self.encode(ids_BT, attention_mask_BT), ids_BT, attention_mask_BT)

    def encode(self, ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
        """States of all tokens, [B, T, W], without meaning at padding.

        Args:
            ids_BT: Token ids.
            attention_mask_BT: 1 for real tokens.

        Raises:
            ValueError: Texts longer than the position table.
        """
        if self.positions is not None and ids_BT.shape[1] > self.positions:
            raise ValueError(
                f"texts of {ids_BT.shape[1]} tokens do not fit {self.positions} positions; lower max_tokens"
            )
        return self.body(input_ids=ids_BT, attention_mask=attention_mask_BT).last_hidden_state

    def pooled(self, states_BTW: Tensor, ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
        """The states that `pool` chooses, [B, W].

        A text without end token (cut off) is read at its last real token.
        """
        if self.pool == "first":
            return states_BTW[:, 0]
        places = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        real = attention_mask_BT.bool()
        chosen = (places * real).amax(1)
        if self.pool == "end":
            ends = (ids_BT == self.end_id) & real
            chosen = torch.where(ends.any(1), ends.int().argmax(1), chosen)
        return states_BTW[torch.arange(len(ids_BT), device=ids_BT.device), chosen]


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "text kind transformers needs transformers: pip install 'vlp-core[transformers]'"
        ) from error
    return transformers


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(
            f"{folder} is no folder of transformers: it holds no config.json (nothing is downloaded)"
        )
    return json.loads(file.read_text())


def _text_config(settings: Mapping[str, Any]) -> Any:
    """The configuration of the text tower."""
    auto = _transformers().AutoConfig
    kind = settings.get("model_type")
    if kind is None:
        raise ValueError("the configuration of a text encoder has no model_type, which transformers goes by")
    try:
        whole = auto.for_model(**settings)
    except ValueError as error:
        raise ValueError(f"the installed transformers knows no model type {kind!r}") from error
    return whole if whole.is_encoder_decoder else whole.get_text_config()


def _factory(shape: Any) -> Any:
    """What makes the model: of an encoder-decoder only the encoder."""
    transformers = _transformers()
    return transformers.AutoModelForTextEncoding if shape.is_encoder_decoder else transformers.AutoModel


def _fresh(shape: Any) -> nn.Module:
    try:
        return _factory(shape).from_config(shape)
    except ValueError as error:
        raise ValueError(f"transformers makes no text encoder of model type {shape.model_type!r}") from error


def _load(folder: Path, shape: Any) -> nn.Module:
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{folder} holds no weights (*.safetensors); say weights=false for fresh ones, or save the "
            "model as safetensors"
        )
    with _quiet():
        try:
            body, report = _factory(shape).from_pretrained(
                folder,
                config=shape,
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
                # Reported below, in words.
                ignore_mismatched_sizes=True,
            )
        except ValueError as error:
            raise ValueError(f"transformers makes no text encoder of {folder}: {error}") from error
    # A pooler is left out anyway.
    missing = sorted(name for name in report["missing_keys"] if not name.startswith(("pooler.", "head.")))
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} of the weights that its config.json asks for, such as "
            f"{missing[0]}; give the folder of a text encoder or of a whole model with one"
        )
    for name, found, wanted in sorted(report["mismatched_keys"]):
        raise ValueError(
            f"{name} in {folder} has shape {list(found)}, but its config.json asks for {list(wanted)}"
        )
    # As every new module; transformers gives a model in evaluation mode.
    return body.train()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own report, which lists what an image tower beside the text is left out of."""
    logging = _transformers().utils.logging
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _positions(body: nn.Module, shape: Any) -> int | None:
    longest = getattr(shape, "max_position_embeddings", None)
    table = getattr(getattr(body, "embeddings", None), "position_embeddings", None)
    # RoBERTa's first position is the one behind that of padding.
    padding = getattr(table, "padding_idx", None)
    before = 0 if padding is None else padding + 1
    return None if longest is None else longest - before


def _end_id(shape: Any) -> int:
    end = shape.eos_token_id
    if shape.model_type == "clip_text_model" and end == 2:
        return shape.vocab_size - 1
    if end is None:
        raise ValueError(
            f"pool=end needs an end token, and the configuration of model type {shape.model_type} names "
            "no eos_token_id; give end_id"
        )
    # Some configurations list several.
    return end if isinstance(end, int) else end[0]
