"""Every argument of lm-eval's `vllm` class, of its command line and of vLLM's engine works, or is refused.

The tables name them all: one that a later release adds fails the test until it stands in a table, and one that an
earlier release lacks is skipped. For each that works there is a check of how: handed on as it is, or used.
"""

import argparse
import dataclasses
import inspect
import json
import shutil
from importlib.util import find_spec

import pytest
from lm_eval._cli.run import Run
from lm_eval.models import vllm_causallms
from vllm.engine.arg_utils import EngineArgs

from ttt_harness.adapters.peft import write_adapter
from ttt_harness.config import TTTConfig
from ttt_harness.errors import ConfigError, ModelError, TTTError
from ttt_harness.run import model_arguments
from ttt_harness.run.local import stated_settings
from ttt_harness.run.model_arguments import (
    NOT_HERE,
    NOT_WITH_FITS,
    NOT_WITH_WORKERS,
    ModelArguments,
    gpu_share,
    positive_int,
)
from ttt_harness.serving import answering as answering_module
from ttt_harness.serving.answering import Answering
from ttt_harness.serving.engine import reason_of

LM_EVAL = set(inspect.signature(vllm_causallms.VLLM.__init__).parameters) - {"self", "kwargs"}
VLLM = {field.name for field in dataclasses.fields(EngineArgs)}

