"""`TTTTask`: an lm-eval task that draws its demonstrations once and sends them along with every request.

A YAML becomes a TTT task by `class: !function ttt_harness.TTTTask`. Prompts, filters and metrics are lm-eval's own, so
that any of its models runs the task unchanged; `ttt_vllm` also reads the support set that each request carries.
"""

import random
from collections.abc import Mapping
from typing import Any

from datasets import DatasetDict
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.api.utils import maybe_delimit

from ttt_harness.config import TaskSettings
from ttt_harness.data.sequences import Demonstration, SupportSet
from ttt_harness.errors import ConfigError, DataError


class TTTTask(ConfigurableTask):
    """A task whose few-shot examples are k demonstrations, drawn with a seed and taken out of what is evaluated.

    The split is `random.Random(seed).shuffle` on the examples in file order: the first k are the demonstrations, in
    that order, the rest is evaluated, in that order. The metadata keys are those of `TaskSettings`.

    Raises:
        ConfigError: a metadata key has a value that is not allowed.
        DataError: the data set cannot be found or read.
    """

    def __init__(
        self,
        data_dir: str | None = None,
        cache_dir: str | None = None,
        download_mode: Any = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        config = {key: value for key, value in (config or {}).items() if key != "class"}
        metadata = config.get("metadata") or {}
        self.settings = TaskSettings.from_mapping(metadata)
        self._name = config.get("task", "this task")
        config["num_fewshot"] = self.settings.k
        if self.settings.generation_budget == "published":
            config["generation_kwargs"] = self._published_budget(config, metadata)
        super().__init__(data_dir, cache_dir, download_mode, config)

    def _published_budget(self, config: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, Any]:
        if "published_max_gen_toks" not in metadata:
            raise ConfigError(
                f"generation_budget=published: {self._name} has no published budget "
                "(metadata key published_max_gen_toks); leave generation_budget=full."
            )
        return {**(config.get("generation_kwargs") or {}), "max_gen_toks": metadata["published_max_gen_toks"]}

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Load the data set and draw the demonstrations out of its test split."""
        if callable(self.config.custom_dataset):
            # As in the base class, without its warning about --metadata for each of 27 tasks.
            self.dataset = self.config.custom_dataset(**{**(self.config.metadata or {}), **(dataset_kwargs or {})})
        else:
            super().download(dataset_kwargs, **kwargs)
        examples = self.dataset[self.config.test_split]
        k = self.settings.k
        if k >= len(examples):
            raise ConfigError(
                f"k={k} is not allowed for {self._name}: k must be smaller than its number of examples, "
                f"{len(examples)}, since the others are evaluated."
            )
        order = list(range(len(examples)))
        random.Random(self.settings.seed).shuffle(order)
        self.dataset = DatasetDict(
            {
                self.config.fewshot_split: examples.select(order[:k]),
                self.config.test_split: examples.select(order[k:]),
            }
        )

    def set_config(self, key: str, value: Any, update: bool = False) -> None:
        """As in the base class; `--num_fewshot` may only leave the demonstrations in the prompt or take them all out.

        Raises:
            ConfigError: any other number, since the demonstrations are also what an adapter is fitted on.
        """
        if key == "num_fewshot" and value not in (0, self.config.num_fewshot):
            raise ConfigError(
                f"--num_fewshot {value} is not allowed for {self._name}: the demonstrations are set by k "
                f"(k={self.settings.k} now; --metadata '{{\"k\": {value}}}' changes it), "
                "or left out by --num_fewshot 0."
            )
        super().set_config(key, value, update)

    def support_set(self, system_instruction: str | None = None) -> SupportSet:
        """The demonstrations in drawn order, in the pieces of text of which lm-eval makes a prompt."""
        demonstrations, description = [], ""
        for doc in self.fewshot_docs():
            description = self.resolve_field(doc, self.config.description) or ""
            question, answer = self.build_qa_turn(
                q=self.doc_to_text(doc, self.fewshot_cfg.doc_to_text),
                a=self.doc_to_target(doc, self.fewshot_cfg.doc_to_target),
                tgt_delim=self.fewshot_cfg.target_delimiter,
                few_delim=self.fewshot_cfg.fewshot_delimiter,
            )
            ending = self.fewshot_cfg.fewshot_delimiter
            demonstrations.append(Demonstration(question.to_text(), answer.content, ending))
        head = maybe_delimit(system_instruction, description, self.config.fewshot_delimiter)
        return SupportSet(head, tuple(demonstrations))

    def build_all_requests(self, **kwargs: Any) -> None:
        """As in the base class; each request then carries the support set, as its attribute `support_set`."""
        super().build_all_requests(**kwargs)
        support = self.support_set(kwargs.get("system_instruction"))
        for instance in self.instances:
            instance.support_set = support


def support_set_of(request: Instance) -> SupportSet:
    """The support set that a request carries.

    Raises:
        DataError: the request's task is not a TTT task.
    """
    support = getattr(request, "support_set", None)
    if support is None:
        raise DataError(
            f"{request.task_name} is not a TTT task; write a YAML with the three lines `include: <its YAML>`, "
            f"`task: {request.task_name}_ttt`, `class: !function ttt_harness.TTTTask`, "
            "and pass its folder as --include_path."
        )
    return support
