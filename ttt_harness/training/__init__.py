"""Fits LoRA adapters on a base model, built from layers of torchtune or transformers.

    trainer.py        the training loop: one adapter after the other on one loaded model
    shape.py          the sizes of a model from its `config.json`, and which way it is fitted
    families.py       the fast way: each architecture from torchtune's modules
    checkpoint.py     loads a base model the fast way
    general.py        the general way: any causal model of transformers
    layers/           faster decoder layers: compiled on a GPU, fused elsewhere
    model_config.py   reads `config.json`
    weights.py        checks the weight files against `config.json`
    tune.py           everything that is imported from torchtune

README.md beside these files is the guide.
"""
