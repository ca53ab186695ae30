"""What lm-eval sees: the task class, the model class and the answer filter."""
