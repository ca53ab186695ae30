"""How the trainer and the engine share a GPU: both stay on it, or they take turns.

The plan is arithmetic on sizes that are known before anything is loaded. Sizes are in bytes.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ttt_harness.training.shape import ModelShape

GIB = 2**30

# vLLM's default of `gpu_memory_utilization`.
UTILIZATION = 0.9
# Besides weights, caches and activations: the engine's CUDA context and that of this process, graphs and the sampler.
# With Llama-3.1-8B's geometry on a H100 the engine took 6.4 GiB for these and the activations of 16,384 tokens.
ENGINE_OVERHEAD = 5 * GIB // 2
# Steps of many lengths leave pieces of memory that fit none of the next, which torch keeps.
ENGINE_ACTIVATION_COPIES = 2
# What stays on the GPU of an engine that sleeps: a CUDA context and the graphs.
SLEEPING_ENGINE = 3 * GIB // 2
# The most tokens that the engine computes in a step: enough to keep a large card busy, and where there is no room.
# (vLLM's own number grows with the card, and so would what it needs beside the weights.)
BATCH_TOKENS = 8 * 1024
TURNS_BATCH_TOKENS = 2 * 1024
# Besides weights and activations: a CUDA context, logits of a batch, the allocator's slack.
TRAINER_OVERHEAD = 2 * GIB
# Parameters, gradients, AdamW's two moments, and two that are on their way to the store.
ADAPTER_COPIES = 6
# vLLM keeps each adapter that it serves with twice: read, and in the stacked buffers of its kernels.
ENGINE_ADAPTER_COPIES = 2
# A fit with less room than this would spend its time in micro-batches too small for the card.
LEAST_ACTIVATIONS = 4 * GIB
# More than this many tokens' keys and values, or activations, gain nothing.
ENOUGH_KV_TOKENS = 48 * 1024
ENOUGH_FIT_TOKENS = 8 * 1024
# Where a GPU cannot hold the keys and values of a model's whole context window, the longest of these that it holds.
CONTEXTS = (65536, 32768, 16384, 8192, 4096, 2048)


@dataclass(frozen=True)
class Sizes:
    """What takes memory: base weights, an adapter; one token's keys and values, its activations in a fit and served."""

    base: int
    adapter: int
    kv_token: int
    fit_token: int
    serve_token: int

    @classmethod
    def of(cls, shape: ModelShape, rank: int, dtype: torch.dtype) -> "Sizes":
        """Those of a model and its adapters of a rank."""
        return cls(
            base=shape.base_parameters * dtype.itemsize,
            adapter=shape.adapter_parameters(rank) * dtype.itemsize,
            kv_token=2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * dtype.itemsize,
            fit_token=shape.activation_bytes_per_token(dtype, on_gpu=True),
            # Of one layer at a time: gate, up and their product; what comes in, q, k, v and what attention makes of it.
            serve_token=(3 * shape.mlp_dim + 6 * shape.embed_dim) * dtype.itemsize,
        )


@dataclass(frozen=True)
class MemoryPlan:
    """Whether trainer and engine take turns, what each may use in all and for its tokens, and why, in one line.

    context: tokens that a sequence may have. batch_tokens: the most that the engine computes in a step.
    """

    turns: bool
    engine: int
    kv_cache: int
    trainer: int
    activations: int
    context: int
    batch_tokens: int
    reason: str


@functools.cache
def gpu_memory() -> tuple[int, int]:
    """The GPU's free memory as it was when this process first asked, before it took any itself; and all of it."""
    return torch.cuda.mem_get_info()


def gpu_budget(utilization: float = UTILIZATION) -> int:
    """What trainer and engine may use of the GPU together, with vLLM's `gpu_memory_utilization`."""
    free, total = gpu_memory()
    return min(free, int(total * utilization))


def plan_memory(
    budget: int, sizes: Sizes, contexts: Sequence[int], batch_tokens: int | None = None
) -> MemoryPlan | None:
    """Divide `budget` bytes between a trainer and an engine that must hold the keys and values of a whole context.

    Args:
        budget: bytes.
        sizes: what takes memory.
        contexts: context windows in tokens, the first of which that fits is planned for.
        batch_tokens: the most tokens that the engine computes in a step, where that is given.

    Returns:
        The plan, or None where not even one of trainer and engine fits alone.
    """
    for context in contexts:
        for turns in (False, True):
            tokens = batch_tokens or (TURNS_BATCH_TOKENS if turns else BATCH_TOKENS)
            if plan := _divided(budget, sizes, context, tokens, turns=turns):
                return plan
    return None


def _divided(budget: int, sizes: Sizes, context: int, batch_tokens: int, *, turns: bool) -> MemoryPlan | None:
    engine = sizes.base + ENGINE_ADAPTER_COPIES * sizes.adapter + ENGINE_OVERHEAD
    engine += ENGINE_ACTIVATION_COPIES * batch_tokens * sizes.serve_token
    trainer = sizes.base + ADAPTER_COPIES * sizes.adapter + TRAINER_OVERHEAD
    least_kv, enough_kv = context * sizes.kv_token, max(context, ENOUGH_KV_TOKENS) * sizes.kv_token
    enough_activations = ENOUGH_FIT_TOKENS * sizes.fit_token
    if turns:
        kv = min(enough_kv, budget - engine)
        activations = min(enough_activations, budget - SLEEPING_ENGINE - trainer)
        if kv < least_kv or activations <= 0:
            return None
    else:
        least_activations = min(LEAST_ACTIVATIONS, enough_activations)
        room = budget - engine - trainer
        # Half of what is left over goes to each, and what one cannot use goes to the other.
        spare = room - least_kv - least_activations
        if spare < 0:
            return None
        activations = min(enough_activations, least_activations + max(spare // 2, spare - (enough_kv - least_kv)))
        kv = min(enough_kv, room - activations)
    engine, trainer = engine + kv, trainer + activations
    sizes_in_words = f"{trainer / GIB:.1f} GiB to fit and {engine / GIB:.1f} GiB to serve"
    reason = (
        f"memory: trainer and engine take turns ({sizes_in_words}; at once they do not fit in {budget / GIB:.1f} GiB)"
        if turns
        else f"memory: trainer and engine both stay on the GPU ({sizes_in_words}, of {budget / GIB:.1f} GiB)"
    )
    return MemoryPlan(
        turns,
        engine=engine,
        kv_cache=kv,
        trainer=trainer,
        activations=activations,
        context=context,
        batch_tokens=batch_tokens,
        reason=reason,
    )


def possible_contexts(shape: ModelShape, asked: int | None) -> list[int]:
    """The context windows to plan for, the best first: the one that is asked for, else the model's and shorter ones."""
    return [asked] if asked else [shape.context_length, *(c for c in CONTEXTS if c < shape.context_length)]
