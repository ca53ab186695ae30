"""`TTTVLLM`: the model class that lm-eval knows as `ttt_vllm`.

It is lm-eval's face of a run. The arguments are sorted by `run.model_arguments`, prompts are answered as lm-eval's own
`vllm` class does by `serving.answering`, and what has to be fitted and asked is worked out and done by `run`, in this
process or on the workers of `cluster`.
"""

# ruff: noqa: E402 - vLLM and torch read the environment when they are imported
from ttt_harness.errors import ConfigError, DataError, report_errors_in_one_sentence
from ttt_harness.extras import require
from ttt_harness.serving.environment import prepare_environment

report_errors_in_one_sentence()
require("torch", "torchtune", "transformers", "vllm")
prepare_environment()

import contextlib
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from importlib.metadata import version
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from ttt_harness.adapters.store import AdapterStore
from ttt_harness.cluster.pool import begin_workers
from ttt_harness.harness import results
from ttt_harness.harness.task import support_set_of
from ttt_harness.records import TaskRecord
from ttt_harness.run.executor import Crew
from ttt_harness.run.groups import Group
from ttt_harness.run.progress import RunProgress

_log = logging.getLogger(__name__)


class TTTVLLM(LM):
    """lm-eval's `vllm` model that fits a LoRA adapter on each task's demonstrations before it answers.

    Args:
        pretrained: a model directory in the hub's layout, a name on the hub, or `embedded`.
        dtype: of the weights, fitted and served alike; `auto` is bfloat16, or float32 on a CPU that lacks it.
        **model_args: the fields of `TTTConfig`, the arguments of lm-eval's `vllm` model, and those of vLLM's engine.
            With `data_parallel_size` above 1, that many Ray workers fit and answer (`ttt_harness.cluster`).
            Task metadata keys may stand here too; lm-eval hands them to the tasks.

    Attributes:
        records: task -> what the run states about it.

    Raises:
        ConfigError: an argument is unknown or has a value that is not allowed.
        ModelError: the model is missing, damaged or not supported.
    """

    answers = True  # else only adapters are fitted, and no engine is started ahead

    def __init__(self, pretrained: str | None = None, dtype: str = "auto", **model_args: Any) -> None:
        super().__init__()
        self._pool = begin_workers(pretrained, dtype, model_args)
        # Not before the workers have begun to import the same.
        from ttt_harness.run import local
        from ttt_harness.run.model_arguments import ModelArguments
        from ttt_harness.run.preflight import Preflight
        from ttt_harness.serving.answering import Answering

        self._local = local
        self.arguments = ModelArguments.parse(pretrained, dtype, **model_args)
        self.config = self.arguments.config
        self.answering = Answering(self.arguments.model_dir, self.arguments.engine, self.arguments.adapters)
        self.store = AdapterStore(self.config.adapter_store)
        self.records: dict[str, TaskRecord] = {}
        self._settings = local.stated_settings(self.config, self.arguments.tuned)
        self._fits = self.config.fits
        self._base_model: Future[str] = Future()
        if self._fits:
            local.tell_what_is_left_out(self.arguments)
            self._base_model = local.in_background(self.arguments.base_model, name="fingerprint")
        self._preflight = Preflight(self.arguments, self.answering, self.store, self._base_model)
        if self._pool is None:
            self._worker = local.make_worker(self.arguments, self.answering, self.store)
            local.preload(self.arguments, self.answering, engine=self.answers)

    # What lm-eval calls

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:  # noqa: ARG002
        """Generate, each request with the adapter of its support set."""
        return self._answer(requests, "generate_until")

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:  # noqa: ARG002
        """Score continuations, each request with the adapter of its support set."""
        return self._answer(requests, "loglikelihood")

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:  # noqa: ARG002
        """Score whole texts, with the base model: such tasks have no demonstrations to fit on."""
        if self._fits and self.config.on_plain_task != "base":
            raise DataError(
                f"{requests[0].task_name} scores whole texts (loglikelihood_rolling) and has no demonstrations "
                "to fit on; evaluate it with on_plain_task=base or with method=icl."
            )
        return self._answer(requests, "loglikelihood_rolling")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt that the model's chat template makes of turns."""
        return self.answering.apply_chat_template(chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template that `--apply_chat_template` names."""
        return self.answering.chat_template(chat_template)

    @property
    def tokenizer_name(self) -> str:
        """As lm-eval's class names it."""
        return self.answering.tokenizer_name

    @property
    def tokenizer(self) -> Any:
        """What lm-eval states of the tokenizer, it reads here."""
        return self.answering.tokenizer

    @property
    def max_length(self) -> int:
        """The context window, in tokens."""
        return self.answering.max_length

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.answering.eot_token_id

    def set_cache_hook(self, cache_hook: Any) -> None:
        """lm-eval calls this for `--use_cache`, which is refused."""
        self.answering.set_cache_hook(cache_hook)
        super().set_cache_hook(cache_hook)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval adds to `config` in its results: the settings, and for each task the cost of its stages."""
        results.answers_are_scored()
        ran = self._local.what_ran(self.arguments, self.answering.dtype_name)
        packages = ("ttt-harness", "torch", "torchtune", "vllm", "transformers")
        return {
            "ttt": {
                "settings": {**self._settings, **ran},
                "tasks": {task: record.to_dict() for task, record in self.records.items()},
                "stages": self._local.stages_of(self.arguments.memory).name.lower(),
                "versions": {name: version(name) for name in packages},
            }
        }

    # The run

    @property
    def fingerprint(self) -> str:
        """The hash of the base model's config and weights; there is one where adapters are fitted."""
        return self._base_model.result()

    def _answer(self, requests: list[Instance], kind: str) -> list[Any]:
        """Answer `requests` with lm-eval's method `kind`, in their order.

        Raises:
            TTTError: a task cannot be fitted or asked, or the run fails; see `run.evaluation.Evaluation`.
        """
        evaluation, checked = self._preflight.evaluation(
            requests,
            kind,
            is_fitted=lambda group: self._is_fitted(group, requests, kind),
            keep=results.keep_answers(requests),
        )
        with RunProgress(evaluation.work) as progress:
            if self.arguments.memory is not None and evaluation.to_fit:
                progress.say(self.arguments.memory.reason)
            with self._crew(progress) as crew:
                evaluation.run(crew, self.arguments.workers, progress)
        for task, record in evaluation.records.items():
            said = checked[task]
            record.truncated, record.sampling = said.truncated, said.sampling
            record.adapter = record.adapter or said.adapter
            record.setting = self.arguments.tuned_setting(task)
            self._note(task, record)
        return evaluation.answers

    def fit(self, requests: Sequence[Instance]) -> dict[str, TaskRecord]:
        """Have the adapters of the requests' tasks in the store; no engine is started, and nothing is answered.

        Returns:
            For each task with an adapter, the record of its fit.

        Raises:
            ConfigError: the method fits nothing, or several workers are asked for.
            TTTError: a task cannot be fitted, or a fit fails.
        """
        if not self._fits:
            raise ConfigError(f"method={self.config.method} fits nothing here; choose another method, and no adapter=.")
        if self._pool is not None:
            raise ConfigError("data_parallel_size is not allowed with fit, which works in one process; leave it out.")
        evaluation, keys = self._preflight.fits(
            requests, is_fitted=lambda group, kind: self._is_fitted(group, requests, kind)
        )
        with RunProgress(evaluation.work) as progress, self._crew(progress) as crew:
            evaluation.run(crew, 1, progress)
        for key in dict.fromkeys(keys.values()):
            self._worker.stored(key)  # what is still being written is waited for
        return {task: evaluation.adapters[key] for task, key in keys.items()}

    def _is_fitted(self, group: Group, requests: Sequence[Instance], kind: str) -> bool:
        """Whether the group is to be answered with an adapter.

        Raises:
            DataError: it should, and has no support set.
        """
        if not self._fits or kind == "loglikelihood_rolling":
            return False
        if group.support is None and self.config.on_plain_task != "base":
            support_set_of(requests[group.indices[0]])  # says what to do
        return group.support is not None and self.arguments.config_of(group.task).fits

    @contextlib.contextmanager
    def _crew(self, progress: RunProgress) -> Iterator[Crew]:
        """Who fits and answers."""
        if self._pool is None:
            yield self._local.LocalCrew(self._worker)
            return
        from ttt_harness.cluster.worker import WorkerEnvironment, versions

        environment = WorkerEnvironment(
            device=self._local.fit_device(),
            dtype=self.answering.dtype_name,
            base_model=self._base_model.result() if self._fits else None,
            versions=versions(),
        )
        with self._pool.crew(self.store, environment, progress) as crew:
            yield crew

    def _note(self, task: str, record: TaskRecord) -> None:
        """Keep what the run states about a task, and warn where its adapter does nothing."""
        self.records[task] = record
        if record.changes_output is False:
            _log.warning(
                "%s: the adapter %s does not change the model's output; lr=%s and epochs=%s may be too small.",
                task,
                record.adapter,
                self.arguments.config_of(task).lr,
                self.arguments.config_of(task).epochs,
            )
