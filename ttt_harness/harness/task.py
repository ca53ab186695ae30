"""`TTTTask`: an lm-eval task that draws its demonstrations once and sends them along with every request.

A YAML becomes a TTT task by `class: !function ttt_harness.TTTTask`. Prompts, filters and metrics are lm-eval's own, so
that any of its models runs the task unchanged; `ttt_vllm` also reads the support set that each request carries.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.samplers import ContextSampler
from lm_eval.api.task import ConfigurableTask
from lm_eval.api.utils import maybe_delimit

from ttt_harness.config import TaskSettings
from ttt_harness.data.sequences import permutations
from ttt_harness.data.support import Chat, Demonstration, SupportSet
from ttt_harness.errors import ConfigError, DataError
from ttt_harness.harness import declaration, preflight, rows, selection
from ttt_harness.harness.aggregation import Aggregations
from ttt_harness.harness.drawing import Drawing, Splits, listed_samples
from ttt_harness.harness.fields import Fields, is_null
from ttt_harness.harness.filters import vote
from ttt_harness.harness.scoring import Scoring, no_score
from ttt_harness.harness.user_code import Row, own_words, printable, shown, user_code
from ttt_harness.methods import METHODS
from ttt_harness.serving.generation import greedy_unless_sampled
from ttt_harness.stated import is_stated_seed, stated_keys

Doc = Mapping[str, Any]


class DrawnSampler(ContextSampler):
    """Gives every question the same demonstrations, in drawn order."""

    def sample(self, n: int, eval_doc: Any = None, df: Any = None, **_: Any) -> Sequence[Any]:  # noqa: ARG002
        """The first `n`, even where the question is one of them: that is `TTTTask`'s to refuse."""
        return self.df[:n]


