"""What one forward pass of the trainer's model tells is what vLLM answers and lm-eval scores, with and without adapter.

One engine answers the held-out demonstrations of three kinds of tasks.
"""

from dataclasses import replace

import pytest

from tests.tune.yes_no import FIT, KINDS, loaded, prepared, write_tasks
from ttt_harness.run.local import trainer_of
from ttt_harness.tune.folds import orders
from ttt_harness.tune.held_out import Asker

pytestmark = pytest.mark.integration


def test_right_by_one_pass_is_right_by_vllm(tiny_model, tmp_path):
    write_tasks(tmp_path)
    of = loaded(tiny_model, tmp_path)
    answering = of.lm.answering
    trainer = trainer_of(replace(of.lm.arguments, config=FIT), answering.dtype)
    seen = {}
    for name in KINDS:
        task = of.tasks[name]
        asker = Asker(task, task.support_set(), answering, of.chat)
        for fold in prepared(of, name).folds[:3]:
            fit = trainer.fit(fold.sequences(FIT), batch_size=2, epochs=4, lr=3e-3, warmup_ratio=0.1, seed=1)
            key = f"{name}{fold.number}"
            stored = of.lm.store.save(
                key,
                fit.peft_state_dict(),
                base_model=str(tiny_model),
                rank=FIT.lora_rank,
                alpha=FIT.lora_alpha,
                dropout=0.0,
                record={},
            )
            adapter = answering.model.adapter(key, stored.path)
            for request, state in ((adapter, fit.tune_state_dict), (None, None)):
                for question in fold.questions:
                    right = question.is_right(trainer.predict(question.sequences, state))
                    assert right == served(asker, fold, question, request), (name, question.asked, request)
                    seen.setdefault((name, request is not None), set()).add(right)
    assert all(seen[name, True] == {True, False} for name in KINDS), seen


def served(asker, fold, question, adapter):
    """Whether the engine answers rightly, by the task's own scoring."""
    held_out = {one.asked.demonstration for one in fold.questions}
    others = [place for place in range(8) if place not in held_out]
    place, number = question.asked.demonstration, question.asked.order
    order = orders(others, 2, seed=42, held_out=place)[number]
    instances = asker.requests(place, order)
    doc, kind = instances[0].doc, instances[0].request_type
    answers = asker.answering.answer(kind, instances, adapter)
    if kind == "loglikelihood":
        return asker.task.process_results(doc, answers)["acc"] == 1
    instances[0].resps = answers
    asker.task.filter_answers(instances)
    (text,) = instances[0].filtered_resps.values()
    if asker.task.config.filter_list:
        return text == doc["answer"].split()[0]
    return text.strip() == doc["answer"]
