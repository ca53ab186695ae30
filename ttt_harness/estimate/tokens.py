"""Counts the tokens of tasks, with the model's tokenizer: demonstrations, questions, answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ttt_harness.config import LMEvalSettings
from ttt_harness.errors import ConfigError
from ttt_harness.serving.environment import prepare_environment
from ttt_harness.sweep.grid import Cell
from ttt_harness.sweep.lm_eval_call import load_tasks

Encode = Callable[[str], Sequence[Any]]


@dataclass(frozen=True)
class TokenCounts:
    """The tokens of one task, with one draw of its demonstrations.

    description: before the demonstrations.
    demonstrations: the description and all of them.
    pairs: the description and one of them, summed over all.
    question, answer: of each on average, without what is before it.
    questions: their number.
    """

    name: str
    description: int
    demonstrations: int
    pairs: int
    question: float
    answer: float
    questions: int


def count_tokens(cell: Cell, encode: Encode) -> list[TokenCounts]:
    """Load the cell's tasks and count their tokens.

    Raises:
        TTTError: a task is unknown, has no data, or is no TTT task.
    """
    from ttt_harness.harness.task import TTTTask, support_set_of

    limit = cell.call.get("limit")
    found = []
    for name, task in load_tasks(cell.call).items():
        if not isinstance(task, TTTTask):
            support_set_of(_Named(name))  # says what to do
        support = task.support_set(cell.call.get("system_instruction"))
        texts = [d.question + d.answer + d.ending for d in support.demonstrations]
        docs = list(task.eval_docs)
        if limit is not None:
            docs = docs[: int(limit) if limit >= 1 else -(-len(docs) * limit // 1)]
        asked = [len(encode(task.doc_to_text(doc))) for doc in docs]
        answered = [len(encode(f" {task.doc_to_target(doc)}\n\n")) for doc in docs]
        found.append(
            TokenCounts(
                name=name,
                description=len(encode(support.description)),
                demonstrations=len(encode(support.description + "".join(texts))),
                pairs=sum(len(encode(support.description + text)) for text in texts),
                question=sum(asked) / len(docs),
                answer=sum(answered) / len(docs),
                questions=len(docs),
            )
        )
    return found


@dataclass(frozen=True)
class _Named:
    task_name: str


def encoder(model_args: Mapping[str, Any]) -> Encode:
    """The tokenizer of the model that the arguments name.

    Raises:
        ConfigError: they name none, or it cannot be loaded.
        ModelError: the model cannot be fetched.
    """
    if not model_args.get("pretrained"):
        raise ConfigError("pretrained is missing: name the model whose tokens are counted with --model_args.")
    prepare_environment()  # before vLLM is imported
    from transformers import AutoTokenizer

    from ttt_harness.run.model_arguments import model_directory

    settings = LMEvalSettings.from_mapping(model_args)
    folder = model_directory(str(model_args["pretrained"]), settings)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            settings.tokenizer or folder, trust_remote_code=bool(settings.trust_remote_code)
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"the tokenizer of {folder} cannot be loaded: {str(error).splitlines()[0]}") from None
    return lambda text: tokenizer(text, add_special_tokens=False).input_ids
