"""How many floating-point operations the work needs, whoever does it and however.

Only what cannot be left out is counted, so that both pipelines are held against the same figure: frozen weights get no
gradient, logits are needed where a token is labelled or generated, and what several prompts begin with is read once.
Recomputed activations, padding and logits that nobody reads are not counted. A multiplication and an addition are two
operations. Norms, softmax, RoPE and the optimiser are left out: they are far below a percent. Each layer counts for
each token, although the last one's MLP can do with the labelled tokens, as it does here.
"""

from collections.abc import Iterable, Sequence

from ttt_harness.data.sequences import TrainingSequence
from ttt_harness.training.families import LORA_ATTENTION_MODULES
from ttt_harness.training.shape import ModelShape

# Which of the projections of `projections` carry a LoRA update.
ADAPTED = (*LORA_ATTENTION_MODULES, "gate", "up", "down")

Tokens = Sequence[int]


def projections(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """The weight matrices of one layer: name -> (input width, output width)."""
    width, mlp, kv = shape.embed_dim, shape.mlp_dim, shape.num_kv_heads * shape.head_dim
    return {
        "q_proj": (width, width),
        "k_proj": (width, kv),
        "v_proj": (width, kv),
        "output_proj": (width, width),
        "gate": (width, mlp),
        "up": (width, mlp),
        "down": (mlp, width),
    }


def layer_weights(shape: ModelShape) -> int:
    """The weights of all layers' projections, without embeddings and output matrix."""
    return shape.num_layers * sum(inside * outside for inside, outside in projections(shape).values())


def lora_weights(shape: ModelShape, rank: int) -> int:
    """The weights of an adapter: two matrices of `rank` for each adapted projection."""
    widths = projections(shape)
    return shape.num_layers * rank * sum(sum(widths[name]) for name in ADAPTED)


def output_weights(shape: ModelShape) -> int:
    """The weights of the output matrix, which logits are computed with."""
    return shape.vocab_size * shape.embed_dim


def attention_pair(shape: ModelShape) -> int:
    """Forward operations for one query and one key that it attends to: q·k and p·v, two for each element, per layer."""
    return 4 * shape.embed_dim * shape.num_layers


def fit_flops(shape: ModelShape, rank: int, sequences: Iterable[TrainingSequence]) -> int:
    """Operations to train on each of `sequences` once.

    Per token: 4 for each frozen weight (2 forward, 2 for the gradient of what came in) and 6 for each LoRA weight (the
    gradient of the weight too). Causal attention, forward and twice that for its gradients. 4 for each weight of the
    output matrix and labelled token.
    """
    per_token = 4 * layer_weights(shape) + 6 * lora_weights(shape, rank)
    total = 0
    for sequence in sequences:
        length = len(sequence.tokens)
        total += per_token * length
        total += 3 * attention_pair(shape) * pairs(0, length)
        total += 4 * output_weights(shape) * sum(sequence.loss_mask)
    return total


def pairs(first: int, end: int) -> int:
    """Pairs of a query and a key under causal attention, for the queries at positions `first` to `end` - 1."""
    return (end * (end + 1) - first * (first + 1)) // 2


def unshared_spans(prompts: Iterable[Tokens]) -> list[tuple[int, int]]:
    """The spans (first, end) of positions that have to be computed when a common beginning is computed only once.

    Sorted prompts share most with their neighbour, so one pass counts each node of their prefix tree once.
    """
    spans: list[tuple[int, int]] = []
    previous: tuple[int, ...] = ()
    for prompt in sorted(map(tuple, prompts)):
        shared = next(
            (place for place, (one, other) in enumerate(zip(previous, prompt, strict=False)) if one != other),
            min(len(previous), len(prompt)),
        )
        spans.append((shared, len(prompt)))
        previous = prompt
    return spans


def generation_flops(shape: ModelShape, rank: int, prompts: Sequence[Tokens], generated: Sequence[int]) -> int:
    """Operations to answer `prompts`, all with the same adapter; `generated` is the number of tokens of each answer.

    Per computed token 2 for each weight of the layers and of the adapter, attention to all tokens before it, and 2 for
    each weight of the output matrix per generated token. The last token of an answer is not read again.
    """
    spans = [*unshared_spans(prompts)]
    spans += [(len(prompt), len(prompt) + count - 1) for prompt, count in zip(prompts, generated, strict=True) if count]
    per_token = 2 * (layer_weights(shape) + lora_weights(shape, rank))
    computed = sum(end - first for first, end in spans)
    attended = sum(pairs(first, end) for first, end in spans)
    return (
        per_token * computed + attention_pair(shape) * attended + 2 * output_weights(shape) * sum(map(int, generated))
    )