# Of lm-eval's class: name -> value, and what shows that it is used.
USED = {
    "dtype": ("float32", lambda _, m: m.dtype_name == "float32"),
    "trust_remote_code": (True, lambda _, m: m.model.engine_args["trust_remote_code"] is True),
    "tokenizer_mode": ("hf", lambda _, m: m.model.engine_args["tokenizer_mode"] == "hf"),
    "tokenizer_revision": ("main", lambda _, m: m.model.engine_args["tokenizer_revision"] == "main"),
    "add_bos_token": (True, lambda _, m: m.add_bos_token and m.encode("Q: 1")[0] == m.tok_encode("Q: 1")),
    "prefix_token_id": (5, lambda _, m: m.prefix_token_id == 5),
    "max_gen_toks": ("17", lambda _, m: m.max_gen_toks == 17),
    "batch_size": ("4", lambda _, m: m.batch_size == 4),
    "max_batch_size": (3, lambda _, m: m.model.engine_args["max_num_seqs"] == 3),
    "max_length": (128, lambda _, m: m.max_length == 128),
    "max_model_len": ("128", lambda _, m: m.max_length == 128),
    "seed": (7, lambda a, _: a.config.seed == 7),
    "chat_template_args": ({"date": "today"}, lambda _, m: m.chat_template_args == {"date": "today"}),
    "think_end_token": ("</think>", lambda _, m: m.think_end_token == "</think>"),
    "truncation_side": ("right", lambda a, m: m.truncation_side == "right" and a.config.truncate),
    "enable_lora": (True, lambda _, m: m.model.config.lora_config is not None),
    "max_lora_rank": (32, lambda _, m: m.model.engine_args["max_lora_rank"] == 32),
}
# Of lm-eval's class, with tests of their own below.
TESTED = {
    "pretrained": "test_pretrained_is_refused",
    "revision": "test_the_hub_is_asked_for_what_is_named",
    "tokenizer": "test_another_tokenizer_is_used",
    "quantization": "test_vllms_arguments_reach_the_engine_as_they_are",
    "tensor_parallel_size": "test_counts_of_gpus_and_workers",
    "data_parallel_size": "test_counts_of_gpus_and_workers",
    "lora_local_path": "test_an_adapter_of_the_users_is_reserved_for",
    "enable_thinking": "test_thinking_is_asked_for_in_both_places",
}
# Of lm-eval's `vllm` class through its keyword arguments, and of vLLM's engine.
OF_VLLM_USED = {
    "model": "refused",
    "device": "test_a_device_that_is_not_this_machines_is_refused",
    "swap_space": "refused",
    "hf_token": "test_the_hub_is_asked_for_what_is_named",
    "download_dir": "test_the_hub_is_asked_for_what_is_named",
    "logprobs_mode": "test_engines_without_log_probabilities_are_refused",
    "max_logprobs": "test_engines_without_log_probabilities_are_refused",
    "gpu_memory_utilization": "test_a_share_of_the_gpu_is_refused",
    "enable_sleep_mode": "handed on",
}
# vLLM's, handed on to the engine as they are; vLLM refuses values that are not allowed before anything is fitted.
HANDED_ON = [
    "enable_return_routed_experts",
    "model_weights",
    "served_model_name",
    "hf_config_path",
    "enable_prompt_embeds",
    "allowed_local_media_path",
    "allowed_media_domains",
    "safetensors_load_strategy",
    "safetensors_prefetch_num_threads",
    "safetensors_prefetch_block_size",
    "load_format",
    "config_format",
    "kv_cache_dtype",
    "cudagraph_capture_sizes",
    "max_cudagraph_capture_size",
    "ir_op_priority",
    "distributed_executor_backend",
    "pipeline_parallel_size",
    "distributed_timeout_seconds",
    "cpu_distributed_timeout_seconds",
    "numa_bind",
    "numa_bind_nodes",
    "numa_bind_cpus",
    "prefill_context_parallel_size",
    "decode_context_parallel_size",
    "dcp_comm_backend",
    "dcp_q_replicate",
    "dcp_kv_cache_interleave_size",
    "cp_kv_cache_interleave_size",
    "enable_hc_sp",
    "enable_expert_parallel",
    "enable_batch_sharded_sampling",
    "enable_ep_weight_filter",
    "moe_backend",
    "linear_backend",
    "sparse_indexer_topk_backend",
    "all2all_backend",
    "enable_elastic_ep",
    "elastic_ep_max_dp_size",
    "enable_dbo",
    "ubatch_size",
    "dbo_decode_token_threshold",
    "dp_sync_interval",
    "dbo_prefill_token_threshold",
    "disable_nccl_for_dp_synchronization",
    "eplb_config",
    "enable_eplb",
    "expert_placement_strategy",
    "max_parallel_loading_workers",
    "block_size",
    "enable_prefix_caching",
    "prefix_caching_hash_algo",
    "prefix_cache_retention_interval",
    "disable_sliding_window",
    "disable_cascade_attn",
    "offload_backend",
    "cpu_offload_gb",
    "cpu_offload_params",
    "offload_group_size",
    "offload_num_in_group",
    "offload_prefetch_step",
    "offload_params",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "max_num_batched_tokens",
    "max_num_scheduled_tokens",
    "long_prefill_token_threshold",
    "long_prefill_token_threshold_adaptive",
    "max_num_seqs",
    "max_num_active_seqs",
    "max_num_queued_reqs",
    "max_num_queued_tokens",
    "use_fp64_gumbel",
    "enable_trace_replay",
    "disable_log_stats",
    "aggregate_engine_logging",
    "code_revision",
    "hf_overrides",
    "model_class_overrides",
    "quantization_config",
    "allow_deprecated_quantization",
    "enforce_eager",
    "disable_custom_all_reduce",
    "enable_shm_tensor_arena",
    "language_model_only",
    "limit_mm_per_prompt",
    "enable_mm_embeds",
    "interleave_mm_strings",
    "media_io_kwargs",
    "mm_processor_kwargs",
    "mm_processor_cache_gb",
    "mm_processor_cache_type",
    "mm_hasher_algorithm",
    "mm_shm_cache_max_object_size_mb",
    "mm_encoder_only",
    "mm_encoder_tp_mode",
    "mm_encoder_attn_backend",
    "mm_encoder_attn_dtype",
    "mm_encoder_fp8_scale_path",
    "mm_encoder_fp8_scale_save_path",
    "mm_encoder_fp8_scale_save_margin",
    "io_processor_plugin",
    "renderer_num_workers",
    "skip_mm_profiling",
    "video_pruning_rate",
    "video_pruning_method",
    "mm_tensor_ipc",
    "mm_processor_device",
    "mm_ipc_gpu_memory_gb",
    "mm_device_do_normalize",
    "max_loras",
    "default_mm_loras",
    "fully_sharded_loras",
    "max_cpu_loras",
    "lora_dtype",
    "lora_target_modules",
    "enable_tower_connector_lora",
    "specialize_active_lora",
    "enable_mixed_moe_lora_format",
    "enable_moe_shared_loras",
    "max_lora_cls_labels",
    "ray_workers_use_nsight",
    "num_gpu_blocks_override",
    "model_loader_extra_config",
    "ignore_patterns",
    "enable_chunked_prefill",
    "disable_chunked_mm_input",
    "scheduler_reserve_full_isl",
    "prefill_schedule_interval",
    "watermark",
    "disable_hybrid_kv_cache_manager",
    "structured_outputs_config",
    "aux_output_config",
    "reasoning_parser",
    "reasoning_parser_plugin",
    "speculative_config",
    "spec_method",
    "spec_model",
    "spec_tokens",
    "watermark_config",
    "diffusion_config",
    "show_hidden_metrics_for_version",
    "otlp_traces_endpoint",
    "collect_detailed_traces",
    "per_request_spec_decode_metrics",
    "kv_cache_metrics",
    "kv_cache_metrics_sample",
    "custom_histogram_buckets",
    "cudagraph_metrics",
    "enable_layerwise_nvtx_tracing",
    "enable_mfu_metrics",
    "enable_logging_iteration_details",
    "jit_monitor_mode",
    "jit_monitor_verbose",
    "enable_mm_processor_stats",
    "scheduling_policy",
    "scheduler_cls",
    "compilation_config",
    "attention_config",
    "engram_config",
    "mamba_config",
    "kernel_config",
    "enable_flashinfer_autotune",
    "worker_cls",
    "worker_extension_cls",
    "profiler_config",
    "logging_config",
    "log_level",
    "log_config_file",
    "kv_transfer_config",
    "kv_events_config",
    "ec_transfer_config",
    "ec_manager_config",
    "reasoning_config",
    "generation_config",
    "enable_sleep_mode",
    "sleep_mode_offload_cudagraph",
    "sleep_preserve_parameter_names",
    "enable_cumem_allocator",
    "enable_nccl_comm_suspend",
    "model_impl",
    "attention_backend",
    "kv_cache_dtype_skip_layers",
    "mamba_cache_dtype",
    "mamba_ssm_cache_dtype",
    "mamba_block_size",
    "prefix_match_unit",
    "mamba_cache_mode",
    "enable_mamba_shared_prefix_checkpoint",
    "replayssm_buffer_len",
    "use_replayssm",
    "mamba_backend",
    "mamba_ssu_algorithm",
    "enable_mamba_cache_stochastic_rounding",
    "mamba_cache_philox_rounds",
    "additional_config",
    "use_tqdm_on_load",
    "pt_load_map_location",
    "logits_processors",
    "async_scheduling",
    "stream_interval",
    "kv_sharing_fast_prefill",
    "swa_bounded_replay",
    "optimization_level",
    "performance_mode",
    "fault_tolerance_config",
    "enable_fault_tolerance",
    "kv_offloading_size",
    "kv_offloading_backend",
    "shutdown_timeout",
    "weight_transfer_config",
    "fail_on_environ_validation",
    "gdn_prefill_backend",
    "kda_prefill_backend",
    "kda_decode_backend",
]
# lm-eval's command line: what becomes of each option with ttt_vllm.
OPTIONS = {
    "help": "lm-eval's alone",
    "config": "lm-eval's alone: a file with these options",
    "tasks": "lm-eval's alone",
    "model": "ttt_vllm",
    "model_args": "this file",
    "apply_chat_template": "tests/serving/test_answering.py: the named template renders all texts",
    "limit": "lm-eval's alone",
    "use_cache": "refused: Answering.set_cache_hook",
    "num_fewshot": "lm-eval hands it to the tasks",
    "batch_size": "a model argument",
    "max_batch_size": "a model argument",
    "device": "a model argument",
    "gen_kwargs": "tests/serving/test_answering.py: checked, and in each request",
    "output_path": "lm-eval's alone",
    "log_samples": "lm-eval's alone",
    "samples": "lm-eval's alone",
    "cache_requests": "refused: TTTTask.build_all_requests",
    "check_integrity": "lm-eval's alone",
    "system_instruction": "in the prompts that lm-eval builds; refused where the template takes no system turn",
    "fewshot_as_multiturn": "in the prompts that lm-eval builds, and in training texts (SupportSet.chat)",
    "include_path": "lm-eval's alone",
    "verbosity": "lm-eval's alone",
    "write_out": "lm-eval's alone",
    "show_config": "lm-eval's alone",
    "wandb_args": "lm-eval's alone",
    "wandb_config_args": "lm-eval's alone",
    "trackio_args": "lm-eval's alone",
    "hf_hub_log_args": "lm-eval's alone",
    "predict_only": "lm-eval's alone",
    "seed": "lm-eval seeds Python, numpy and torch; demonstrations, fits and samples go by the model argument seed",
    "trust_remote_code": "a model argument, and datasets'",
    "confirm_run_unsafe_code": "lm-eval's alone",
    "metadata": "lm-eval hands it to the tasks",
}


