"""The run core: what is fitted and asked, in which order, and within which memory. Nothing of lm-eval's is in it."""
