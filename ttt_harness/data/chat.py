"""Training texts through a chat template, and where the answers are in them.

A template is a program that may do with its messages what it likes: trim them, add a default system turn, move the
system's words into another turn. So nothing is assumed of it but that it copies what a turn says. Each answer is
replaced by a mark, the marks are looked up in what the template makes of the conversation, and the answers are put in
their places; the result has to be what the template makes of the answers themselves.
"""

import itertools
import re
from collections.abc import Callable, Sequence

from ttt_harness.data.support import AnnotatedText, Demonstration, Render, SupportSet
from ttt_harness.errors import DataError

# Of Unicode's private use area: no data set has them, and no template or tokenizer ever gets to compare them.
_MARK = "\ue000{}\ue001"
_NEXT = _MARK.format("next")


def conversation_text(support: SupportSet, order: Sequence[int], render: Render) -> AnnotatedText:
    """The demonstrations in `order` as a conversation of two turns each: the head of every multi-turn prompt."""
    demonstrations = [support.demonstrations[index] for index in order]

    def conversation(answers: Sequence[str]) -> list[dict[str, str]]:
        turns = _system(support, demonstrations[-1])
        for demonstration, answer in zip(demonstrations, answers, strict=True):
            turns += [_turn("user", demonstration.turn), _turn("assistant", demonstration.prefix + answer)]
        return turns

    def prompt(answers: Sequence[str]) -> str:
        return render([*conversation(answers), _turn("user", _NEXT)], True)

    end_of_turn = _end_of_turn(support, demonstrations[-1], render)
    return _fill(prompt, demonstrations, [end_of_turn] * len(demonstrations))


def asked_text(support: SupportSet, order: Sequence[int], render: Render) -> AnnotatedText:
    """A prompt that asks the last demonstration in `order` after the others, all in one turn, and the right reply.

    This is what a model sees and has to say where prompts are single turns, and in a zero-shot prompt.
    """
    *before, last = (support.demonstrations[index] for index in order)

    def prompt(answers: Sequence[str]) -> str:
        turn = "".join(d.question + answer + d.ending for d, answer in zip(before, answers[:-1], strict=True))
        asked = [*_system(support, last), _turn("user", turn + last.turn)]
        return render(asked, True) + last.prefix + answers[-1] + end_of_turn + _NEXT

    end_of_turn = _end_of_turn(support, last, render)
    return _fill(prompt, [*before, last], [*(d.ending for d in before), end_of_turn])


def _fill(
    prompt: Callable[[Sequence[str]], str], demonstrations: Sequence[Demonstration], endings: list[str]
) -> AnnotatedText:
    """Put the answers into the marked places of `prompt`, and cut the text off behind the last one's ending."""
    marks = [_MARK.format(index) for index in range(len(demonstrations))]
    marked = prompt(marks)
    written = [demonstration.answer for demonstration in demonstrations]
    for answers in (written, [answer.strip() for answer in written]):  # many templates trim what a turn says
        text, targets, spans = "", [], []
        rest = marked
        for mark, answer, ending in zip(marks, answers, endings, strict=True):
            before, _, rest = rest.partition(mark)
            text += before
            targets.append((len(text), len(text) + len(answer)))
            text += answer
            spans.append((targets[-1][0], len(text) + (len(ending) if rest.startswith(ending) else 0)))
        if text + rest == prompt(answers) == prompt(written):
            end = spans[-1][1]
            continuation = (text + rest)[end:].partition(_NEXT)[0]
            return AnnotatedText((text + rest)[:end], tuple(spans), continuation, tuple(targets))
    raise DataError(
        "the chat template does not repeat the answers of the demonstrations as they are, so that they "
        "cannot be found in its text; leave out --apply_chat_template, or use method=icl."
    )


def _end_of_turn(support: SupportSet, last: Demonstration, render: Render) -> str:
    """What the template writes behind every reply: common to a conversation that ends there and one that goes on."""
    reply = _MARK.format("reply")
    turns = [*_system(support, last), _turn("user", last.turn), _turn("assistant", reply)]
    ends = render(turns, False).partition(reply)[2]
    goes_on = render([*turns, _turn("user", _NEXT)], True).partition(reply)[2]
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ends, goes_on, strict=False))
    # Not the beginning of a marker: "<|endoftext|>" at the end and "<|user|>" where it goes on have "<|" in common.
    return re.sub(r"[<\[{][^>\]}]*$", "", "".join(character for character, _ in same))


def _system(support: SupportSet, last: Demonstration) -> list[dict[str, str]]:
    head = support.head(last)
    return [_turn("system", head)] if head else []


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