@pytest.fixture
def parse(tiny_model):
    def parse(**arguments):
        given = {"pretrained": str(tiny_model), "dtype": "float32", "method": "icl", **arguments}
        return ModelArguments.parse(**given)

    return parse


def make(parse, **given):
    arguments = parse(**given)
    return Answering(arguments.model_dir, arguments.engine, arguments.adapters)


def refusal(parse, **arguments):
    with pytest.raises(TTTError) as caught:
        make(parse, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


def test_every_argument_stands_in_a_table():
    ours = {*USED, *TESTED}
    assert ours == LM_EVAL | {"enable_lora"}
    vllms = {*HANDED_ON, *OF_VLLM_USED, *NOT_HERE, *(USED.keys() | TESTED.keys())}
    missing = {name for name in VLLM if not name.startswith("_")} - vllms
    assert not missing, f"decide what becomes of vLLM's new arguments, and add them to a table: {sorted(missing)}"
    assert set(NOT_WITH_FITS) <= {*HANDED_ON, *TESTED}
    assert set(NOT_WITH_WORKERS) <= {*HANDED_ON}
    for test in {*TESTED.values(), *OF_VLLM_USED.values()}:
        assert not test.startswith("test_") or test in globals()


def test_every_option_of_the_command_line_stands_in_the_table():
    parser = Run(argparse.ArgumentParser().add_subparsers())._parser
    assert {action.dest for action in parser._actions} <= OPTIONS.keys()


@pytest.mark.parametrize("name", USED)
def test_lm_evals_arguments_are_used(parse, name):
    if name not in LM_EVAL | VLLM:
        pytest.skip("not in this release")
    value, is_used = USED[name]
    arguments = parse(**{name: value})
    assert is_used(arguments, Answering(arguments.model_dir, arguments.engine))


@pytest.mark.parametrize("name", HANDED_ON)
def test_vllms_arguments_are_kept_as_they_are(parse, name):
    if name not in VLLM:
        pytest.skip("not in this release")
    value = object()
    assert parse(**{name: value}).engine[name] is value


def test_vllms_arguments_reach_the_engine_as_they_are(parse, monkeypatch):
    engine, made = answering_module.shared_engine, []

    def shared_engine(**given):
        made.append(given)
        return engine(model=given["model"], dtype="float32")

    monkeypatch.setattr(answering_module, "shared_engine", shared_engine)
    names = {name for name in HANDED_ON if name in VLLM} | {"quantization"}
    values = {name: f"value of {name}" for name in names}
    arguments = parse(**values)
    Answering(arguments.model_dir, arguments.engine)
    (given,) = made
    assert {name: given[name] for name in names} == values


@pytest.mark.parametrize("name", NOT_HERE)
def test_what_has_no_meaning_here_is_refused_with_what_to_use(parse, name):
    assert NOT_HERE[name] in refusal(parse, **{name: 1})


@pytest.mark.parametrize("name", NOT_WITH_FITS)
def test_weights_that_are_served_are_those_that_are_fitted(parse, name):
    if name not in VLLM | LM_EVAL:
        pytest.skip("not in this release")
    assert "use method=icl" in refusal(parse, method="ttt", **{name: "x"})
    parse(method="ttt", **{name: None})


@pytest.mark.parametrize("name", NOT_WITH_WORKERS)
def test_a_worker_has_the_gpus_of_its_tensor_parallel_size(parse, name):
    if name not in VLLM:
        pytest.skip("not in this release")
    assert "data_parallel_size=2" in refusal(parse, data_parallel_size=2, **{name: 2})


def test_counts_of_gpus_and_workers(parse):
    arguments = parse(tensor_parallel_size="2", data_parallel_size=3)
    assert (arguments.engine["tensor_parallel_size"], arguments.workers) == (2, 3)
    assert "data_parallel_size" not in arguments.engine | arguments.given


def test_another_tokenizer_is_used(parse, save_tokenizer, tmp_path):
    save_tokenizer(tmp_path)
    arguments = parse(tokenizer=str(tmp_path))
    model = Answering(arguments.model_dir, arguments.engine)
    assert model.tokenizer.name_or_path == model.model.engine_args["tokenizer"] == str(tmp_path)


def test_the_hub_is_asked_for_what_is_named(monkeypatch, tiny_model):
    asked = []
    monkeypatch.setattr(
        model_arguments, "snapshot_download", lambda name, **options: asked.append((name, options)) or str(tiny_model)
    )
    options = {"revision": "v1", "hf_token": "secret", "download_dir": "/models", "trust_remote_code": True}
    arguments = ModelArguments.parse("owner/name", method="icl", **options)
    ((name, given),) = asked
    assert name == "owner/name"
    assert (given["revision"], given["token"], given["cache_dir"]) == ("v1", "secret", "/models")
    assert "*.py" in given["allow_patterns"]
    assert "revision" not in arguments.engine  # model_dir is that revision


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="vLLM can import all of its models")
@pytest.mark.parametrize("method", ["ttt", "icl"])
def test_a_model_of_images_that_vllm_cannot_import_is_refused(method, tiny_model, tmp_path):
    folder = tmp_path / "images"
    shutil.copytree(tiny_model, folder)
    text = json.loads((folder / "config.json").read_text()) | {"model_type": "gemma3_text"}
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
    (folder / "config.json").write_text(json.dumps({**config, "vision_config": {"model_type": "siglip_vision_model"}}))
    with pytest.raises(ModelError, match=r"images and text .*\(No module named 'torchvision'\); install torchvision"):
        ModelArguments.parse(str(folder), method=method)


