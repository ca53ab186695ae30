"""What lm-eval sees: the task class, the model class and the answer filter."""

from ttt_harness.errors import report_errors_in_one_sentence
from ttt_harness.serving.environment import prepare_environment

report_errors_in_one_sentence()
prepare_environment()  # here, since `harness.model` imports vLLM