class TTTTask(ConfigurableTask):
    """A task whose few-shot examples are k demonstrations, the same for every question.

    The demonstrations are, in this order of precedence,

    - those listed in the YAML (`fewshot_config.samples`), in their order, unless a k is stated;
    - k of the few-shot split, else of the training split, else of a validation split that is not evaluated: drawn with
      the seed, or the first k where the YAML says `sampler: first_n`. All of the evaluated split is evaluated;
    - k of the evaluated split, drawn with the seed and taken out of it: `random.Random(seed).shuffle` on the examples
      in file order; the first k are the demonstrations, in that order, the rest is evaluated, in that order.

    Where no k is stated it is the number of listed demonstrations, else the YAML's `num_fewshot`, else 10. Of lm-eval's
    command line, `--num_fewshot` is k and the few-shot part of `--seed` is the seed. `process_docs` comes before the
    drawing. The metadata keys are those of `TaskSettings`.

    Attributes:
        where: the task and its YAML, as messages name it.

    Raises:
        ConfigError: the YAML declares something that is not allowed, or a metadata key has such a value.
        DataError: the data set cannot be found or read, or does not hold what the YAML says.
    """

    def __init__(
        self,
        data_dir: str | None = None,
        cache_dir: str | None = None,
        download_mode: Any = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        config = dict(config or {})
        declaration.check(config)
        config = {key: value for key, value in config.items() if key not in declaration.STRUCTURE_KEYS}
        self.where = declaration.where(config)
        self._folder = declaration.folder_of(config)
        metadata = config.get("metadata") or {}
        self._stated = stated_keys(metadata)
        self._listed = None if "k" in metadata else listed_samples(self.where, config)
        self.settings = self._settle(config, metadata)
        self._scoring = Scoring()
        self._check_prompts(config)
        # An end-to-end fit teaches the task without demonstrations, and is asked without.
        method = METHODS.get(str(metadata.get("method")))
        self._zero_shot = method is not None and not method.prompts_hold_demonstrations
        config["num_fewshot"] = self._shots
        if self.settings.generation_budget == "published":
            config["generation_kwargs"] = self._published_budget(config, metadata)
        # Until the base class has read the first row:
        self.prompt: Any = None
        self._fields: Fields | None = None
        self._constructed = False
        self._construct(data_dir, cache_dir, download_mode, config)
        declaration.check_metrics(self.where, self._metric_fn_list, config)
        if self.prompt is None:
            declaration.check_columns(self.where, config, self.features)
        self._constructed = True
        self._take(self._drawing)

    @property
    def _shots(self) -> int:
        """How many demonstrations a prompt holds."""
        return 0 if self._zero_shot else self.settings.k - self.settings.leave_one_out

    def _take(self, drawing: Drawing) -> None:
        """Ask with these demonstrations, and state in the results where they come from."""
        self._drawing = drawing
        self._rendered: dict[tuple[str, int], Any] = {}
        self.sampler = DrawnSampler(drawing.demonstrations)
        self._support = self._read_demonstrations()
        self._refuse_overlap()
        self.config.metadata = {
            **(self.config.metadata or {}),
            "k": len(drawing.demonstrations),
            "k_from": self._origins["k"],
            "seed": self.settings.seed,
            "seed_from": self._origins["seed"],
            "demonstrations": self.drawn_from,
        }

    def _construct(self, *arguments: Any) -> None:
        """Have the base class load the data and try the first row."""
        with user_code(self.where, "its declaration"):
            try:
                super().__init__(*arguments)
            except IndexError:  # of a label of the first row that is the number of no choice
                preflight.check_rows(self, islice(self._drawing.rows(), 1))
                raise

    # What the YAML says

    def _settle(self, config: Mapping[str, Any], metadata: Mapping[str, Any]) -> TaskSettings:
        """The settings that the YAML and the command line make; notes where k and the seed come from."""
        with user_code(self.where, "its metadata"):
            TaskSettings.refuse_misspelt(metadata)
            settings = TaskSettings.from_mapping(metadata)
        self._origins = {
            key: "the command line" if key in self._stated else "the metadata" if key in metadata else "the default"
            for key in ("k", "seed")
        }
        shots = len(self._listed) if self._listed else config.get("num_fewshot")
        if "k" in metadata or shots is None:
            return settings
        self._origins["k"] = "fewshot_config.samples" if self._listed else "the YAML's num_fewshot"
        return replace(settings, k=shots)

    # What lm-eval's command line says, after construction

    def get_config(self, key: str) -> Any:
        """As in the base class. lm-eval asks for `num_fewshot`, to leave a 0 as it is and never to set another number.

        It is 0 in the prompts of an end-to-end run as well, which `--num_fewshot` gives demonstrations to learn from.
        """
        return None if key == "num_fewshot" and self._zero_shot and self.settings.k else super().get_config(key)

    def set_config(self, key: str, value: Any, update: bool = False) -> None:
        """As in the base class; `--num_fewshot` is k, and 0 leaves the demonstrations out of the prompts.

        A budget in `--gen_kwargs` takes the place of the YAML's under any of its names, of which lm-eval would take the
        one that comes first in an order of its own.

        Raises:
            ConfigError: `k=` says another number, or there are not so many demonstrations.
        """
        if key == "generation_kwargs" and update and set(preflight.BUDGETS) & set(value):
            for name in preflight.BUDGETS:
                (self.config.generation_kwargs or {}).pop(name, None)
        if key == "num_fewshot" and value != 0:
            self._set_k(value)
            value = self._shots
        super().set_config(key, value, update)

    def _set_k(self, k: Any) -> None:
        self._refuse_contradiction("--num_fewshot", "k", k)
        if self._listed and isinstance(k, int) and k > len(self._listed):
            raise ConfigError(
                f"--num_fewshot {shown(k)} is not allowed for {self.where}, which lists {len(self._listed)} "
                "demonstrations (fewshot_config.samples); use fewer, or k= to have them drawn from the data."
            )
        self._draw("--num_fewshot", k=k)

    def set_fewshot_seed(self, seed: int | None = None) -> None:
        """As in the base class; a seed that the user gave (`--seed`, `fewshot_random_seed`) draws the demonstrations.

        Raises:
            ConfigError: `seed=` says another one.
        """
        super().set_fewshot_seed(seed)
        if is_stated_seed(seed):
            self._refuse_contradiction("--seed", "seed", seed)
            self._draw("--seed", seed=seed)

    def _refuse_contradiction(self, option: str, key: str, value: Any) -> None:
        given = getattr(self.settings, key)
        if key in self._stated and given != value:
            raise ConfigError(
                f"{option} {shown(value)} and {key}={given} are both given for {self.where}, and mean the same; give "
                "one of them, or the same value."
            )

    def _draw(self, origin: str, **changed: Any) -> None:
        """Draw the demonstrations again, with other settings."""
        with user_code(self.where, origin):
            self.settings = replace(self.settings, **changed)
        self._origins |= dict.fromkeys(changed, origin)
        self._check_prompts({"output_type": self.OUTPUT_TYPE})
        self._take(self._splits.draw(self.settings, self._listed))

    def _check_prompts(self, config: Mapping[str, Any]) -> None:
        settings = self.settings
        if settings.leave_one_out and settings.k < 2:
            raise ConfigError(
                f"leave_one_out=true is not allowed for {self.where} with k={settings.k}: "
                "it takes one demonstration out of the prompt, and one has to stay; set k to at least 2."
            )
        if settings.vote_permutations > 1 and config.get("output_type", "generate_until") != "generate_until":
            raise ConfigError(
                f"vote_permutations={settings.vote_permutations} is not allowed for {self.where}: "
                "a vote is taken among generated answers (output_type generate_until); leave it at 1."
            )

    def _published_budget(self, config: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, Any]:
        if "published_max_gen_toks" not in metadata:
            raise ConfigError(
                f"generation_budget=published: {self.where} has no published budget "
                "(metadata key published_max_gen_toks); leave generation_budget=full."
            )
        return {**(config.get("generation_kwargs") or {}), "max_gen_toks": metadata["published_max_gen_toks"]}

    # The data

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Load the data set, and choose the demonstrations and what is evaluated."""
        if callable(self.config.custom_dataset):
            # As in the base class, without its warning about --metadata for each of 27 tasks.
            with user_code(self.where, "custom_dataset"):
                self.dataset = self.config.custom_dataset(**{**(self.config.metadata or {}), **(dataset_kwargs or {})})
        else:
            self._load(dict(dataset_kwargs or {}), **kwargs)
        if not isinstance(self.dataset, Mapping):
            raise DataError(
                f"{self.where}: the data set is one {type(self.dataset).__name__} and not several splits; take 'split' "
                "out of dataset_kwargs, or have custom_dataset return {'test': ...}."
            )
        self._splits = Splits(self.where, self.dataset, self.config)
        if not (self.config.test_split or self.config.validation_split):
            self.config.test_split = self._splits.evaluated
        self._drawing = self._splits.draw(self.settings, self._listed)

    @property
    def drawn_from(self) -> str:
        """Where the demonstrations come from, in words; results state it as metadata."""
        return self._drawing.source

    def _load(self, dataset_kwargs: dict[str, Any], **kwargs: Any) -> None:
        for key in ("data_files", "data_dir"):
            if key in dataset_kwargs:
                dataset_kwargs[key] = declaration.find_beside(dataset_kwargs[key], self._folder)
        path = self.config.dataset_path
        if path is None:
            raise ConfigError(f"{self.where} has no data set; add dataset_path (or custom_dataset).")
        if "/" in path:
            self.DATASET_PATH = declaration.find_beside(path, self._folder)
        try:
            super().download(dataset_kwargs, **kwargs)
        # The failures of `datasets` and the hub's client share no base class: no file, a damaged one, no network.
        except Exception as error:
            why = own_words(error)
            why = "it has no rows" if why == "StopIteration" else why
            raise DataError(
                f"{self.where}: the data set {printable(path)} could not be loaded ({why}); check "
                "dataset_path, dataset_name and dataset_kwargs, and for the hub's data the network."
            ) from error

    def fewshot_docs(self) -> list[Row]:
        """The demonstrations, in their order."""
        return self._drawing.demonstrations

    def _row(self, doc: Doc) -> Row:
        """A row as messages name it. Of those that are none the base class tries the first that is evaluated."""
        return doc if isinstance(doc, Row) else Row(doc, self._drawing.split, self._drawing.numbers[0])

    def test_docs(self) -> Any:
        """What is evaluated, if that is the test split."""
        return self._drawing.evaluated if self.has_test_docs() else None

    def validation_docs(self) -> Any:
        """What is evaluated, if that is the validation split."""
        return super().validation_docs() if self.has_test_docs() else self._drawing.evaluated

    def _refuse_overlap(self) -> None:
        """Refuse demonstrations that are evaluated too: the same question with the same answer."""
        if self.settings.overlap == "allow" or self._drawing.alone or not self._drawing.demonstrations:
            return
        asked: dict[str, set[str]] = defaultdict(set)
        for doc, (_, pair) in zip(self._drawing.demonstrations, self._support, strict=True):
            try:
                question, target = self._asked(doc), self.doc_to_target(doc)
            except DataError:  # listed samples need only have what their own templates ask for
                question, target = pair.turn, pair.answer
            asked[str(question)].add(str(target))
        found = set()
        for doc in self._drawing.rows():
            try:
                question = str(self._asked(doc))
                if question in asked and (target := str(self.doc_to_target(doc))) in asked[question]:
                    found.add((question, target))
            except DataError:  # a row that cannot be read is refused if it is among those that are asked
                continue
        if found:
            drawn, evaluated = len(self._drawing.demonstrations), len(self._drawing.evaluated)
            raise DataError(
                f"{self.where}: {len(found)} of {drawn} demonstrations ({self.drawn_from}) are also among the "
                f"{evaluated} examples that are evaluated, so that their answers are given away; take them out of the "
                "data, or set the metadata key overlap to allow."
            )

    def _asked(self, doc: Doc) -> Any:
        """What tells one question from another."""
        return [self.doc_to_text(doc), *self.doc_to_choice(doc)] if self.multiple_input else self.doc_to_text(doc)

    # Prompts and requests

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

    def doc_to_text(self, doc: Doc, doc_to_text: Any = None) -> Any:
        """As in the base class, but a demonstration is rendered once and not for every prompt."""
        return self._once("text", doc, self._question, self._source("doc_to_text", doc_to_text))

    def _question(self, doc: Doc, source: Any) -> Any:
        with user_code(self.where, "doc_to_text", self._row(doc)):
            if not isinstance(source, str):
                return super().doc_to_text(doc, source)
            question = self.fields.question(source, doc)
        # Digits are the number of a choice only where lm-eval found that they are, in the first row.
        printed = isinstance(question, int) and source not in self.fields.columns
        return str(question) if printed and self._constructed and not self.multiple_input else question

    def doc_to_target(self, doc: Doc, doc_to_target: Any = None) -> Any:
        """As in the base class, but a demonstration is rendered once, a null is None, and a number is a text.

        Tables hold numbers; lm-eval takes one for the number of a choice, and stops where there are no choices.
        """
        target = self._once("target", doc, self._target, self._source("doc_to_target", doc_to_target))
        if self.config.doc_to_choice is None and isinstance(target, (int, float)):
            return str(target)
        return target

    def _target(self, doc: Doc, source: Any) -> Any:
        with user_code(self.where, "doc_to_target", self._row(doc)):
            target = self.fields.target(source, doc) if isinstance(source, str) else super().doc_to_target(doc, source)
        return None if is_null(target) else target

    def doc_to_choice(self, doc: Doc, doc_to_choice: Any = None) -> list[str]:
        """As in the base class, but nothing other than a list of texts is let through.

        Raises:
            DataError: the choices are something else, or one of them is empty.
        """
        return self._once("choices", doc, self._choices, self._source("doc_to_choice", doc_to_choice))

    def _choices(self, doc: Doc, source: Any) -> list[str]:
        with user_code(self.where, "doc_to_choice", self._row(doc)):
            choices = (
                self.fields.choices(source, doc) if isinstance(source, str) else super().doc_to_choice(doc, source)
            )
        if problem := rows.choices_problem(self._row(doc).place, choices, source):
            raise DataError(f"{self.where}: {problem}.")
        return list(choices)

    def _source(self, name: str, given: Any) -> Any:
        """What a field is read with: a prompt of a library, an override for demonstrations, or the YAML's key."""
        if self.prompt is not None:
            return self.prompt
        return getattr(self.config, name) if given is None else given

    @property
    def fields(self) -> Fields:
        """Reads the rows' fields."""
        if self._fields is None:
            self._fields = Fields(self.features, numbered=self.config.doc_to_choice is not None)
        return self._fields

    def doc_to_prefix(self, doc: Doc) -> str | None:
        """The beginning of the answer that the prompt ends with, if there is one."""
        return self.resolve_field(doc, self.config.gen_prefix)

    def resolve_field(self, doc: Doc, field: str | None = None) -> str | None:  # type: ignore[override]
        """A column, or what a template prints: for the description and for the beginning of an answer."""
        if not field:
            return None
        with user_code(self.where, f"the template {shown(field)}", self._row(doc)):
            text = doc[field] if field in doc else self.fields.text(field, doc)
        if text is not None and not isinstance(text, str):
            raise DataError(
                f"{self.where}: {shown(field)} is {shown(text)} for {self._row(doc).place}, where a text belongs "
                "before a question or an answer; print it as one, or name another column."
            )
        return text

    def build_qa_turn(self, *, c: list[str] | None = None, a: Any = None, **pieces: Any) -> list[Any]:
        """As in the base class; of several right choices the first, as it is of several right texts."""
        if c and isinstance(a, list) and a and isinstance(a[0], int):
            a = a[0]
        return super().build_qa_turn(c=c, a=a, **pieces)

    def _once(self, part: str, doc: Doc, render: Callable[..., Any], template: Any) -> Any:
        sampler = getattr(self, "sampler", None)  # not there yet while the base class is constructed
        if sampler is None or not any(doc is demonstration for demonstration in sampler.df):
            return render(doc, template)
        key = (f"{part} {template!r}", id(doc))
        if key not in self._rendered:
            self._rendered[key] = render(doc, template)
        return self._rendered[key]

    def _read_demonstrations(self) -> list[tuple[str, Demonstration]]:
        """Each demonstration, and the description before it, in the pieces that `fewshot_context` makes a prompt of."""
        # An end-to-end fit is asked as a question is, and not as a demonstration.
        form = self.config if self._zero_shot else self.fewshot_cfg
        read = []
        for doc in self._drawing.demonstrations:
            question = self.doc_to_text(doc, form.doc_to_text)
            choices = self.doc_to_choice(doc, form.doc_to_choice) if form.doc_to_choice else None
            target = self.doc_to_target(doc, form.doc_to_target)
            self._check_pair(doc, question, choices, target)
            if self.multiple_input and choices:
                question, choices = choices[question], None
            prefix = self.resolve_field(doc, form.gen_prefix) or ""
            # Of a loglikelihood task lm-eval scores the target as it is, straight after the question.
            joined = self._zero_shot and self.OUTPUT_TYPE == "loglikelihood"
            asked, reply = self.build_qa_turn(
                q=question,
                c=choices,
                a=target,
                gen_prefix=prefix,
                tgt_delim="" if joined else form.target_delimiter,
                few_delim=self.fewshot_cfg.fewshot_delimiter,
            )
            answer = reply.content[len(prefix) :].lstrip() if prefix else reply.content
            prefix = reply.content.removesuffix(answer)
            if not answer.strip():
                self._refuse_missing(doc)
            pieces = Demonstration(
                question=asked.to_text() + prefix,
                answer=answer,
                ending=self.fewshot_cfg.fewshot_delimiter,
                turn=asked.content,
                prefix=prefix,
            )
            read.append((self.resolve_field(doc, self.config.description) or "", pieces))
        return read

    def _check_pair(self, doc: Row, question: Any, choices: Any, target: Any) -> None:
        if rows.has_no_answer(target):
            self._refuse_missing(doc)
        place, numbered = doc.place, bool(self.multiple_input)
        problem = rows.question_problem(place, question, choices, numbered=numbered) or rows.target_problem(
            place, target, choices, "multiple_choice" if choices else "generate_until", numbered=numbered
        )
        if problem:
            raise DataError(f"{self.where}: {problem}.")

    def _refuse_missing(self, demonstration: Row) -> None:
        """Refuse a demonstration without an answer, and name the other such rows."""
        missing = [demonstration]
        for row in (*self._drawing.demonstrations, *self._drawing.rows()):
            if row is not demonstration:
                with suppress(DataError):  # of another row, or of listed samples that are read in another way
                    missing += [row] if rows.has_no_answer(self.doc_to_target(row)) else []
        raise DataError(f"{self.where}: there is no answer to fit on: {rows.without_answers(missing)}.")

    def support_set(
        self,
        system_instruction: str | None = None,
        apply_chat_template: bool = False,
        fewshot_as_multiturn: bool = False,
    ) -> SupportSet:
        """The demonstrations in drawn order, in the pieces of text of which lm-eval makes a prompt."""
        delimiter = self.config.fewshot_delimiter
        heads = [maybe_delimit(system_instruction, head, delimiter) for head, _ in self._support]
        pairs = [pair for _, pair in self._support]
        if len(set(heads)) > 1:
            pairs = [replace(pair, description=head) for pair, head in zip(pairs, heads, strict=True)]
        chat: Chat | None = None
        if apply_chat_template:
            chat = "multiturn" if fewshot_as_multiturn else "singleturn"
        return SupportSet(heads[0] if heads else "", tuple(pairs), chat, self.where)

    def doc_iterator(
        self, *, rank: int = 0, limit: int | None = None, world_size: int = 1, samples: list[int] | None = None
    ) -> Iterator[tuple[int, Row]]:
        """The evaluated rows with their numbers, as in the base class; samples come in the order in which they stand.

        lm-eval looks their numbers up in that order, and its own class gives them in ascending order.
        """
        chosen = self._drawing.rows(samples) if samples else islice(self._drawing.rows(), limit or None)
        return islice(enumerate(chosen), rank, None, world_size)

    def check_samples(self, samples: Any) -> None:
        """Refuse a list of `--samples` that does not name rows of this task.

        Raises:
            ConfigError: as for `selection.check_samples`.
        """
        selection.check_samples(samples, len(self._drawing.evaluated), self.where)

    def build_all_requests(self, **kwargs: Any) -> None:
        """As in the base class, after a check of all that is evaluated; made-up answers are scored as well.

        Each request then carries `support_set`, and `choices` where the metadata has them.

        Raises:
            ConfigError: requests are to be cached, `--limit` or `--samples` select nothing, or the chat template cannot
                take the task's turns.
            DataError: a row is not what the task's kind needs, or something of the task raises an error.
        """
        if kwargs.get("cache_requests"):
            raise ConfigError(
                f"--cache_requests is not allowed for {self.where}: lm-eval's cache knows neither the seed nor the "
                "demonstrations; leave it out."
            )
        limit, samples = kwargs.get("limit"), kwargs.get("samples")
        selection.check_limit(limit)
        if samples is not None:
            self.check_samples(samples)
        if self.OUTPUT_TYPE == "generate_until":  # here, since the command line's arguments come after construction
            arguments = greedy_unless_sampled(self.config.generation_kwargs or {}, self.where)
            preflight.check_ends(self.where, arguments)
            self.config.generation_kwargs = arguments
        selected = {key: kwargs[key] for key in ("rank", "world_size") if key in kwargs}
        preflight.check_rows(self, (row for _, row in self.doc_iterator(limit=limit, samples=samples, **selected)))
        with user_code(self.where, "building its prompts"):
            super().build_all_requests(**kwargs)
        preflight.try_scoring(self)
        options = ("system_instruction", "apply_chat_template", "fewshot_as_multiturn")
        support = self.support_set(**{name: kwargs[name] for name in options if name in kwargs})
        for instance in self.instances:
            instance.support_set = support
            instance.choices = (self.config.metadata or {}).get("choices")

    # Scoring

    @property
    def metric_names(self) -> list[str]:
        """The metrics that the YAML lists, or lm-eval's for the output type."""
        return list(self._metric_fn_list)

    def apply_filters(self) -> None:
        """As in the base class, but what a filter raises is one sentence."""
        self._scoring.begin()
        with self._scoring.attempt():
            self.filter_answers(self.instances)
        if self._scoring.failed:
            for instance in self.instances:
                instance.filtered_resps = {}  # of which lm-eval scores nothing

    def filter_answers(self, instances: list[Instance]) -> None:
        """Apply the task's filters to the answers of `instances`.

        Raises:
            DataError: a filter raises something, or returns too few answers.
        """
        for pipeline in self._filters:
            with user_code(self.where, f"the filter '{pipeline.name}' of filter_list"):
                pipeline.apply(instances)
            if lost := [instance for instance in instances if pipeline.name not in instance.filtered_resps]:
                raise DataError(
                    f"{self.where}: the filter '{pipeline.name}' of filter_list returns answers to "
                    f"{len(instances) - len(lost)} of {len(instances)} requests; have it return one entry for each."
                )

    def process_results(self, doc: dict[str, Any], results: list[Any]) -> dict[str, Any]:
        """As in the base class; for a vote, of the answer that most prompts led to.

        Raises:
            DataError: scoring raises something, or gives no mapping of metrics to scores. Of answers that a model has
                given, lm-eval's command tells it at the end.
        """
        if not self._scoring.failed:
            with self._scoring.attempt():
                return self._scores(doc, results)
        return {}

    def _scores(self, doc: dict[str, Any], results: list[Any]) -> dict[str, Any]:
        own = callable(self.config.process_results)
        what = "process_results" if own else f"scoring with {', '.join(self.metric_names)}"
        with user_code(self.where, f"{what}, given {shown(results)},", self._row(doc)):
            if len(results) > 1 and self.OUTPUT_TYPE == "generate_until":
                results = [vote(results)]
            scores = super().process_results(doc, results)
        if not (isinstance(scores, Mapping) and all(isinstance(metric, str) for metric in scores)):
            raise DataError(
                f"{self.where}: {what} gives {shown(scores)} for {self._row(doc).place}, and no mapping of metrics to "
                'scores; have it return one, e.g. {"acc": 1.0}.'
            )
        return dict(scores)

    def aggregation(self) -> dict[str, Any]:
        """As in the base class, but what an aggregation raises is one sentence."""
        if self._scoring.failed:
            return defaultdict(lambda: no_score)
        return Aggregations(super().aggregation(), self.where, self._scoring)


def has_support_set(request: Instance) -> bool:
    """Whether a request comes from a TTT task."""
    return getattr(request, "support_set", None) is not None


def support_set_of(request: Instance) -> SupportSet:
    """The support set that a request carries.

    Raises:
        DataError: the request's task is not a TTT task.
    """
    if not has_support_set(request):
        raise DataError(
            f"{request.task_name} is not a TTT task; evaluate it with the base model (on_plain_task=base), or write "
            f"these three lines into a YAML, name its folder with --include_path, and run {request.task_name}_ttt:\n"
            f"{declaration.three_lines(str(request.task_name))}"
        )
    return request.support_set
