"""The tasks, as plain lm-eval YAML: installed as `ttt_harness.task_configs`, one folder per benchmark."""
