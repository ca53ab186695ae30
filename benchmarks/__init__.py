"""Measures this project beside the pipeline that it reimplements; `python -m benchmarks --help`, or `make bench`."""