def test_code_of_the_checkpoints_own_is_asked_for_in_vain(tiny_model, tmp_path):
    folder = tmp_path / "own"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "own.Model"}}))
    with pytest.raises(ModelError, match=r"trust_remote_code=True is not allowed .*auto_map.*; leave it out, or"):
        ModelArguments.parse(str(folder), trust_remote_code=True)
    assert ModelArguments.parse(str(folder)).shape.way == "fast"
    assert ModelArguments.parse(str(folder), method="icl", trust_remote_code=True).shape is None


@pytest.mark.parametrize("device", [None, "cpu", "cpu:0", "cuda:0"])
def test_this_machines_device_may_be_named(parse, device):
    assert "device" not in parse(device=device).engine


@pytest.mark.parametrize("device", ["cuda:1", "mps", 0, ["cpu"]])
def test_a_device_that_is_not_this_machines_is_refused(parse, device):
    assert "CUDA_VISIBLE_DEVICES" in refusal(parse, device=device)


@pytest.mark.parametrize(
    "arguments", [{"logprobs_mode": "raw_logits"}, {"max_logprobs": 0}, {"max_logprobs": "many"}, {"max_logprobs": 1.0}]
)
def test_engines_without_log_probabilities_are_refused(parse, arguments):
    assert "is not allowed" in refusal(parse, **arguments)
    assert parse(logprobs_mode="processed_logprobs", max_logprobs=-1).engine["max_logprobs"] == -1


