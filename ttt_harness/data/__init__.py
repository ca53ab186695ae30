"""Data sets and training sequences; nothing in here imports a training or serving engine."""
