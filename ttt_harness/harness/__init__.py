"""What lm-eval sees: task class, model classes, filters, metrics, and checks of tasks and results.

model.py                     `TTTVLLM`, the model `ttt_vllm`
random_guess.py              `RandomGuess`, the model `ttt_random`
task.py                      `TTTTask`, the class of a TTT task
declaration.py               checks a task's YAML
drawing.py                   which rows are demonstrations, and which are evaluated
selection.py                 `--limit` and `--samples`
fields.py, rows.py           what a YAML makes of a row, and whether it can be asked and scored
preflight.py                 checks a task before any model is used
user_code.py                 exceptions of templates, functions, metrics and filters, as one sentence
filters.py, bbeh.py          answer rules of BIG-Bench-Hard and BIG-Bench Extra Hard
scoring.py, aggregation.py   scores a task, or says why it has no score
answer_log.py, results.py    keep answers and results on disk
"""