@pytest.mark.parametrize("said", [{"enable_thinking": True}, {"chat_template_args": {"enable_thinking": True}}])
def test_thinking_is_asked_for_in_both_places(parse, said):
    template_args = dict(said.get("chat_template_args", {}))
    arguments = parse(think_end_token="</think>", **said)
    model = Answering(arguments.model_dir, arguments.engine)
    assert model.enable_thinking is True
    assert said.get("chat_template_args", {}) == template_args  # lm-eval takes it out of the user's own
    assert "needs think_end_token" in refusal(parse, **said)


def test_thinking_that_is_asked_for_and_not_is_refused(parse):
    both = {"enable_thinking": False, "chat_template_args": {"enable_thinking": True}, "think_end_token": "</think>"}
    assert "leave one of them out" in refusal(parse, **both)


@pytest.mark.parametrize(
    ("batch_size", "used"), [(None, "auto"), (1, "auto"), ("1", "auto"), ("auto:4", "auto"), (8, 8)]
)
def test_requests_go_to_vllm_at_once_unless_a_batch_size_is_asked_for(parse, batch_size, used):
    assert parse(batch_size=batch_size).engine["batch_size"] == used


def test_prompts_are_cut_only_where_that_is_asked_for(parse):
    assert not parse().config.truncate
    assert parse(truncate="true").config.truncate
    assert not parse(truncate=False, truncation_side="left").config.truncate


