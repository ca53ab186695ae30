"""`RandomGuess`: answers uniformly among a task's choices; known to lm-eval as `ttt_random`.

The choices are the task's metadata key `choices`, which `TTTTask` attaches to every request. A task without them has
free-form answers, and is answered with an empty text, which counts as wrong: the published random figures take such
tasks for 0. No model is loaded.
"""

import random
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from ttt_harness.config import TaskSettings
from ttt_harness.harness import results


class RandomGuess(LM):
    """Guesses with a seed. Each task has its own random numbers, whichever tasks run beside it and with any `--limit`.

    Args:
        seed: of the guesses.
        **_: anything else is ignored, so that the arguments of another model may stay: lm-eval hands the model
            arguments to the tasks as well, which know keys of their own.

    Raises:
        ConfigError: the seed is no whole number from 0 to 2**32 - 1.
    """

    def __init__(self, seed: Any = 42, **_: Any) -> None:
        super().__init__()
        self.seed = TaskSettings(seed=seed).seed

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """One of the task's choices for each request, or an empty text where the task has none."""
        draw = self._draw()
        return _kept(requests, [_pick(draw(request), getattr(request, "choices", None)) for request in requests])

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """A random score from -1 to 0 for each continuation; the likeliest of several is any of them equally often."""
        draw = self._draw()
        return _kept(requests, [(-draw(request).random(), False) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        """A random score from -1 to 0 for each text."""
        return [score for score, _ in self.loglikelihood(requests)]

    @property
    def tokenizer_name(self) -> str:
        """Asked for with `--apply_chat_template`, as part of a cache's name."""
        return "ttt_random"

    def apply_chat_template(self, chat_history: list[dict[str, str]], **_: Any) -> str:
        """The messages one after the other; what a prompt says changes no guess."""
        return "\n".join(message["content"] for message in chat_history)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval adds to `config` in its results: by these settings the reports know a run of random guesses."""
        results.answers_are_scored()
        return {"ttt": {"settings": {"method": "random", "seed": self.seed}, "tasks": {}}}

    def _draw(self) -> Any:
        """A function from a request to the random numbers of its task."""
        of_task: dict[str, random.Random] = {}

        def numbers(request: Instance) -> random.Random:
            task = str(request.task_name)
            return of_task.setdefault(task, random.Random(f"{self.seed} {task}"))

        return numbers


def _kept(requests: Sequence[Instance], answers: list[Any]) -> list[Any]:
    """`answers`, which are on disk until the results are written."""
    results.keep_answers(requests)(requests, answers)
    return answers


def _pick(numbers: random.Random, choices: Sequence[str] | None) -> str:
    return numbers.choice(choices) if choices else ""
