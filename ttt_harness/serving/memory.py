"""How the trainer and the engine share a GPU: both stay on it, or they take turns.

The plan is arithmetic on sizes that are known before anything is loaded. Sizes are in bytes.
"""

import functools
from dataclasses import dataclass

import torch

GIB = 2**30

# Besides weights and caches: a CUDA context, the engine's graphs and the activations of its largest batch.
ENGINE_OVERHEAD = 7 * GIB // 2
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


@dataclass(frozen=True)
class Sizes:
    """What takes memory: base weights, an adapter, one token's keys and values, one token's activations in a fit."""

    base: int
    adapter: int
    kv_token: int
    fit_token: int


@dataclass(frozen=True)
class MemoryPlan:
    """Whether trainer and engine take turns, what each may use in all and for its tokens, and why, in one line."""

    turns: bool
    engine: int
    kv_cache: int
    trainer: int
    activations: int
    reason: str


@functools.cache
def gpu_memory() -> tuple[int, int]:
    """The GPU's free memory as it was when this process first asked, before it took any itself; and all of it."""
    return torch.cuda.mem_get_info()


def plan_memory(budget: int, sizes: Sizes, context: int) -> MemoryPlan | None:
    """Divide `budget` bytes between a trainer and an engine that must hold the keys and values of `context` tokens.

    Returns:
        The plan, or None where not even one of them fits alone.
    """
    engine = sizes.base + ENGINE_ADAPTER_COPIES * sizes.adapter + ENGINE_OVERHEAD
    trainer = sizes.base + ADAPTER_COPIES * sizes.adapter + TRAINER_OVERHEAD
    least_kv, enough_kv = context * sizes.kv_token, max(context, ENOUGH_KV_TOKENS) * sizes.kv_token
    enough_activations = ENOUGH_FIT_TOKENS * sizes.fit_token
    least_activations = min(LEAST_ACTIVATIONS, enough_activations)
    room = budget - engine - trainer
    if turns := room < least_kv + least_activations:
        kv, activations = min(enough_kv, budget - engine), min(enough_activations, budget - trainer)
        if kv < least_kv or activations <= 0:
            return None
    else:
        # Half of what is left over goes to each, and what one cannot use goes to the other.
        spare = room - least_kv - least_activations
        activations = min(enough_activations, least_activations + max(spare // 2, spare - (enough_kv - least_kv)))
        kv = min(enough_kv, room - activations)
    engine, trainer = engine + kv, trainer + activations
    sizes_in_words = f"{trainer / GIB:.1f} GiB to fit and {engine / GIB:.1f} GiB to serve"
    reason = (
        f"memory: trainer and engine take turns ({sizes_in_words}; at once they do not fit in {budget / GIB:.1f} GiB)"
        if turns
        else f"memory: trainer and engine both stay on the GPU ({sizes_in_words}, of {budget / GIB:.1f} GiB)"
    )
    return MemoryPlan(turns, engine=engine, kv_cache=kv, trainer=trainer, activations=activations, reason=reason)
