"""Asks a held-out demonstration as a question, and judges whether the model's answer is right.

lm-eval's own task makes the prompt and the requests, with the other demonstrations before the question, as for an
evaluated question. The model does not generate. One forward pass over the prompt and the right answer gives the
likeliest token at each position of the answer:

- `generate_until`: greedy decoding follows the right answer up to the first position where another token is likelier,
  and writes that token. So the beginning of its output is known. The output is right if the known part contains its end
  (a stop sequence, an end token or the budget) or extends beyond the right answer, and if the task's filters turn it
  into the same result as the right answer. If a filter reads only the first word, later text does not matter; without
  such a filter the output must stop where it should. An answer that is right in other tokens or other words counts as
  wrong.
- `multiple_choice` and `loglikelihood`: the log-likelihoods of the choices go through the task's own scoring.
"""

import copy
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ttt_harness.data.sequences import TrainingSequence
from ttt_harness.data.support import SupportSet, in_context_text
from ttt_harness.errors import ConfigError
from ttt_harness.tuned import Asked

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from ttt_harness.harness.task import TTTTask
    from ttt_harness.serving.answering import Answering
    from ttt_harness.sweep.loading import Chat

# Forced behind an answer and what ends it: enough to see a stop sequence that begins there.
TOKENS_BEHIND = 8
# Of a prompt, so that the first token of an answer is written as it is behind others.
TOKENS_BEFORE = 8


class Predictions(Protocol):
    """What the model says of the tokens in a loss mask (`ttt_harness.training.trainer.Predictions`)."""

    @property
    def log_probabilities(self) -> tuple[float, ...]:
        """Of the tokens."""

    @property
    def likeliest(self) -> tuple[int, ...]:
        """The likeliest token in the place of each."""


@dataclass(frozen=True)
class Question:
    """A held-out demonstration, asked after the others in one order.

    asked: which, and in which order.
    sequences: what the model has to read; the tokens of answers are in the loss masks.
    is_right: whether it answers rightly, by what it says of each sequence.
    """

    asked: Asked
    sequences: tuple[TrainingSequence, ...]
    is_right: Callable[[Sequence[Predictions]], bool]

    @property
    def identity(self) -> str:
        """What tells the question from others, in any search."""
        return json.dumps([str(self.asked), [(one.tokens, one.loss_mask) for one in self.sequences]])


