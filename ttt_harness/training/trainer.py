"""The LoRA loop: fits one adapter after the other on a base model that is loaded once.

A fit does what torchtune's `lora_finetune_single_device` recipe does (AdamW, cosine schedule with warm-up, mean
cross-entropy over the labelled tokens of a batch), with logits for the labelled positions only, and batches cut into
micro-batches that add up to the same gradient.
"""

import ctypes
import functools
import gc
import logging
import math
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ttt_harness.data.sequences import TrainingSequence
from ttt_harness.errors import DivergedError, ModelError
from ttt_harness.training.checkpoint import load_base_model
from ttt_harness.training.families import FAMILIES
from ttt_harness.training.layers.compiled import compile_layers, compiling
from ttt_harness.training.shape import FAST, ModelShape
from ttt_harness.training.tune import (
    LoRALinear,
    TransformerDecoder,
    TransformerSelfAttentionLayer,
    get_adapter_params,
    get_cosine_schedule_with_warmup,
)

if TYPE_CHECKING:
    from ttt_harness.training.general import GeneralDecoder

# torchtune's value for LoRA fine-tuning, which the published fits use.
WEIGHT_DECAY = 0.01
# Activations may take as much memory as the base weights, and this much (bytes) in any case.
ACTIVATION_BYTES = 528 * 2**20
# What a process takes of a GPU beside torch's tensors, bytes: CUDA's context, and the kernels.
CUDA_CONTEXT = 3 * 2**28
# So many logits at a time, in float32: 64 MiB, and as much again for their gradient and their exponentials.
LOGITS = 2**24

_log = logging.getLogger(__name__)

OnStep = Callable[[int, int, float], None]
OnEpoch = Callable[[int, Mapping[str, Tensor]], None]
T = TypeVar("T")


@dataclass(frozen=True)
class FitResult:
    """A fitted adapter and how it came about.

    tune_state_dict: torchtune name -> tensor, a copy on the trainer's device. shape: of the base model. losses: one for
    each step. tokens: how many were seen. seconds: wall-clock.
    """

    tune_state_dict: dict[str, Tensor]
    shape: ModelShape
    losses: list[float]
    tokens: int
    seconds: float

    def peft_state_dict(self) -> dict[str, Tensor]:
        """PEFT name -> tensor on the CPU.

        Copies from a GPU run on a stream of their own: another thread can call this while the next adapter is fitted.
        """
        with _own_stream():
            moved = {name: tensor.to("cpu") for name, tensor in self.tune_state_dict.items()}
        if self.shape.way == "general":
            from ttt_harness.training import general

            return general.to_peft(moved)
        return FAMILIES[self.shape.architecture].to_peft(moved, self.shape)


@dataclass(frozen=True)
class LogProbabilities:
    """Natural log-probabilities of some tokens, each shape [tokens]: with an adapter, and from the base model alone."""

    adapter: tuple[float, ...]
    base: tuple[float, ...]


@dataclass(frozen=True)
class Predictions:
    """What the model says of some tokens, each shape [tokens], after those before each.

    log_probabilities: of the tokens, natural.
    likeliest: the token that greedy decoding would put in the place of each.
    """

    log_probabilities: tuple[float, ...]
    likeliest: tuple[int, ...]


