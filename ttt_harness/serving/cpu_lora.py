"""LoRA on vLLM's CPU backend: the tokens of a batch are grouped by adapter.

vLLM's fallback gathers one copy of an adapter's matrix for every token before it multiplies, and does so even for
tokens without an adapter. `GroupedPunicaWrapper` sorts the tokens by adapter instead and runs one matmul for each.
vLLM asks its platform for the class that applies adapters; `ttt_harness.serving.vllm_plugin` has it answer with this
one.

The LoRA update is y += scale * (x A^T) B^T, as in Hu et al., arXiv 2106.09685. In the kernels' arguments an index of
-1 marks a token without an adapter; its output stays as it is (expand) or becomes zero (shrink).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU


def _groups(indices: torch.Tensor) -> Iterator[tuple[int, torch.Tensor | slice]]:
    """Yield (adapter, its tokens) for each adapter in `indices`, shape [tokens]; a slice where all share one."""
    if not len(indices):
        return
    # The usual case is told without sorting: a forward pass asks some 400 times.
    adapters = [int(indices[0])] if bool((indices == indices[0]).all()) else indices.unique().tolist()
    for adapter in adapters:
        if adapter >= 0:
            yield adapter, slice(None) if len(adapters) == 1 else (indices == adapter).nonzero().squeeze(1)


def shrink(
    inputs: torch.Tensor,
    weights: torch.Tensor,
    output: torch.Tensor,
    indices: torch.Tensor,
    scaling: float = 1.0,
) -> None:
    """output[t, :r] = scaling * inputs[t] @ A[index[t]]^T.

    Args:
        inputs: [tokens, in].
        weights: the stacked A matrices, [adapters, 1, r, in] or [adapters, r, in].
        output: [tokens, >= r], written in place.
        indices: [tokens], -1 for no adapter.
        scaling: factor on the product.
    """
    weights = weights.flatten(0, -3)
    rank = weights.shape[-2]
    tokens = output.shape[0]
    groups = list(_groups(indices[:tokens]))
    if not (groups and isinstance(groups[0][1], slice)):
        output[:, :rank] = 0
    for adapter, rows in groups:
        product = torch.nn.functional.linear(inputs[rows].to(weights.dtype), weights[adapter])
        output[rows, :rank] = (product if scaling == 1 else product.mul_(scaling)).to(output.dtype)


def expand_slice(
    inputs: torch.Tensor,
    weights: torch.Tensor,
    output: torch.Tensor,
    indices: torch.Tensor,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = True,
) -> None:
    """output[t, offset:offset+size] (+)= inputs[t] @ B[index[t]]^T.

    Args:
        inputs: [tokens, r].
        weights: the stacked B matrices, [adapters, 1, out, r] or [adapters, out, r], out >= size.
        output: [tokens, width], written in place.
        indices: [tokens], -1 for no adapter.
        slice_offset: first column to write.
        slice_size: number of columns.
        add_inputs: add to what is there, rather than replace it.
    """
    weights = weights.flatten(0, -3)
    columns = slice(slice_offset, slice_offset + slice_size)
    for adapter, rows in _groups(indices[: output.shape[0]]):
        matrix = weights[adapter, :slice_size]
        if add_inputs and isinstance(rows, slice) and output.dtype == weights.dtype:
            output[:, columns].addmm_(inputs.to(weights.dtype), matrix.T)
            continue
        product = torch.nn.functional.linear(inputs[rows].to(weights.dtype), matrix)
        product = product.to(output.dtype)
        if add_inputs:
            output[rows, columns] += product
        else:
            output[rows, columns] = product


class GroupedPunicaWrapper(PunicaWrapperCPU):
    """vLLM's class that applies adapters on a CPU, with the kernels above for prefill and decode alike."""

    def add_shrink(
        self,
        y: Sequence[torch.Tensor] | torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: Sequence[torch.Tensor],
        scale: float,
        **_: Any,
    ) -> None:
        """y[i][t, :r] = scale * x[t] @ A_i[adapter of t]^T for each of the matrices that share an input.

        Args:
            y: one output for each matrix, [tokens, r]; written in place.
            x: [tokens, in].
            lora_a_stacked: for each matrix the adapters' A, [adapters, 1, r, in].
            scale: factor on the product.
        """
        x = x.view(-1, x.shape[-1])
        for output, weights in zip(y, lora_a_stacked, strict=True):
            shrink(x, weights, output.view(-1, output.shape[-1]), self.token_lora_indices, scale)

    def add_expand(
        self,
        y: torch.Tensor,
        x: Sequence[torch.Tensor] | torch.Tensor,
        lora_b_stacked: Sequence[torch.Tensor],
        output_slices: Sequence[int],
        offset_start: int = 0,
        add_inputs: bool = True,
        **_: Any,
    ) -> None:
        """y[t, columns of i] (+)= x[i][t] @ B_i[adapter of t]^T for each of the matrices that share an output.

        Args:
            y: [tokens, width], written in place.
            x: one input for each matrix, [tokens, r].
            lora_b_stacked: for each matrix the adapters' B, [adapters, 1, out, r].
            output_slices: the width of each matrix's output.
            offset_start: the first column.
            add_inputs: add to what is there, rather than replace it.
        """
        y = y.view(-1, y.shape[-1])
        for inputs, weights, width in zip(x, lora_b_stacked, output_slices, strict=True):
            expand_slice(inputs, weights, y, self.token_lora_indices, offset_start, width, add_inputs)
            offset_start += width

    def add_lora_embedding(
        self, y: torch.Tensor, x: torch.Tensor, lora_b_stacked: torch.Tensor, add_inputs: bool = True, **_: Any
    ) -> None:
        """y[t] (+)= x[t] @ B[adapter of t]^T; for embeddings, where A is looked up.

        Args:
            y: [tokens, out], written in place.
            x: [tokens, r].
            lora_b_stacked: the adapters' B, [adapters, 1, out, r].
            add_inputs: add to what is there, rather than replace it.
        """
        expand_slice(x, lora_b_stacked, y, self.token_lora_indices, 0, _common_width(lora_b_stacked, y), add_inputs)

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        *,
        buffer: torch.Tensor | None = None,
        **_: Any,
    ) -> None:
        """y[t] += scale * (x[t] @ A[adapter of t]^T) @ B[adapter of t]^T, for the tokens that are sampled after.

        Args:
            y: logits, [tokens, vocabulary], written in place.
            x: last hidden states, [tokens, in].
            lora_a_stacked, lora_b_stacked: the adapters' matrices.
            scale: factor on the update.
            buffer: [tokens, r], for what lies between the matrices; float32 by default, as in vLLM's own.
        """
        y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        if buffer is None:
            buffer = torch.zeros((x.shape[0], lora_b_stacked.shape[-1]), dtype=torch.float32, device=x.device)
        indices = self.sampler_indices
        shrink(x, lora_a_stacked, buffer, indices, scale)
        # The adapter and the model may pad the vocabulary by different amounts.
        expand_slice(buffer, lora_b_stacked, y, indices, 0, _common_width(lora_b_stacked, y), True)


def _common_width(weights: torch.Tensor, output: torch.Tensor) -> int:
    return min(weights.shape[-2], output.shape[-1])