@pytest.fixture
def adapter(tiny_model, tmp_path):
    """Writes an adapter of some rank for the tiny model."""
    import torch

    def write(rank=8, **tensors):
        folder = tmp_path / f"adapter{rank}"
        folder.mkdir()
        name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
        weights = {f"{name}A.weight": torch.ones(rank, 128), f"{name}B.weight": torch.ones(128, rank), **tensors}
        write_adapter(folder, weights, base_model=str(tiny_model), rank=rank, alpha=rank, dropout=0.0)
        return folder

    return write


@pytest.mark.parametrize(("rank", "reserved"), [(1, 1), (8, 8), (12, 16), (300, 320)])
def test_an_adapter_of_the_users_is_reserved_for(parse, adapter, rank, reserved):
    folder = adapter(rank)
    arguments = parse(lora_local_path=str(folder))
    assert (arguments.engine["enable_lora"], arguments.engine["max_lora_rank"]) == (True, reserved)
    model = Answering(arguments.model_dir, arguments.engine, arguments.adapters)
    assert model.adapters.of("any").path == folder
    assert model.model.config.lora_config.max_lora_rank == reserved
    assert arguments.given["lora_local_path"] == str(folder)  # a worker reads it, too


@pytest.mark.parametrize(
    ("change", "telling"),
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), "has no adapter_config.json"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), "adapter_config.json"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x" * 99), "cannot be read"),
        (
            lambda folder: (folder / "adapter_config.json").write_text(
                (folder / "adapter_config.json").read_text().replace('"r": 8', '"r": 0')
            ),
            "no rank",
        ),
    ],
)
def test_an_adapter_that_cannot_be_served_is_refused(parse, adapter, change, telling):
    folder = adapter()
    change(folder)
    assert telling in refusal(parse, lora_local_path=str(folder))


def test_adapters_of_the_users_are_refused_where_they_cannot_answer(parse, adapter):
    folder = str(adapter(12))
    assert "mean the same" in refusal(parse, adapter=folder, lora_local_path=folder)
    assert "one of 16, 32" in refusal(parse, max_lora_rank=8, lora_local_path=folder)
    assert "no such directory" in refusal(parse, lora_local_path="/nowhere/adapter")
    assert "fitted adapters are LoRA" in refusal(parse, method="ttt", enable_lora=False)


def test_a_context_that_vllm_has_no_room_for_is_refused_with_the_longest(parse):
    # 2 layers of 2 heads of 32 numbers in float32: 1024 bytes for the keys and values of a token
    room = {"max_model_len": 2048, "kv_cache_memory_bytes": 2048 * 1024}
    make(parse, **room)
    said = refusal(parse, **{**room, "kv_cache_memory_bytes": 2048 * 1024 - 1})
    assert "2048 tokens" in said
    assert "at most 2016" in said
    make(parse, max_model_len=2016, kv_cache_memory_bytes=2048 * 1024 - 1)


def test_how_much_memory_vllm_takes_on_a_cpu_can_be_said_in_both_ways(parse):
    assert parse().engine["kv_cache_memory_bytes"] == 4 * 2**30
    assert parse(kv_cache_memory_bytes=5).engine["kv_cache_memory_bytes"] == 5
    shared = parse(gpu_memory_utilization=0.4).engine
    assert "kv_cache_memory_bytes" not in shared
    assert shared["gpu_memory_utilization"] == 0.4


