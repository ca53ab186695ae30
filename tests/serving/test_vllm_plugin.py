"""What vLLM calls in its processes is found by its entry point, and has an engine of ours use our code.

They ask vLLM which code it uses, so that they fail with a vLLM that asks elsewhere.
"""

from importlib.metadata import entry_points

import pytest
import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.lora.punica_wrapper.punica_selector import get_punica_wrapper
from vllm.platforms import current_platform

from ttt_harness import patches
from ttt_harness.serving import vllm_plugin
from ttt_harness.serving.cpu_lora import GroupedPunicaWrapper
from ttt_harness.serving.environment import ENGINE_VARIABLE

on_a_cpu = pytest.mark.skipif(not current_platform.is_cpu(), reason="the kernels are for CPUs")


@pytest.fixture
def platform(monkeypatch):
    """vLLM's platform for CPUs, as it is before our plug-in runs."""
    from vllm.platforms.cpu import CpuPlatform

    qualname = "vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU"
    monkeypatch.setattr(CpuPlatform, "get_punica_wrapper", classmethod(lambda cls: qualname))  # noqa: ARG005
    return CpuPlatform


def wrapper() -> object:
    return get_punica_wrapper(8, max_batches=2, device=torch.device("cpu"))


def test_the_entry_point_is_ours():
    (found,) = (point for point in entry_points(group="vllm.general_plugins") if point.name == "ttt_harness")
    assert found.load() is vllm_plugin.register


@on_a_cpu
@pytest.mark.usefixtures("platform")
def test_vllm_applies_adapters_with_the_grouped_kernels(monkeypatch, caplog):
    monkeypatch.setenv(ENGINE_VARIABLE, "1")
    vllm_plugin.register()
    vllm_plugin.register()
    assert type(wrapper()) is GroupedPunicaWrapper
    assert not [record for record in caplog.records if record.name.startswith("ttt_harness")]


@on_a_cpu
@pytest.mark.usefixtures("platform")
def test_an_engine_of_somebody_else_stays_as_it_is(monkeypatch):
    monkeypatch.delenv(ENGINE_VARIABLE, raising=False)
    vllm_plugin.register()
    assert type(wrapper()) is PunicaWrapperCPU


@on_a_cpu
def test_a_vllm_that_has_moved_the_hook_works_on_with_a_warning(platform, monkeypatch, caplog):
    monkeypatch.setenv(ENGINE_VARIABLE, "1")
    monkeypatch.delattr(platform, "get_punica_wrapper")
    monkeypatch.delattr(platform.__mro__[1], "get_punica_wrapper")
    vllm_plugin.register()
    (record,) = (record for record in caplog.records if record.name.startswith("ttt_harness"))
    assert "vllm: LoRA on a CPU" in record.message
    assert "get_punica_wrapper" in record.message


@pytest.mark.skipif(current_platform.is_cpu(), reason="a CPU has no pinned memory")
def test_a_gpu_gets_adapters_from_ordinary_memory(monkeypatch):
    from vllm.lora import lora_model, model_manager

    monkeypatch.setenv(ENGINE_VARIABLE, "1")
    vllm_plugin.register()
    assert not lora_model.PIN_MEMORY
    assert not model_manager.PIN_MEMORY


@pytest.mark.parametrize("name", [name for name in patches.PATCHES if name.startswith("vllm")])
def test_the_targets_are_there(name):
    patches.find(name)
