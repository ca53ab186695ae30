"""All that is taken from torchtune, whose last release is of April 2025; no other module of the package imports it."""

from torchtune.models.gemma.gemma_norm_embedding import GemmaNormEmbeddings
from torchtune.models.gemma.rms_norm import GemmaRMSNorm
from torchtune.models.gemma2._attention import Gemma2Attention
from torchtune.models.llama3_1 import Llama3ScaledRoPE
from torchtune.modules import (
    FeedForward,
    MultiHeadAttention,
    RMSNorm,
    RotaryPositionalEmbeddings,
    TiedLinear,
    TransformerDecoder,
    TransformerSelfAttentionLayer,
)
from torchtune.modules.peft import LoRALinear, get_adapter_params, set_trainable_params
from torchtune.training import set_default_dtype
from torchtune.training.lr_schedulers import get_cosine_schedule_with_warmup

__all__ = [
    "FeedForward",
    "Gemma2Attention",
    "GemmaNormEmbeddings",
    "GemmaRMSNorm",
    "Llama3ScaledRoPE",
    "LoRALinear",
    "MultiHeadAttention",
    "RMSNorm",
    "RotaryPositionalEmbeddings",
    "TiedLinear",
    "TransformerDecoder",
    "TransformerSelfAttentionLayer",
    "get_adapter_params",
    "get_cosine_schedule_with_warmup",
    "set_default_dtype",
    "set_trainable_params",
]
