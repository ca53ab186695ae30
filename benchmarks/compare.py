"""Both pipelines in turn on the same work, stage by stage, and the figures that follow from their times.

Each stage is a process of its own and is written to the results file as soon as it is done. One that fails, or runs
into its time limit, is recorded under `failed`; the others go on.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import fits, flops, original, ours, process
from benchmarks.results import ResultsFile
from benchmarks.serve import write_order
from benchmarks.workload import TaskWork, Tokenizer, Workload
from ttt_harness.config import TTTConfig, nearest
from ttt_harness.embedded import embedded_model_path
from ttt_harness.errors import ConfigError
from ttt_harness.training.model_config import read_config
from ttt_harness.training.shape import ModelShape

# In the order in which they run. `same_kernels` is for a CPU only, `turns` for a GPU; `fits`, `prefix` and `engines`
# are left out on a CPU unless they are asked for.
STAGES = ("ours", "original", "same_kernels", "fits", "adapter", "prefix", "turns", "engines", "memory")
# Stages that use what another one made.
NEEDS = {"same_kernels": "original", "adapter": "ours", "prefix": "ours", "engines": "ours"}
# Generation with an adapter and without is compared over this many passes of each.
PASSES = 3
# The card that trainer and engine have to share in turns, bytes: what a 24 GB one has.
TURNS_BYTES = 24 * 2**30
# Ways to run our engine, as vLLM's arguments over our defaults; the second are for a GPU only. Each answers the first
# tasks, one after the other and then all in one batch.
ENGINES: dict[str, dict[str, Any]] = {"default": {}, "max_loras=4": {"max_loras": 4}}
GPU_ENGINES: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    "fp8 base weights": {"quantization": "fp8"},
    "compiled": {"compilation_config": {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_specialize_lora": False}},
    "compiled, vLLM's own graphs": {"cudagraph_capture_sizes": None, "compilation_config": {}},
    "vLLM's own batch size": {"max_num_seqs": None},
}
ENGINE_TASKS = 4
ENGINE_PASSES = ("adapter", "adapter", "together", "together")


@dataclass(frozen=True)
class Settings:
    """What is measured.

    model: `pretrained`. tasks: all that this project runs; original_tasks: those that the original pipeline runs, and
    on which the ratios are taken. limit: questions of each. k, permutations, seed, generation_budget: as in the
    project's settings. max_model_len: tokens, of both engines. serve_sample: on a CPU, vLLM's own LoRA kernels answer
    only this many questions of each task, and their time is scaled by prompt tokens; 0 for all. stages: which of
    `STAGES`, None for the machine's own. stage_limit: seconds after which a stage is ended.
    """

    model: str
    tasks: tuple[str, ...]
    original_tasks: tuple[str, ...]
    limit: int
    k: int
    permutations: int
    seed: int
    generation_budget: str
    max_model_len: int
    serve_sample: int
    stages: tuple[str, ...] | None
    stage_limit: float

    def __post_init__(self) -> None:
        for stage in self.stages or ():
            if stage not in STAGES:
                raise ConfigError(
                    f"--stages {stage} is not known: use some of {', '.join(STAGES)}.{nearest(stage, STAGES)}"
                )
        for stage, needed in NEEDS.items():
            if stage in (self.stages or ()) and needed not in (self.stages or ()):
                raise ConfigError(f"--stages {stage} needs the adapters of the stage {needed}: add {needed}.")
        if self.limit < 1:
            raise ConfigError(f"--limit {self.limit} is not allowed: it must be a whole number of at least 1.")
        if self.serve_sample < 0:
            raise ConfigError(f"--serve-sample {self.serve_sample} is not allowed: it must be 0 (all) or more.")
        if not self.stage_limit > 0:
            raise ConfigError(f"--stage-limit {self.stage_limit} is not allowed: it must be a number above 0.")
        if self.permutations % self.fit.fit_batch_size:
            raise ConfigError(
                f"--permutations {self.permutations} is not allowed: the original pipeline drops a last batch that is "
                f"not full; use a multiple of {self.fit.fit_batch_size}."
            )

    @property
    def fit(self) -> TTTConfig:
        """The hyperparameters of both pipelines: the published ones."""
        return TTTConfig(k=self.k, num_permutations=self.permutations, seed=self.seed)

    @property
    def ratios_on(self) -> str:
        """In words, the tasks that the ratios are taken on."""
        if set(self.original_tasks) == set(self.tasks):
            return "all tasks"
        return f"{', '.join(self.original_tasks)}, which this project ran once more, alone"


class Recorder:
    """The record of one run; every stage that ends is written to the results file."""

    def __init__(self, results: ResultsFile, say: Callable[[str], None]) -> None:
        self._results, self._say = results, say
        self.run = results.start_run()
        self.stages: dict[str, Any] = self.run["stages"]

    def stage(self, name: str, what: str, do: Callable[..., Any], *arguments: Any, under: str | None = None) -> Any:
        """Record what `do(*arguments)` returns as the stage `name`, and return it; None where it failed.

        With `under`, it is put beside others of its kind, into the stage of that name.
        """
        self._say(what)
        start = time.perf_counter()
        done = None
        try:
            done = do(*arguments)
        except process.StageError as error:
            self.run.setdefault("failed", {})[name] = str(error)
            self._say(f"  failed: {error}")
        else:
            (self.stages.setdefault(under, {}) if under else self.stages)[name] = done
            self._say(f"  {time.perf_counter() - start:.0f} s")
        self._results.save()
        return done


class Benchmark:
    """The stages of one invocation, on one prepared workload.

    Args:
        settings: what is measured.
        folder: for what the stages write.
        machine: what `benchmarks.machine` measured, if it did already.

    Raises:
        ConfigError, ModelError: a task or the model is not there, the original's tasks are not among this project's,
            or a stage needs a GPU.
    """

    def __init__(self, settings: Settings, folder: Path, *, machine: dict[str, Any] | None = None) -> None:
        if "turns" in (settings.stages or ()) and not torch.cuda.is_available():
            raise ConfigError("--stages turns needs a GPU, which trainer and engine share: leave it out.")
        self.settings = settings
        self.folder = folder
        self.model_dir = embedded_model_path() if settings.model == "embedded" else Path(settings.model).resolve()
        self.shape = ModelShape.from_config(read_config(self.model_dir), where=str(self.model_dir))
        self.config = settings.fit
        self.tokenizer = Tokenizer(self.model_dir)
        self.workload = Workload(
            self.tokenizer,
            [*settings.tasks, *settings.original_tasks],
            limit=settings.limit,
            config=self.config,
            generation_budget=settings.generation_budget,
        )
        everything = {task.name for task in self.workload.tasks(settings.tasks)}
        if alone := [task.name for task in self.compared if task.name not in everything]:
            raise ConfigError(
                f"--original-tasks {alone[0]} is not among --tasks, to all of which the original's time is scaled: "
                "add it there, or leave it out here."
            )
        self.machine = machine or self._peak()

    @property
    def device(self) -> str:
        return self.machine["device"]

    @property
    def dtype(self) -> str:
        return self.machine["dtype"]

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that run."""
        left_out = ("same_kernels",) if self.device == "cuda" else ("fits", "prefix", "turns", "engines")
        return self.settings.stages or tuple(stage for stage in STAGES if stage not in left_out)

    @property
    def compared(self) -> list[TaskWork]:
        """The tasks that both pipelines run."""
        return self.workload.tasks(self.settings.original_tasks)

    def run(self, results: ResultsFile, number: int, say: Callable[[str], None]) -> dict[str, Any]:
        """Go through the stages once and return the run's record."""
        record = Recorder(results, say)
        folder = self.folder / f"run{number}"
        folder.mkdir(parents=True)
        record.stages["peak_before"] = self.machine
        mine = self._run_ours(record, folder) if "ours" in self.stages else None
        if "original" in self.stages:
            self._run_original(record, folder)
        if "fits" in self.stages:
            record.stage("fits", "fits with nothing beside them", self._fits, folder)
        if mine and "adapter" in self.stages:
            record.stage("adapter", "generation with and without adapter", self._adapter, folder, mine)
        if mine and "prefix" in self.stages:
            record.stage("prefix", "generation without prefix caching", self._prefix, folder, mine)
        if "turns" in self.stages:
            record.stage("turns", "this project on a card of 24 GiB", self._turns, folder)
        if mine and "engines" in self.stages:
            for name, arguments in (ENGINES | (GPU_ENGINES if self.device == "cuda" else {})).items():
                what = f"our engine, {name}"
                record.stage(name, what, self._variant, folder, name, mine, arguments, under="engines")
        if number == 1 and "memory" in self.stages:
            first = self.compared[0].sequences[: self.config.fit_batch_size]
            full = fits.filling(first[0], self._engine()["max_model_len"])
            record.stage("memory_short", "memory of a fit", self._memory, folder, "memory_short", first)
            record.stage("memory_full", "memory of a fit that fills the context", self._memory, folder, "full", full)
        record.stage("peak_after", "matmul peak", self._peak)
        return record.run

    def _run_ours(self, record: "Recorder", folder: Path) -> dict[str, Any] | None:
        everything = self.workload.tasks(self.settings.tasks)
        mine = record.stage("ours", f"this project: {len(everything)} task(s)", self._ours, folder, "ours", everything)
        if {task.name for task in everything} != {task.name for task in self.compared}:
            name, what = "ours_compared", f"this project: the {len(self.compared)} task(s) of the comparison"
            record.stage(name, what, self._ours, folder, name, self.compared)
        return mine

    def _run_original(self, record: "Recorder", folder: Path) -> None:
        fitted = {}
        for task in self.compared:
            what = f"original pipeline: fit of {task.name}"
            if fit := record.stage(task.name, what, self._original_fit, folder, task, under="original_fits"):
                fitted[task.name] = fit
        if len(fitted) < len(self.compared):
            return
        name = "original_serve"
        record.stage(name, "original pipeline: serving", self._original_serve, folder, name, fitted, False)
        if self.device == "cpu" and "same_kernels" in self.stages:
            name, what = f"{name}_same_kernels", "original pipeline: serving with this project's LoRA kernels"
            record.stage(name, what, self._original_serve, folder, name, fitted, True)

    def project(self, folder: Path) -> dict[str, Any]:
        """This project alone on all tasks; `folder` is made.

        Raises:
            StageError: it failed, or took longer than a stage may.
        """
        return self._ours(folder.parent, folder.name, self.workload.tasks(self.settings.tasks))

    # Stages

    def _peak(self) -> dict[str, Any]:
        answer = self.folder / "machine.json"
        log, limit = self.folder / "machine.log", self.settings.stage_limit
        process.run("matmul peak", process.python("benchmarks.machine", answer), log=log, limit=limit)
        return json.loads(answer.read_text())

    def _engine(self) -> dict[str, Any]:
        """What both engines are told, beyond their defaults."""
        return {"max_model_len": min(self.settings.max_model_len, self.shape.context_length)}

    def _ours(self, folder: Path, name: str, work: Sequence[TaskWork], **engine: Any) -> dict[str, Any]:
        done = ours.evaluate(
            [task.name for task in work],
            folder / name,
            model=str(self.model_dir),
            config=self.config,
            limit=self.settings.limit,
            engine={**self._engine(), "generation_budget": self.settings.generation_budget, **engine},
            seconds=self.settings.stage_limit,
        )
        if done["dtype"] != self.dtype:
            raise process.StageError(f"this project computed in {done['dtype']}, the original would in {self.dtype}.")
        answers = done.pop("answers")
        for task in work:
            record = done["tasks"][task.name]
            if answers[task.name]["prompts"] != [request.text for request in task.requests]:
                raise process.StageError(f"{task.name}: this project answered other prompts than the original would.")
            if record["train_tokens"] != task.train_tokens:
                raise process.StageError(
                    f"{task.name}: this project trained on {record['train_tokens']} tokens, "
                    f"the original would on {task.train_tokens}."
                )
            record |= self._counts(task, answers[task.name]["texts"])
        return done

    def _original_fit(self, folder: Path, task: TaskWork) -> dict[str, Any]:
        done = original.fit(
            task,
            folder / "original" / task.name,
            model_dir=self.model_dir,
            shape=self.shape,
            config=self.config,
            dtype=self.dtype,
            device=self.device,
            limit=self.settings.stage_limit,
        )
        done["fit_flops"] = flops.fit_flops(self.shape, self.config.lora_rank, task.sequences)
        return done

    def _original_serve(self, folder: Path, name: str, fitted: dict[str, Any], own_kernels: bool) -> dict[str, Any]:
        engine = {
            "model": str(self.model_dir),
            "dtype": self.dtype,
            "enable_lora": True,
            "max_lora_rank": self.config.max_lora_rank,
            **self._engine(),
        }
        if self.device == "cpu":
            engine["enforce_eager"] = True  # compiling takes longer than it saves in such a run
        sample = 0 if own_kernels or self.device != "cpu" else self.settings.serve_sample
        work = [replace(task, requests=task.requests[: sample or None]) for task in self.compared]
        done = original.serve(
            work,
            folder / "original" / name,
            engine=engine,
            adapters={task: fit["adapter"] for task, fit in fitted.items()},
            own_kernels=own_kernels,
            limit=self.settings.stage_limit,
        )
        answers, seconds = done.pop("answers"), done["tasks"]
        done["tasks"] = {
            task.name: {
                "generate_seconds": seconds[task.name] * whole.prompt_tokens / task.prompt_tokens,
                "answered": len(task.requests),
                "requests": len(whole.requests),
                "accuracy": whole.accuracy(answers[task.name]),
                **self._counts(whole, answers[task.name]),
            }
            for task, whole in zip(work, self.compared, strict=True)
        }
        scaled = sum(task["generate_seconds"] for task in done["tasks"].values())
        done["measured_seconds"] = done["seconds"]
        done["seconds"] += scaled - done["generate_seconds"]
        done["generate_seconds"] = scaled
        return done

    def _counts(self, task: TaskWork, texts: Sequence[str]) -> dict[str, Any]:
        """What answering took in tokens and operations; the tokens of an answer are its text's and one to end it.

        Questions beyond `texts` were not asked, and are taken to be answered at the mean length.
        """
        generated = [
            min(self.tokenizer.count(text) + 1, request.max_tokens)
            for text, request in zip(texts, task.requests, strict=False)
        ]
        generated += [round(statistics.fmean(generated))] * (len(task.requests) - len(texts))
        prompts = [request.tokens for request in task.requests]
        return {
            "prompt_tokens": task.prompt_tokens,
            "answer_tokens": generated,
            "fit_flops": self.config.epochs * flops.fit_flops(self.shape, self.config.lora_rank, task.sequences),
            "generate_flops": flops.generation_flops(self.shape, self.config.lora_rank, prompts, generated),
        }

    def _passes(
        self,
        folder: Path,
        name: str,
        mine: dict[str, Any],
        work: Sequence[TaskWork],
        passes: Sequence[str],
        engine: dict[str, Any],
    ) -> dict[str, Any]:
        """Answer all requests with this project's engine, each answer as long as in its own run."""
        folder = folder / name
        folder.mkdir()
        records = mine["tasks"]
        write_order(
            folder / "order.json",
            work,
            engine={
                "model": str(self.model_dir),
                "enable_lora": True,
                "max_lora_rank": self.config.max_lora_rank,
                **self._engine(),
                **engine,
            },
            adapters={task.name: records[task.name]["adapter"] for task in work},
            passes=passes,
            own_engine=True,
            lengths={task.name: records[task.name]["answer_tokens"] for task in work},
        )
        done = process.run(
            name,
            process.python("benchmarks.serve", folder / "order.json", folder / "answer.json"),
            log=folder / "log.txt",
            limit=self.settings.stage_limit,
        )
        answer = json.loads((folder / "answer.json").read_text())
        return {
            "seconds": done.seconds,
            "start_seconds": answer["start_seconds"],
            "passes": answer["passes"],
            # On a GPU the card's memory in use; on a CPU what came after the imports.
            "serve_peak_bytes": answer["peak_bytes"] - (answer["idle_bytes"] if self.device == "cpu" else 0),
        }

    def _adapter(self, folder: Path, mine: dict[str, Any]) -> dict[str, Any]:
        return self._passes(folder, "adapter", mine, self._served(mine), ["base", "adapter"] * PASSES, {})

    def _prefix(self, folder: Path, mine: dict[str, Any]) -> dict[str, Any]:
        return self._passes(folder, "prefix", mine, self._served(mine), ["adapter"], {"enable_prefix_caching": False})

    def _turns(self, folder: Path) -> dict[str, Any]:
        share = round(TURNS_BYTES / self.machine["gpu_bytes"], 4)
        return self._ours(folder, "turns", self.compared, gpu_memory_utilization=share)

    def _variant(self, folder: Path, name: str, mine: dict[str, Any], engine: dict[str, Any]) -> dict[str, Any]:
        work = [task for task in self.workload.tasks(self.settings.tasks) if task.name in mine["tasks"]][:ENGINE_TASKS]
        where = "engine-" + "".join(c if c.isalnum() else "-" for c in name)
        return {"engine": engine, **self._passes(folder, where, mine, work, ENGINE_PASSES, engine)}

    def _served(self, mine: dict[str, Any]) -> list[TaskWork]:
        """The tasks of the comparison that this project has fitted."""
        return [task for task in self.compared if task.name in mine["tasks"]]

    def _fits(self, folder: Path) -> dict[str, Any]:
        work = self.compared
        # The first one of a process is slow, and not counted.
        fitted = [work[0].sequences, *(task.sequences for task in work)]
        done = self._make_fits(folder / "fits", fitted, self._engine()["max_model_len"])
        return {
            "tasks": {
                task.name: {
                    "fit_seconds": seconds,
                    "train_tokens": sum(len(sequence.tokens) for sequence in task.sequences),
                    "fit_flops": flops.fit_flops(self.shape, self.config.lora_rank, task.sequences),
                }
                for task, seconds in zip(work, done["seconds"][1:], strict=True)
            },
            "peak_bytes": done["peak_bytes"],
        }

    def _memory(self, folder: Path, name: str, sequences: Sequence[Any]) -> dict[str, Any]:
        longest = max(len(sequence.tokens) for sequence in sequences)
        return {**self._make_fits(folder / name, [sequences]), "tokens": longest}

    def _make_fits(self, folder: Path, work: Sequence[Sequence[Any]], beside: int | None = None) -> dict[str, Any]:
        return fits.make(
            work,
            folder,
            model_dir=self.model_dir,
            config=self.config,
            dtype=self.dtype,
            device=self.device,
            beside=beside,
            limit=self.settings.stage_limit,
        )