@dataclass(frozen=True)
class Asker:
    """Makes questions of a task's demonstrations.

    task: with all k demonstrations.
    support: the same, as texts.
    answering: tokenizes as a run does.
    chat: how prompts are made.
    """

    task: "TTTTask"
    support: SupportSet
    answering: "Answering"
    chat: "Chat"

    def question(self, asked: Asked, order: Sequence[int]) -> Question:
        """Ask the demonstration `asked.demonstration` after those at the places `order`.

        Raises:
            DataError: it cannot be asked as a question.
            ConfigError: the task's scores do not say whether an answer is right.
        """
        instances = self.requests(asked.demonstration, order)
        if self.task.OUTPUT_TYPE == "generate_until":
            return self._generated(asked, order, instances[0])
        return self._chosen(asked, instances)

    def requests(self, held_out: int, order: Sequence[int]) -> "list[Instance]":
        """lm-eval's requests for a demonstration, after the others in this order."""
        documents = self.task.fewshot_docs()
        document = copy.deepcopy(documents[held_out])
        template = self.answering.apply_chat_template if self.chat.apply_chat_template else None
        drawn = self.task.sampler.df
        self.task.sampler.replace_df([documents[place] for place in order])
        try:
            prompt = self.task.fewshot_context(
                document,
                len(order),
                **self.chat.options(),
                chat_template=template,
                gen_prefix=self.task.doc_to_prefix(document),
            )
        finally:
            self.task.sampler.replace_df(drawn)
        made = self.task.construct_requests(
            document,
            prompt,
            metadata=(self.task.config.task, held_out, 1),
            apply_chat_template=self.chat.apply_chat_template,
            chat_template=template,
        )
        return made if isinstance(made, list) else [made]

    # Generated answers

    def _generated(self, asked: Asked, order: Sequence[int], instance: "Instance") -> Question:
        prompt, arguments = instance.args
        self.answering.check("generate_until", [instance], fitted=True)
        answer, behind = self._answer(prompt, order, asked.demonstration)
        before = list(self.answering.encode(prompt)[0])
        forced = self._forced(prompt, before, answer, behind)
        written = _Written(self.answering.tokenizer, before[-TOKENS_BEFORE:])
        _, until, budget = self.answering.modify_gen_kwargs(
            dict(arguments), eos=None, default_max_gen_toks=self.answering.max_gen_toks
        )
        ends = _end_tokens(self.answering)
        wanted = self._filtered(instance, answer)

        def is_right(predictions: Sequence[Predictions]) -> bool:
            text, is_whole = begin_of_greedy(
                forced, predictions[0].likeliest, written=written, until=until, ends=ends, budget=budget
            )
            goes_on_behind = len(text.rstrip()) > len(answer.rstrip()) and text.startswith(answer.rstrip())
            return (is_whole or goes_on_behind) and self._filtered(instance, text) == wanted

        tokens = (*before, *forced)
        mask = (False,) * len(before) + (True,) * len(forced)
        return Question(asked, (TrainingSequence(tokens, mask),), is_right)

    def _answer(self, prompt: str, order: Sequence[int], held_out: int) -> tuple[str, str]:
        """The right answer as it stands behind the prompt, and what stands behind it there."""
        demonstration = self.support.demonstrations[held_out]
        if self.chat.apply_chat_template:
            return demonstration.answer, ""
        whole = in_context_text(self.support, [*order, held_out])
        if whole.text.startswith(prompt):
            end = whole.targets[-1][1]
            return whole.text[len(prompt) : end], whole.text[end:] + whole.continuation
        # The demonstrations have a form of their own, and questions another.
        return str(self.task.config.target_delimiter) + demonstration.answer, demonstration.ending

    def _forced(self, prompt: str, before: Sequence[int], answer: str, behind: str) -> tuple[int, ...]:
        """The tokens of the right answer and of what stands behind it; an end token last, for the place behind all."""
        ids, offsets = self.answering.encode(prompt + answer + behind)
        at = len(prompt) + len(answer)
        if list(ids[: len(before)]) != list(before):  # a token would join the prompt to the answer
            encoded = self.answering.tokenizer(answer + behind, add_special_tokens=False, return_offsets_mapping=True)
            ids, offsets, before, at = encoded.input_ids, encoded.offset_mapping, [], len(answer)
        count = next((index for index, (first, _) in enumerate(offsets) if first >= at and index), len(ids))
        kept = ids[len(before) : max(count, len(before)) + TOKENS_BEHIND]
        return (*kept, self.answering.eot_token_id or 0)

    def _filtered(self, instance: "Instance", text: str) -> Any:
        """What the task's first filter makes of an answer, which is what is scored."""
        from lm_eval.api.instance import Instance

        answered = Instance("generate_until", copy.deepcopy(instance.doc), instance.arguments, 0, instance.metadata)
        answered.resps = [text]
        self.task.filter_answers([answered])
        found = next(iter(answered.filtered_resps.values()))
        return found.strip() if isinstance(found, str) else found

    # Scored answers

    def _chosen(self, asked: Asked, instances: "Sequence[Instance]") -> Question:
        sequences = []
        self.answering.check("loglikelihood", list(instances), fitted=True)
        for instance in instances:
            context, continuation = instance.args
            if context:
                before, after = self.answering._encode_pair(context, continuation)
            else:
                before, after = [self.answering.prefix_token_id], self.answering.tok_encode(continuation)
            tokens = (*before, *after)
            sequences.append(TrainingSequence(tokens, (False,) * len(before) + (True,) * len(after)))
        document = instances[0].doc

        def is_right(predictions: Sequence[Predictions]) -> bool:
            results = []
            for sequence, prediction in zip(sequences, predictions, strict=True):
                targets = tuple(t for t, wanted in zip(sequence.tokens, sequence.loss_mask, strict=True) if wanted)
                results.append((sum(prediction.log_probabilities), prediction.likeliest == targets))
            return self._score(document, results)

        self._score(document, [(-1.0 - number, False) for number in range(len(sequences))])
        return Question(asked, tuple(sequences), is_right)

    def _score(self, document: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> bool:
        """Whether the task's own scoring calls the likeliest choice right: by `acc`, or else by its first metric.

        Raises:
            ConfigError: there is no metric that says so.
        """
        scores = self.task.process_results(copy.deepcopy(dict(document)), list(results))
        for metric in ("acc", *self.task.metric_names):
            if metric in scores and scores[metric] in (0, 1):
                return bool(scores[metric])
        raise ConfigError(
            f"{self.task.where} cannot be tuned: none of its metrics ({', '.join(self.task.metric_names)}) says of an "
            "answer whether it is right; leave the task out, or give it the metric acc."
        )


def begin_of_greedy(
    forced: Sequence[int],
    likeliest: Sequence[int],
    *,
    written: Callable[[Sequence[int]], str],
    until: Sequence[str],
    ends: Collection[int],
    budget: int,
) -> tuple[str, bool]:
    """The beginning of a greedy answer, as far as one forward pass over other tokens tells it.

    Args:
        forced: the tokens that the model has read, [tokens].
        likeliest: the likeliest token in the place of each, [tokens].
        written: the text of tokens behind the prompt.
        until: texts at which an answer stops, which are not part of it.
        ends: tokens at which it stops.
        budget: the most tokens that it has.

    Returns:
        The text, and whether it is all of the answer.
    """
    same = next((place for place, pair in enumerate(zip(forced, likeliest, strict=True)) if pair[0] != pair[1]), None)
    known = list(likeliest if same is None else likeliest[: same + 1])
    stop = next((place for place, token in enumerate(known) if token in ends), None)
    is_whole = stop is not None or len(known) >= budget
    known = known[: budget if stop is None else min(stop, budget)]
    text = written(known)
    found = [place for place in (text.find(end) for end in until if end) if place >= 0]
    return (text[: min(found)], True) if found else (text, is_whole)


@dataclass(frozen=True)
class _Written:
    """The text of tokens behind a prompt, of which the last tokens are `before`."""

    tokenizer: Any
    before: Sequence[int]

    def __call__(self, tokens: Sequence[int]) -> str:
        start = self._decoded(self.before)
        return self._decoded([*self.before, *tokens])[len(start) :]

    def _decoded(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _end_tokens(answering: "Answering") -> set[int]:
    """The tokens at which vLLM ends an answer: the tokenizer's, and those of the model's generation_config.json."""
    stated = answering.model.config.model_config.try_get_generation_config().get("eos_token_id")
    listed = stated if isinstance(stated, list) else [stated]
    return {token for token in (answering.eot_token_id, *listed) if token is not None}