class Trainer:
    """A base model with LoRA layers, which `fit` trains from scratch each time it is called."""

    def __init__(
        self,
        model_dir: Path,
        shape: ModelShape,
        *,
        rank: int,
        alpha: float,
        dropout: float,
        dtype: torch.dtype,
        device: str,
        context: int | None = None,
        activation_bytes: int | None = None,
        memory_bytes: int | None = None,
    ) -> None:
        """Load the model.

        Args:
            context: tokens that the engine's sequences may have (`max_model_len`); None for the model's own number.
            activation_bytes: what autograd may keep at a time; None takes a share of the weights.
            memory_bytes: what all of the trainer may take of a GPU that others use too; None for no limit.
        """
        self.shape = shape
        self.device = device
        self.dtype = dtype
        if device != "cpu":
            _keep_to_share(memory_bytes)
        self.model, self.adapter = _load(
            model_dir, shape, context, rank=rank, alpha=alpha, dropout=dropout, dtype=dtype, device=device
        )
        on_gpu = device != "cpu"
        if activation_bytes is None:
            activation_bytes = sum(p.numel() * p.element_size() for p in self.model.parameters() if not p.requires_grad)
            activation_bytes += ACTIVATION_BYTES
        self.max_tokens = max(1, activation_bytes // shape.activation_bytes_per_token(dtype, on_gpu=on_gpu))

    def fit(
        self,
        sequences: Sequence[TrainingSequence],
        *,
        batch_size: int,
        epochs: int,
        lr: float,
        warmup_ratio: float,
        seed: int,
        on_step: OnStep | None = None,
        on_epoch: OnEpoch | None = None,
    ) -> FitResult:
        """Fit an adapter on `sequences`; the same arguments on the same machine give the same adapter.

        On a GPU that is so but for rounding: there attention's gradient is summed in any order.

        Args:
            sequences: what to train on; each is seen once an epoch, in an order drawn with `seed`.
            batch_size: sequences to an optimiser step.
            epochs: passes over the sequences; 0 leaves the adapter without effect.
            lr: peak learning rate.
            warmup_ratio: the learning rate rises from 0 over the first floor(warmup_ratio * steps) steps.
            seed: of LoRA's initial weights, the dropout and the order of the sequences.
            on_step: called after each step with (steps done, steps in all, loss).
            on_epoch: called after each epoch with (epochs done, the adapter as it is then), which it has to copy.

        Raises:
            DivergedError: a loss or a weight is not finite.
            ModelError: a sequence does not fit in memory, or the model has no embedding for one of its tokens.
        """
        for sequence in sequences:
            self.shape.check_tokens(sequence.tokens, what="a training sequence")
        start = time.perf_counter()
        with torch.random.fork_rng(devices=[self.device] if self.device != "cpu" else []), compiling():
            torch.manual_seed(seed)
            self._reset()
            batches = list(_batches(sequences, batch_size=batch_size, epochs=epochs, seed=seed))
            optimizer = torch.optim.AdamW(self.adapter.values(), lr=lr, weight_decay=WEIGHT_DECAY, fused=True)
            schedule = get_cosine_schedule_with_warmup(
                optimizer, num_warmup_steps=math.floor(warmup_ratio * len(batches)), num_training_steps=len(batches)
            )

            def steps() -> Iterator[Tensor]:
                for done, batch in enumerate(batches, 1):
                    yield self._backward_within_memory(batch)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                    schedule.step()
                    if on_epoch and done * epochs % len(batches) == 0:
                        on_epoch(done * epochs // len(batches), self.adapter)

            losses: list[float] = []
            # The next step is queued on a GPU before this one's loss is read, so that the GPU never waits.
            for loss in delayed(steps(), lag=0 if self.device == "cpu" else 1):
                losses.append(loss.item())
                if not math.isfinite(losses[-1]):
                    raise self._diverged(
                        f"the loss of step {len(losses)} of {len(batches)} is {losses[-1]}", losses, lr
                    )
                if on_step:
                    on_step(len(losses), len(batches), losses[-1])
        if not all_finite(self.adapter.values()):
            raise self._diverged(f"a weight is not finite after step {len(losses)} of {len(batches)}", losses, lr)
        return FitResult(
            tune_state_dict={name: parameter.detach().clone() for name, parameter in self.adapter.items()},
            shape=self.shape,
            losses=losses,
            tokens=epochs * sum(len(sequence.tokens) for sequence in sequences),
            seconds=time.perf_counter() - start,
        )

    def log_probabilities(self, sequence: TrainingSequence, tune_state_dict: Mapping[str, Tensor]) -> LogProbabilities:
        """The log-probabilities of the tokens in the sequence's loss mask, in order, without dropout.

        Call it between fits, from the thread that fits: it puts the adapter into the layers that `fit` trains.

        Args:
            sequence: one that the adapter was trained on, or any other.
            tune_state_dict: the adapter, as `FitResult.tune_state_dict` has it.
        """
        adapter, base = (self.predict([sequence], state)[0] for state in (tune_state_dict, None))
        return LogProbabilities(adapter.log_probabilities, base.log_probabilities)

    def predict(
        self, sequences: Sequence[TrainingSequence], tune_state_dict: Mapping[str, Tensor] | None
    ) -> list[Predictions]:
        """What the model says of the tokens in the loss mask of each sequence, in order, without dropout.

        Call it as `log_probabilities`.

        Args:
            sequences: any; those of one call run one after the other.
            tune_state_dict: the adapter, as `FitResult.tune_state_dict` has it; None for the base model.
        """
        # Compiled layers run as plain Python here: other functions would have to be compiled for two passes.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            self.model.eval()
            try:
                for name, parameter in self.adapter.items():
                    if tune_state_dict is not None:
                        parameter.copy_(tune_state_dict[name])
                    elif name.endswith("lora_b.weight"):
                        parameter.zero_()
                return [self._predictions(sequence) for sequence in sequences]
            finally:
                self.model.train()

    def _predictions(self, sequence: TrainingSequence) -> Predictions:
        tokens, loss_mask = _pad([sequence])
        states = target_states(self.model, tokens.to(self.device), loss_mask)
        found, likeliest = [], []
        for some, wanted in self._in_parts(states, tokens[loss_mask].to(self.device)):
            logits = self.model.output(some).float()
            found.append(-functional.cross_entropy(logits, wanted, reduction="none"))
            likeliest.append(logits.argmax(-1))
        return Predictions(tuple(torch.cat(found).tolist()), tuple(torch.cat(likeliest).tolist()))

    def _in_parts(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """`tensors`, [positions, ...], cut into as many positions as logits may be held for at a time."""
        positions = max(1, LOGITS // self.shape.vocab_size)
        return zip(*(tensor.split(positions) for tensor in tensors), strict=True)

    def _diverged(self, what: str, losses: Sequence[float], lr: float) -> DivergedError:
        """The error of a fit that has produced infinities or NaN; `what` says where they showed."""
        dtype = str(self.dtype).removeprefix("torch.")
        if self.dtype == torch.float16:
            remedy = (
                "float16 overflows above 65504 and loses gradients below 6e-8: use dtype=bfloat16, or dtype=float32 "
                "where the hardware has no bfloat16"
            )
        elif not math.isfinite(losses[0]):
            remedy = "that was before any update, so the base model itself is at fault: check its weights"
        else:
            remedy = "use a smaller lr, or a larger warmup_ratio"
        return DivergedError(f"the fit diverged: {what} (lr={lr:g}, dtype={dtype}); {remedy}.")

    def _reset(self) -> None:
        """Forget the last adapter: LoRA's initial weights, under which the model is the base model."""
        self.model.train()
        for module in self.model.modules():
            if isinstance(module, LoRALinear):
                module.initialize_parameters()
        for parameter in self.adapter.values():
            parameter.grad = None  # a fit that failed between two steps has left some

    def _backward_within_memory(self, batch: Sequence[TrainingSequence]) -> Tensor:
        """As `_backward`; where the memory does not suffice, again with micro-batches half as large.

        Raises:
            ModelError: a single sequence does not fit, although its layers are recomputed.
        """
        while True:
            try:
                return self._backward(batch)
            except torch.OutOfMemoryError:
                longest = max(len(sequence.tokens) for sequence in batch)
                if self.max_tokens < longest:
                    raise ModelError(
                        f"a training sequence of {longest} tokens does not fit in the GPU's memory; use a smaller k, "
                        "or a GPU with more memory."
                    ) from None
            for parameter in self.adapter.values():
                parameter.grad = None  # what the part of the batch before it has left
            self.max_tokens //= 2
            torch.cuda.empty_cache()
            _log.warning("The GPU's memory is full; fitting goes on with %d tokens at a time.", self.max_tokens)

    def _backward(self, batch: Sequence[TrainingSequence]) -> Tensor:
        """Add up the gradient of the batch's mean loss, micro-batch by micro-batch, and return that loss."""
        labels = sum(sum(sequence.loss_mask) for sequence in batch)
        total = torch.zeros((), device=self.device)
        for part in _micro_batches(batch, self.max_tokens):
            tokens, loss_mask = _pad(part)
            targets = tokens[loss_mask].to(self.device)
            recompute = tokens.numel() > self.max_tokens
            states = target_states(self.model, tokens.to(self.device), loss_mask, recompute=recompute)
            total += self._backward_through_logits(states, targets, labels)
        return total

    def _backward_through_logits(self, states: Tensor, targets: Tensor, labels: int) -> Tensor:
        """Backward from the cross-entropy of `targets`, summed and divided by `labels`; returns that loss.

        The logits of some positions at a time: of a large vocabulary, those of all would take more memory than the
        layers.
        """
        loss = torch.zeros((), device=states.device)
        gradient = torch.empty_like(states)
        for some, gradient_of_some, wanted in self._in_parts(states.detach(), gradient, targets):
            some.requires_grad_()
            part = functional.cross_entropy(self.model.output(some).float(), wanted, reduction="sum") / labels
            (of_some,) = torch.autograd.grad(part, some)
            gradient_of_some.copy_(of_some)
            loss += part.detach()
        states.backward(gradient)
        return loss


def _load(
    model_dir: Path, shape: ModelShape, context: int | None, *, device: str, **settings: Any
) -> tuple[Any, dict[str, nn.Parameter]]:
    """The base model with LoRA layers, ready to be fitted, and the LoRA weights by the trainer's names."""
    if shape.way == "general":
        from ttt_harness.training.general import load_general_model  # imports transformers' models

        if device != "cpu":
            _log.info("%s is fitted the general way: its layers are not compiled.", shape.architecture)
        context = context or shape.context_length
        general = load_general_model(model_dir, context=context, device=device, **settings)
        return general, general.adapter
    model = load_base_model(model_dir, shape, device=device, **settings)
    if device != "cpu" and FAST[shape.architecture].compiled:
        compile_layers(model)
    return model, get_adapter_params(model)


_shared: tuple[tuple[Any, ...], Trainer] | None = None
_shared_lock = threading.Lock()


def shared_trainer(model_dir: Path, shape: ModelShape, **settings: Any) -> Trainer:
    """This process's trainer: the last one, if it has these arguments, else a new one in its place.

    A second thread that asks while the first one loads waits for that, so a trainer can be loaded ahead of its use.
    """
    global _shared
    asked = (model_dir, shape, settings)
    with _shared_lock:
        if _shared is None or _shared[0] != asked:
            _shared = None  # so that two models are never in memory
            _shared = asked, Trainer(model_dir, shape, **settings)
        return _shared[1]


def release_trainer() -> None:
    """Drop this process's trainer and the memory that it holds."""
    global _shared
    with _shared_lock:
        _shared = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0)


def _keep_to_share(memory_bytes: int | None) -> None:
    """Have torch keep at most `memory_bytes` of the GPU.

    At the limit it gives back what it keeps, before it says that memory is full. That it keeps little more than tensors
    need is set in the environment (`PYTORCH_ALLOC_CONF`, see `ttt_harness.serving.environment`).
    """
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    share = (memory_bytes - CUDA_CONTEXT) / total if memory_bytes else 1.0
    torch.cuda.set_per_process_memory_fraction(min(1.0, share))


@contextmanager
def _own_stream() -> Iterator[None]:
    """Run what this thread gives a GPU on a stream of its own, after everything that the GPU was given before."""
    if not torch.cuda.is_available():
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield


def target_states(
    model: "TransformerDecoder | GeneralDecoder", tokens: Tensor, loss_mask: Tensor, *, recompute: bool = False
) -> Tensor:
    """The last hidden states, normalized, of the positions from which `model.output` predicts the targets of the loss.

    Args:
        model: a decoder of either way.
        tokens: [batch, tokens], padded on the right; under causal attention padding changes nothing before it.
        loss_mask: [batch, tokens], True where the token is a target; False at the first token. It lies on the CPU, so
            that reading the positions does not wait for a GPU.
        recompute: keep only what lies between the layers, and compute the rest again for the gradient: a third more
            time, a fraction of the memory.

    Returns:
        [targets, width], in the order of `tokens[loss_mask]`.
    """
    rows, columns = loss_mask[:, 1:].nonzero(as_tuple=True)
    at = (rows * tokens.shape[1] + columns).to(tokens.device)
    if not isinstance(model, TransformerDecoder):
        return model.states(tokens, recompute=recompute).flatten(0, 1)[at]
    *layers, last = model.layers
    hidden = model.tok_embeddings(tokens)
    for layer in layers:
        hidden = _recomputed(layer, hidden) if recompute else layer(hidden)
    last_at = functools.partial(_layer_at, last)
    hidden = _recomputed(last_at, hidden, at) if recompute else last_at(hidden, at)
    return model.norm(hidden)


def _layer_at(layer: TransformerSelfAttentionLayer, hidden: Tensor, at: Tensor) -> Tensor:
    """What a layer makes of `hidden`, shape [batch, tokens, width], at the positions `at` of the flattened batch.

    All positions are attended to, but the MLP sees no others: after the last layer nobody asks for them.
    """
    normed = layer.sa_norm(hidden)
    attended = layer.attn(normed, normed).flatten(0, 1)[at]
    hidden = hidden.flatten(0, 1)[at] + layer.sa_scale(attended)
    return hidden + layer.mlp_scale(layer.mlp(layer.mlp_norm(hidden)))


def _recomputed(layer: Callable[..., Tensor], hidden: Tensor, *args: Tensor) -> Tensor:
    """Apply a layer of which nothing is kept for the gradient but what it is given."""
    return checkpoint(_in_returned_memory, layer, hidden, *args, use_reentrant=False)


def _in_returned_memory(layer: Callable[..., Tensor], hidden: Tensor, *args: Tensor) -> Tensor:
    """Apply a layer after freed memory has gone back to the system, the first time and when it is computed again.

    malloc keeps what was freed between the states that stay: a quarter of the memory that a long sequence takes.
    """
    if _malloc_trim is not None and hidden.device.type == "cpu":
        _malloc_trim(0)
    return layer(hidden, *args)


# glibc's alone; elsewhere there is nothing to call.
_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None


def delayed(items: Iterable[T], *, lag: int) -> Iterator[T]:
    """Yield `items` in order, each one after `lag` more of them have been made, or after the last one."""
    waiting: deque[T] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > lag:
            yield waiting.popleft()
    yield from waiting


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no element is infinite or NaN; waits for a GPU once, for all tensors together."""
    # The largest magnitude of a tensor is NaN where one element is.
    largest = [tensor.detach().abs().amax().float() for tensor in tensors]
    return not largest or bool(torch.stack(largest).isfinite().all())


def _batches(
    sequences: Sequence[TrainingSequence], *, batch_size: int, epochs: int, seed: int
) -> Iterator[list[TrainingSequence]]:
    rng = random.Random(seed)
    for _ in range(epochs):
        order = rng.sample(range(len(sequences)), len(sequences))
        for start in range(0, len(order), batch_size):
            yield [sequences[index] for index in order[start : start + batch_size]]


def _micro_batches(batch: Sequence[TrainingSequence], max_tokens: int) -> Iterator[Sequence[TrainingSequence]]:
    """Cut a batch into equal parts, as few as have at most `max_tokens` padded tokens each, or one sequence."""
    longest = max(len(sequence.tokens) for sequence in batch)
    parts = math.ceil(len(batch) / max(1, max_tokens // longest))
    for part in range(parts):
        yield batch[part * len(batch) // parts : (part + 1) * len(batch) // parts]


def _pad(part: Sequence[TrainingSequence]) -> tuple[Tensor, Tensor]:
    """Token ids and loss mask, [sequences, longest], on the CPU; padding on the right is token 0, without loss."""
    longest = max(len(sequence.tokens) for sequence in part)
    tokens = torch.zeros((len(part), longest), dtype=torch.long)
    loss_mask = torch.zeros((len(part), longest), dtype=torch.bool)
    for row, sequence in enumerate(part):
        tokens[row, : len(sequence.tokens)] = torch.tensor(sequence.tokens)
        loss_mask[row, : len(sequence.tokens)] = torch.tensor(sequence.loss_mask)
    return tokens, loss_mask
