"""Any CLIP, by name or local folder, of open_clip or transformers (optional extras of vlp-data), behind one
interface."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from vlp_data import files
from vlp_data.errors import DataError
from vlp_data.identity import folder_checksum

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image as Pillow


class Encoder(NamedTuple):
    """A loaded CLIP. Vectors are float32, not normalised, as `encode_image` and `encode_text` of the original
    give them."""

    prepare: "Callable[[Pillow.Image], torch.Tensor]"
    """RGB image -> [3, side, side], the model's own evaluation view; may be called from threads."""
    images: "Callable[[Sequence[torch.Tensor]], np.ndarray]"
    """Prepared images -> [B, D]."""
    texts: "Callable[[Sequence[str]], np.ndarray]"
    """Texts, cut at the length of the model -> [B, D]. No prompt is put around them."""


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Which CLIP, on which device and in which precision."""

    name: str
    """A local folder, a name of open_clip ("ViT-B-16"), or "owner/model" of the Hugging Face hub."""
    weights: str = ""
    """open_clip: tag of the weights ("openai") or a checkpoint file. A folder or "owner/model" brings its
    own."""
    library: Literal["auto", "open_clip", "transformers"] = "auto"
    """auto: a folder by the config it holds, "owner/model" transformers, any other name open_clip."""
    device: str = "auto"
    """As torch names it ("cpu", "cuda:1"); auto: the GPU if there is one."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the model. The reference ran in float16 on its GPU."""

    def identity(self) -> dict[str, Any]:
        """The settings that the vectors depend on, with checksums of the model's files where it is one of
        this machine: other weights at the same path are another model."""
        sums = {
            f"{what} (checksum)": folder_checksum(path)
            for what, path in (("clip", self.name), ("weights", self.weights))
            if path and not files.is_url(path) and files.local(path).exists()
        }
        return {
            "clip": self.name,
            "weights": self.weights,
            "library": self.kind(),
            "dtype": self.dtype,
            **sums,
        }

    def kind(self) -> Literal["open_clip", "transformers"]:
        """The library. Raises DataError for a folder that belongs to neither."""
        if self.library != "auto":
            return self.library
        folder = files.local(self.name)
        if folder.is_dir():
            if (folder / "open_clip_config.json").is_file():
                return "open_clip"
            if (folder / "config.json").is_file():
                return "transformers"
            raise DataError(f"{self.name} holds neither open_clip_config.json nor config.json; is it a CLIP?")
        return "transformers" if "/" in self.name else "open_clip"

    def load(self) -> Encoder:
        """Read the model. Raises DataError where its library is missing or cannot read it."""
        import torch

        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        kind = self.kind()
        if kind == "transformers" and self.weights:
            raise DataError(
                f"weights={self.weights}: a model of transformers brings its own, give only its name"
            )
        load = _open_clip if kind == "open_clip" else _transformers
        try:
            return load(self, torch.device(device), getattr(torch, self.dtype))
        except ImportError as error:
            raise DataError(
                f"{self.name} needs {kind} ({error}); `pip install 'vlp-data[{kind.replace('_', '-')}]'`"
            ) from error
        except (OSError, RuntimeError, ValueError) as error:
            raise DataError(f"{kind} cannot load {self.name} {self.weights}: {error}") from error


def _open_clip(clip: Clip, device: "torch.device", dtype: "torch.dtype") -> Encoder:
    import open_clip
    import torch

    name = clip.name
    if files.local(name).is_dir():
        name = f"local-dir:{files.local(name)}"
    weights = os.fspath(files.local(clip.weights)) if os.path.sep in clip.weights else clip.weights
    model, prepare = open_clip.create_model_from_pretrained(name, pretrained=weights or None, device="cpu")
    tokenize = open_clip.get_tokenizer(name)
    model = model.to(device, dtype).eval()

    @torch.inference_mode()
    def images(views):
        return model.encode_image(torch.stack(list(views)).to(device, dtype)).float().cpu().numpy()

    @torch.inference_mode()
    def texts(batch):
        return model.encode_text(tokenize(list(batch)).to(device)).float().cpu().numpy()

    return Encoder(prepare, images, texts)


def _transformers(clip: Clip, device: "torch.device", dtype: "torch.dtype") -> Encoder:
    import torch
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    folder = files.local(clip.name)
    name = os.fspath(folder) if folder.is_dir() else clip.name
    model = AutoModel.from_pretrained(name, dtype=dtype).to(device).eval()
    processor = AutoImageProcessor.from_pretrained(name)
    tokenizer = AutoTokenizer.from_pretrained(name)
    length = model.config.text_config.max_position_embeddings

    def vectors(found) -> "np.ndarray":
        # A tensor before transformers 5, a structure since.
        return (found if isinstance(found, torch.Tensor) else found.pooler_output).float().cpu().numpy()

    def prepare(image):
        return processor(images=image, return_tensors="pt")["pixel_values"][0]

    @torch.inference_mode()
    def images(views):
        return vectors(model.get_image_features(pixel_values=torch.stack(list(views)).to(device, dtype)))

    @torch.inference_mode()
    def texts(batch):
        # Padded to the full length: some models of this family were trained so, for the others it changes
        # nothing.
        tokens = tokenizer(
            list(batch), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        return vectors(model.get_text_features(**tokens.to(device)))

    return Encoder(prepare, images, texts)
