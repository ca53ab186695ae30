"""The original pipeline, step by step, with the published hyperparameters.

For each task a process `tune run lora_finetune_single_device` with a config of its own, which loads the base model,
computes logits for every token and recomputes activations; after the last of them one engine, without prefix caching,
which answers the tasks one after the other. Written after the description of Fewshot-TTT
(https://github.com/adamzweiger/Fewshot-TTT) and against torchtune's stock recipe; none of its code is here.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks import process
from benchmarks.serve import write_order
from benchmarks.tokenized_dataset import write_sequences
from benchmarks.workload import TaskWork
from ttt_harness.config import TTTConfig
from ttt_harness.errors import ConfigError
from ttt_harness.training.families import LORA_ATTENTION_MODULES
from ttt_harness.training.shape import ModelShape

RECIPE = "lora_finetune_single_device"
TORCHTUNE_DTYPES = {"bfloat16": "bf16", "float32": "fp32"}
# The recipe seeds its own randomness with this, whatever the split's seed is.
RECIPE_SEED = 42
# Lines of the recipe's log that stand right before and right after its training loop.
LOOP_MARKS = {"loop_start": "Profiler config after instantiation", "loop_end": "Starting checkpoint save"}


def recipe_config(
    *,
    model_dir: Path,
    shape: ModelShape,
    data: Path,
    output: Path,
    sequences: int,
    config: TTTConfig,
    dtype: str,
    device: str,
) -> dict[str, Any]:
    """The YAML of one task's fit.

    Args:
        model_dir: base model in the hub's layout.
        shape: its numbers.
        data: file of the training sequences.
        output: folder for the adapter.
        sequences: number of training sequences.
        config: hyperparameters.
        dtype: bfloat16 or float32, of weights and activations.
        device: cpu or cuda.

    Raises:
        ConfigError: the sequences do not fill whole batches; the recipe would drop the rest, and do less work.
    """
    if sequences % config.fit_batch_size:
        raise ConfigError(
            f"--permutations {sequences} is not allowed: torchtune's recipe drops a last batch that is not full; "
            f"use a multiple of {config.fit_batch_size}."
        )
    epochs = config.epochs
    steps = sequences // config.fit_batch_size * epochs
    return {
        "output_dir": str(output),
        "model": {
            # torchtune's general Llama 3 builder; with these numbers it builds any of them.
            "_component_": "torchtune.models.llama3_2.lora_llama3_2",
            "lora_attn_modules": list(LORA_ATTENTION_MODULES),
            "apply_lora_to_mlp": True,
            "apply_lora_to_output": False,
            "lora_rank": config.lora_rank,
            "lora_alpha": config.lora_alpha,
            "lora_dropout": config.lora_dropout,
            "vocab_size": shape.vocab_size,
            "num_layers": shape.num_layers,
            "num_heads": shape.num_heads,
            "num_kv_heads": shape.num_kv_heads,
            "embed_dim": shape.embed_dim,
            "intermediate_dim": shape.mlp_dim,
            "max_seq_len": shape.context_length,
            "norm_eps": shape.norm_eps,
            "rope_base": shape.rope_base,
            "scale_factor": shape.rope_scale,
            "tie_word_embeddings": shape.tied_embeddings,
        },
        "tokenizer": {"_component_": "benchmarks.tokenized_dataset.padding_only", "pad_id": 0},
        "dataset": {"_component_": "benchmarks.tokenized_dataset.tokenized_dataset", "path": str(data)},
        "checkpointer": {
            "_component_": "torchtune.training.FullModelHFCheckpointer",
            "checkpoint_dir": str(model_dir),
            "checkpoint_files": sorted(path.name for path in model_dir.glob("*.safetensors")),
            "recipe_checkpoint": None,
            "output_dir": str(output),
            "model_type": "LLAMA3_2" if shape.tied_embeddings else "LLAMA3",
        },
        "save_adapter_weights_only": True,
        "resume_from_checkpoint": False,
        "metric_logger": {"_component_": "torchtune.training.metric_logging.DiskLogger", "log_dir": str(output)},
        "log_every_n_steps": 1,
        "seed": RECIPE_SEED,
        "shuffle": True,
        "batch_size": config.fit_batch_size,
        "epochs": epochs,
        "max_steps_per_epoch": None,
        "gradient_accumulation_steps": 1,
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": config.lr, "eps": 1e-8, "weight_decay": 0.01},
        "lr_scheduler": {
            "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
            "num_warmup_steps": int(config.warmup_ratio * steps),
        },
        "loss": {"_component_": "torch.nn.CrossEntropyLoss"},
        "device": device,
        "dtype": TORCHTUNE_DTYPES[dtype],
        "enable_activation_checkpointing": True,
        "enable_activation_offloading": False,
        "compile": False,
    }


def fit(
    task: TaskWork,
    folder: Path,
    *,
    model_dir: Path,
    shape: ModelShape,
    config: TTTConfig,
    dtype: str,
    device: str,
    limit: float,
) -> dict[str, Any]:
    """Fit one task's adapter as the original does, in `folder`, and return what it took.

    Raises:
        StageError: the process failed or took longer than `limit` seconds.
    """
    folder.mkdir(parents=True)
    write_sequences(folder / "sequences.jsonl", task.sequences)
    settings = recipe_config(
        model_dir=model_dir,
        shape=shape,
        data=folder / "sequences.jsonl",
        output=folder / "out",
        sequences=len(task.sequences),
        config=config,
        dtype=dtype,
        device=device,
    )
    (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    # What the command `tune` runs; as a module it is found without the environment's scripts on the path.
    command = process.python("torchtune._cli.tune", "run", RECIPE, "--config", folder / "config.yaml")
    done = process.run(
        f"original pipeline, fit of {task.name}", command, log=folder / "log.txt", limit=limit, marks=LOOP_MARKS
    )
    if missing := LOOP_MARKS.keys() - done.marks.keys():
        raise process.StageError(f"original pipeline, fit of {task.name}: no {', '.join(sorted(missing))} in its log.")
    return {
        "seconds": done.seconds,
        "loop_seconds": done.marks["loop_end"] - done.marks["loop_start"],
        "train_tokens": task.train_tokens * config.epochs,
        "peak_bytes": done.peak_bytes,
        "gpu_peak_bytes": done.gpu_peak_bytes,
        "adapter": str(folder / "out" / f"epoch_{max(config.epochs, 1) - 1}"),
    }


def serve(
    work: Sequence[TaskWork],
    folder: Path,
    *,
    engine: Mapping[str, Any],
    adapters: Mapping[str, str],
    own_kernels: bool,
    limit: float,
) -> dict[str, Any]:
    """Answer all tasks as the original does and return what it took; `answers` are the texts.

    Args:
        work: the tasks.
        folder: for its files; made here.
        engine: arguments of vLLM's `LLM`.
        adapters: task -> PEFT directory.
        own_kernels: with this project's LoRA kernels for the CPU (a vLLM plugin), or as vLLM comes.
        limit: seconds.

    Raises:
        StageError: the process failed or took longer than `limit` seconds.
    """
    folder.mkdir(parents=True)
    write_order(
        folder / "order.json",
        work,
        engine={**engine, "enable_prefix_caching": False},
        adapters=adapters,
        passes=["adapter"],
        own_engine=False,
    )
    done = process.run(
        f"original pipeline, serving ({folder.name})",
        process.python("benchmarks.serve", folder / "order.json", folder / "answer.json"),
        log=folder / "log.txt",
        limit=limit,
        env={"VLLM_PLUGINS": "ttt_harness" if own_kernels else "", "VLLM_CPU_KVCACHE_SPACE": "4"},
    )
    answer = json.loads((folder / "answer.json").read_text())
    (only,) = answer["passes"]
    return {
        "seconds": done.seconds,
        "generate_seconds": only["seconds"],
        "tasks": only["tasks"],
        "peak_bytes": done.peak_bytes,
        "gpu_peak_bytes": done.gpu_peak_bytes,
        "answers": answer["answers"],
    }