def test_the_users_adapters_answer_in_the_place_of_fitted_ones(parse, adapter):
    one, two = adapter(4), adapter(12)
    for method in ("ttt", "e2e", "shared_ttt", "icl"):
        arguments = parse(method=method, adapter=str(one))
        assert (arguments.config.method, arguments.config.fits) == (method, False)
        assert arguments.engine["max_lora_rank"] == 8
    arguments = parse(adapter={"a": str(one), "b": str(two), "c": str(one)})
    assert arguments.engine["max_lora_rank"] == 16
    assert [arguments.adapters.of(task).path for task in "abc"] == [one, two, one]
    assert stated_settings(arguments.config)["adapter"] == {"a": str(one), "b": str(two), "c": str(one)}
    assert "adapter" not in stated_settings(parse().config)
    assert TTTConfig.from_mapping({"adapter": str(one)}).method == "icl"
    assert TTTConfig.from_mapping({"adapter": str(one), "method": "ttt", "k": 0}).k == 0  # nothing is fitted
    for wrong in (3, [], {}, "", {"a": 3}, True):
        assert "adapter=" in refusal(parse, adapter=wrong)


def test_a_format_of_weights_that_vllm_does_not_know_is_refused_before_it_starts(parse):
    assert "Load format `zip` is not supported" in refusal(parse, load_format="zip")


def test_an_architecture_that_vllm_serves_without_lora_is_refused(tmp_path, save_tokenizer):
    """GPT-2, unless vLLM has learnt it by now."""
    import torch
    from safetensors.torch import save_file
    from vllm.model_executor.models import ModelRegistry, supports_lora

    if supports_lora(ModelRegistry._try_load_model_cls("GPT2LMHeadModel")):
        pytest.skip("this vLLM serves GPT-2 with LoRA")
    save_tokenizer(tmp_path)
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 2}
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 320, "n_positions": 256}))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    arguments = ModelArguments.parse(str(tmp_path), "float32", method="icl")
    with pytest.raises(ModelError, match="GPT2LMHeadModel without LoRA"):
        Answering(arguments.model_dir, {**arguments.engine, "enable_lora": True, "max_lora_rank": 8})


HUGE = 10**5000
WRONG = [HUGE, -HUGE, float("nan"), float("inf"), [], [1], {}, {"a": 1}, "", "word", -1, 0.5, True, "1" * 5000, b"1"]


@pytest.mark.parametrize(
    "name",
    [
        *("k", "num_permutations", "fit_batch_size", "epochs", "lora_rank", "seed", "vote_permutations"),
        *("lora_alpha", "lora_dropout", "warmup_ratio", "lr", "method", "loss_on", "shuffle", "on_plain_task"),
        *("max_gen_toks", "max_model_len", "max_length", "tensor_parallel_size", "data_parallel_size"),
        *("max_batch_size", "batch_size", "prefix_token_id", "add_bos_token", "trust_remote_code", "enable_lora"),
        *("max_lora_rank", "enable_thinking", "chat_template_args", "think_end_token", "truncation_side", "dtype"),
        *("tokenizer", "tokenizer_mode", "device", "quantization", "max_num_seqs", "enforce_eager", "block_size"),
        *("gpu_memory_utilization", "kv_cache_dtype", "max_logprobs", "truncate", "lora_local_path", "revision"),
    ],
)
def test_any_value_is_taken_or_refused_in_one_sentence(parse, name):
    for value in WRONG:
        try:
            make(parse, **{name: value})
        except TTTError as error:
            said = str(error)
            assert "\n" not in said, said
            assert len(said) < 700, said
            assert name in said or isinstance(error, ModelError), said  # noqa: PT017


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("k", True),
        ("lr", "fast"),
        ("lora_alpha", float("nan")),
        ("lora_alpha", "1e999"),
        ("epochs", 1.5),
        ("seed", -1),
        ("method", 3),
        ("adapter_dir", 5),
        ("adapter_dir", ""),
        ("tokenizer", 5),
        ("max_gen_toks", 0),
        ("max_gen_toks", 2.5),
        ("max_model_len", [1]),
        ("add_bos_token", "yes"),
        ("prefix_token_id", 320),
        ("prefix_token_id", -1),
        ("chat_template_args", "date=today"),
        ("enable_thinking", "maybe"),
        ("think_end_token", 5),
        ("truncation_side", "top"),
        ("batch_size", "many"),
        ("tensor_parallel_size", True),
        ("enforce_eager", "maybe"),
        ("max_num_seqs", float("nan")),
        ("dtype", 5),
        ("dtype", "float12"),
        ("quantization", "zip"),
    ],
)
def test_values_that_are_not_allowed_are_refused_with_their_argument(parse, name, value):
    assert name in refusal(parse, **{name: value})


