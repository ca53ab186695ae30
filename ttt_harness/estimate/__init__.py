"""How long a grid takes: its tokens, measured rates, and the time on 1 to 64 GPUs."""
