"""Operators for vision-language models: fast kernels where they are built, PyTorch everywhere else.

Every function works on any device with nothing compiled; `backend_info()` says which kernels serve the calls
and why. `vlp_ops.reference` holds the plain definitions that the tests compare against.
"""

from vlp_ops import compat, reference
from vlp_ops._library import backend_info
from vlp_ops.contrastive import clip_loss, info_nce, siglip_loss
from vlp_ops.deformable import MSDeformAttn, ms_deform_attn
from vlp_ops.dense import Linear, linear, linear_backend
from vlp_ops.distributed import gather_features
from vlp_ops.masked_attention import attention, attention_backend
from vlp_ops.memory import embedding_bag, product_key_lookup, product_key_topk
from vlp_ops.tokens import random_masking, restore_tokens, take_tokens

__version__ = "0.1.0"

__all__ = [
    "Linear",
    "MSDeformAttn",
    "attention",
    "attention_backend",
    "backend_info",
    "clip_loss",
    "compat",
    "embedding_bag",
    "gather_features",
    "info_nce",
    "linear",
    "linear_backend",
    "ms_deform_attn",
    "product_key_lookup",
    "product_key_topk",
    "random_masking",
    "reference",
    "restore_tokens",
    "siglip_loss",
    "take_tokens",
]