@pytest.mark.parametrize(
    "pretrained", [None, "", [], {}, True, float("nan"), 5, "owner/name/file", "no-such-folder", "1" * 5000, "a\0"]
)
def test_pretrained_is_refused(pretrained, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ConfigError, ModelError), match="pretrained") as caught:
        ModelArguments.parse(pretrained)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("content", ["[]", "null", "3", '"text"', "{", "", "\x00", '{"architectures": 3}', "{}"])
@pytest.mark.parametrize("method", ["ttt", "icl"])
def test_a_config_that_is_none_is_refused(tmp_path, content, method):
    (tmp_path / "config.json").write_text(content)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(TTTError) as caught:
        make(ModelArguments.parse, pretrained=str(tmp_path), method=method)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_file_and_an_empty_folder_are_no_models(tmp_path):
    (tmp_path / "weights.gguf").touch()
    for pretrained in (tmp_path / "weights.gguf", tmp_path):
        with pytest.raises(ModelError, match=str(pretrained)):
            ModelArguments.parse(str(pretrained))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", None),
        ("tokenizer.json", ""),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", '{"version": "1.0"}'),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", "{"),
    ],
)
def test_a_tokenizer_that_is_missing_or_damaged_is_one_sentence(make_model, name, content):
    folder = make_model()
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    arguments = ModelArguments.parse(str(folder), "float32", method="icl")
    with pytest.raises(ModelError, match="tokenizer") as caught:
        Answering(arguments.model_dir, arguments.engine)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


# of multiprocessing, where a script without `if __name__ == "__main__":` starts an engine in a process of its own
SPAWN = """
        An attempt has been made to start a new process before the
        current process has finished its bootstrapping phase.

        This probably means that you are not using fork to start your
        child processes.
"""


@pytest.mark.parametrize(
    ("message", "quoted"),
    [
        (
            SPAWN,
            "An attempt has been made to start a new process before the current process has finished its "
            "bootstrapping phase",
        ),
        ("max_model_len is too large.", "max_model_len is too large"),
        ("", "ValueError"),
    ],
)
def test_the_first_sentence_is_whole(message, quoted):
    assert reason_of(ValueError(message)) == quoted


def test_a_long_message_is_cut_between_words():
    reason = reason_of(ValueError("word " * 200))
    assert len(reason) <= 300
    assert reason.endswith(" word [...]")


@pytest.mark.parametrize("given", ["much", "", 0, -0.5, 1.5, float("nan"), [0.5]])
def test_a_share_of_the_gpu_is_refused(given):
    with pytest.raises(ConfigError, match=r"gpu_memory_utilization=.* above 0 and at most 1\.$"):
        gpu_share(given)


@pytest.mark.parametrize("given", ["8k", 0, -1, 2.5, True])
def test_a_number_of_tokens_is_refused(given):
    with pytest.raises(ConfigError, match=r"max_model_len=.* whole number of tokens, at least 1\.$"):
        positive_int({"max_model_len": given}, "max_model_len", "tokens")


def test_what_is_allowed_is_taken():
    assert [gpu_share(given) for given in (None, 1, "0.3")] == [0.9, 1.0, 0.3]
    assert [positive_int({"max_model_len": given}, "max_model_len", "tokens") for given in (None, 8192, "8192")] == [
        None,
        8192,
        8192,
    ]
