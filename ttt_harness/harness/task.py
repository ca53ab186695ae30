"""`TTTTask`: an lm-eval task that draws its demonstrations once and sends them along with every request.

A YAML becomes a TTT task by `class: !function ttt_harness.TTTTask`. Prompts, filters and metrics are lm-eval's own, so
that any of its models runs the task unchanged; `ttt_vllm` also reads the support set that each request carries.
"""

import random
from collections.abc import Callable, Mapping
from typing import Any

from datasets import DatasetDict
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.api.utils import maybe_delimit

from ttt_harness.config import TaskSettings
from ttt_harness.data.sequences import Demonstration, SupportSet, permutations
from ttt_harness.errors import ConfigError, DataError
from ttt_harness.harness.filters import vote


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
        self.settings = settings = TaskSettings.from_mapping(metadata)
        self._name = config.get("task", "this task")
        self._check_prompts(config)
        # An end-to-end fit teaches the task without demonstrations, and is asked without.
        zero_shot = str(metadata.get("method")).endswith("e2e")
        config["num_fewshot"] = 0 if zero_shot else settings.k - settings.leave_one_out
        if self.settings.generation_budget == "published":
            config["generation_kwargs"] = self._published_budget(config, metadata)
        self._rendered: dict[tuple[str, int], Any] = {}
        super().__init__(data_dir, cache_dir, download_mode, config)

    def _check_prompts(self, config: Mapping[str, Any]) -> None:
        settings = self.settings
        if settings.leave_one_out and settings.k < 2:
            raise ConfigError(
                f"leave_one_out=true is not allowed for {self._name} with k={settings.k}: "
                "it takes one demonstration out of the prompt, and one has to stay; set k to at least 2."
            )
        if settings.vote_permutations > 1 and config.get("output_type") != "generate_until":
            raise ConfigError(
                f"vote_permutations={settings.vote_permutations} is not allowed for {self._name}: "
                "a vote is taken among generated answers (output_type generate_until); leave it at 1."
            )

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

    def fewshot_context(self, doc: dict[str, Any], num_fewshot: int, *args: Any, **kwargs: Any) -> Any:
        """As in the base class; for a vote, the list of prompts under each permutation of the demonstrations."""
        if self.settings.vote_permutations == 1 or num_fewshot == 0:
            return super().fewshot_context(doc, num_fewshot, *args, **kwargs)
        drawn = list(self.sampler.df)
        contexts = []
        # The same permutations for every question, so that vLLM's prefix cache holds each of them once.
        for order in permutations(len(drawn), self.settings.vote_permutations, seed=self.settings.seed):
            self.sampler.replace_df([drawn[index] for index in order])
            contexts.append(super().fewshot_context(doc, num_fewshot, *args, **kwargs))
        self.sampler.replace_df(drawn)
        return contexts

    def construct_requests(self, doc: dict[str, Any], ctx: str | list[str], **kwargs: Any) -> Any:
        """As in the base class; for a vote, one request for each prompt."""
        if self.OUTPUT_TYPE != "generate_until" or isinstance(ctx, str):
            return super().construct_requests(doc, ctx, **kwargs)
        requests = [super(TTTTask, self).construct_requests(doc, prompt, **kwargs) for prompt in ctx]
        for index, request in enumerate(requests):
            request.idx = index
        return requests

    def process_results(self, doc: dict[str, Any], results: list[Any]) -> dict[str, Any]:
        """As in the base class; for a vote, of the answer that most prompts led to."""
        if len(results) > 1 and self.OUTPUT_TYPE == "generate_until":
            results = [vote(results)]
        return super().process_results(doc, results)

    def doc_to_text(self, doc: dict[str, Any], doc_to_text: Any = None) -> Any:
        """As in the base class, but a demonstration is rendered once and not for every prompt."""
        return self._once("text", doc, super().doc_to_text, doc_to_text)

    def doc_to_target(self, doc: Mapping[str, Any], doc_to_target: Any = None) -> Any:
        """As in the base class, but a demonstration is rendered once and not for every prompt."""
        return self._once("target", doc, super().doc_to_target, doc_to_target)

    def _once(self, part: str, doc: Mapping[str, Any], render: Callable[..., Any], template: Any) -> Any:
        sampler = getattr(self, "sampler", None)  # not there yet while the base class is constructed
        if sampler is None or not any(doc is demonstration for demonstration in sampler.df):
            return render(doc, template)
        key = (part, id(doc))
        if key not in self._rendered:
            self._rendered[key] = render(doc, template)
        return self._rendered[key]

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
        """As in the base class; each request then carries `support_set`, and `choices` where the metadata has them."""
        super().build_all_requests(**kwargs)
        support = self.support_set(kwargs.get("system_instruction"))
        for instance in self.instances:
            instance.support_set = support
            instance.choices = (self.config.metadata or {}).get("choices")


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
