"""Grouped LoRA kernels for vLLM's CPU backend, as a vLLM plugin (entry point `vllm.general_plugins`).

vLLM's fallback gathers one copy of an adapter's matrix for every token before it multiplies, and does so even for
tokens without an adapter. The three kernels here sort the tokens by adapter instead and run one matmul for each.
vLLM calls `register` in every process it starts, on every platform; on anything but a CPU it does nothing.

The LoRA update is y += scale * (x A^T) B^T, as in Hu et al., arXiv 2106.09685. In the kernels' arguments an index of
-1 marks a token without an adapter; its output stays as it is (expand) or becomes zero (shrink).
"""

from collections.abc import Iterator

import torch


def _groups(indices: torch.Tensor) -> Iterator[tuple[int, torch.Tensor | slice]]:
    """Yield (adapter, its tokens) for each adapter in `indices`, shape [tokens]; a slice where all share one."""
    if not len(indices):
        return
    # The usual case is told without sorting: a forward pass asks some 400 times.
    adapters = [int(indices[0])] if bool((indices == indices[0]).all()) else indices.unique().tolist()
    for adapter in adapters:
        if adapter >= 0:
            yield adapter, slice(None) if len(adapters) == 1 else (indices == adapter).nonzero().squeeze(1)


def bgmv_shrink(
    inputs: torch.Tensor,
    lora_b_weights: torch.Tensor,
    output_tensor: torch.Tensor,
    lora_indices_tensor: torch.Tensor,
    scaling: float = 1.0,
) -> None:
    """output[t, :r] = scaling * inputs[t] @ A[index[t]]^T.

    Args:
        inputs: [tokens, in].
        lora_b_weights: the stacked A matrices (vLLM's name), [adapters, 1, r, in] or [adapters, r, in].
        output_tensor: [tokens, >= r], written in place.
        lora_indices_tensor: [tokens], -1 for no adapter.
        scaling: factor on the product.
    """
    weights = lora_b_weights.flatten(0, -3)
    rank = weights.shape[-2]
    tokens = output_tensor.shape[0]
    groups = list(_groups(lora_indices_tensor[:tokens]))
    if not (groups and isinstance(groups[0][1], slice)):
        output_tensor[:, :rank] = 0
    for adapter, rows in groups:
        product = torch.nn.functional.linear(inputs[rows].to(weights.dtype), weights[adapter])
        output_tensor[rows, :rank] = (product if scaling == 1 else product.mul_(scaling)).to(output_tensor.dtype)


def bgmv_expand(
    inputs: torch.Tensor,
    lora_b_weights: torch.Tensor,
    output_tensor: torch.Tensor,
    lora_indices_tensor: torch.Tensor,
    add_inputs: bool = True,
) -> None:
    """output[t, :out] (+)= inputs[t] @ B[index[t]]^T; see `bgmv_expand_slice`, of which this is the whole width."""
    width = min(lora_b_weights.shape[-2], output_tensor.shape[1])
    bgmv_expand_slice(inputs, lora_b_weights, output_tensor, lora_indices_tensor, 0, width, add_inputs)


def bgmv_expand_slice(
    inputs: torch.Tensor,
    lora_b_weights: torch.Tensor,
    output_tensor: torch.Tensor,
    lora_indices_tensor: torch.Tensor,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = True,
) -> None:
    """output[t, offset:offset+size] (+)= inputs[t] @ B[index[t]]^T.

    Args:
        inputs: [tokens, r].
        lora_b_weights: the stacked B matrices, [adapters, 1, out, r] or [adapters, out, r], out >= size.
        output_tensor: [tokens, width], written in place.
        lora_indices_tensor: [tokens], -1 for no adapter.
        slice_offset: first column to write.
        slice_size: number of columns.
        add_inputs: add to what is there, rather than replace it.
    """
    weights = lora_b_weights.flatten(0, -3)
    columns = slice(slice_offset, slice_offset + slice_size)
    for adapter, rows in _groups(lora_indices_tensor[: output_tensor.shape[0]]):
        matrix = weights[adapter, :slice_size]
        if add_inputs and isinstance(rows, slice) and output_tensor.dtype == weights.dtype:
            output_tensor[:, columns].addmm_(inputs.to(weights.dtype), matrix.T)
            continue
        product = torch.nn.functional.linear(inputs[rows].to(weights.dtype), matrix)
        product = product.to(output_tensor.dtype)
        if add_inputs:
            output_tensor[rows, columns] += product
        else:
            output_tensor[rows, columns] = product


def install() -> None:
    """Put the grouped kernels in the place of vLLM's. Safe to call twice."""
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    for kernel in (bgmv_shrink, bgmv_expand, bgmv_expand_slice):
        # lora_ops' sgmv functions (prefill) call these by name; punica_cpu (decode) has imported them.
        setattr(lora_ops, kernel.__name__, kernel)
        setattr(punica_cpu, kernel.__name__, kernel)
