"""Answers with vLLM: its start, generation and scoring with adapters, LoRA kernels for the CPU.

answering.py     `Answering`: lm-eval's `vllm` class with this package's engine
engine.py        the engine: its defaults on this machine, its start, requests with an adapter
sampling.py      generation arguments of a task -> vLLM's `SamplingParams`
generation.py    greedy decoding unless sampling is asked for
environment.py   environment variables for vLLM, torch and Ray
cpu_lora.py      LoRA kernels for vLLM's CPU backend
vllm_plugin.py   the entry point that vLLM calls in each of its processes
"""
