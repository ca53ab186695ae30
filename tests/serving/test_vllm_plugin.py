"""What vLLM calls in its processes is found by its entry point, and puts our code in the place of vLLM's."""

from importlib.metadata import entry_points

import pytest
from vllm.platforms import current_platform

from ttt_harness.serving import cpu_lora, vllm_plugin


def test_the_entry_point_is_ours():
    (found,) = (point for point in entry_points(group="vllm.general_plugins") if point.name == "ttt_harness")
    assert found.load() is vllm_plugin.register


@pytest.mark.skipif(not current_platform.is_cpu(), reason="the kernels are for CPUs")
def test_a_cpu_gets_the_grouped_kernels():
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    vllm_plugin.register()
    assert lora_ops.bgmv_expand is punica_cpu.bgmv_expand is cpu_lora.bgmv_expand


@pytest.mark.skipif(current_platform.is_cpu(), reason="a CPU has no pinned memory")
def test_a_gpu_gets_adapters_from_ordinary_memory():
    from vllm.lora import lora_model, model_manager

    vllm_plugin.register()
    assert not lora_model.PIN_MEMORY
    assert not model_manager.PIN_MEMORY
