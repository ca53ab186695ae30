"""Decoder layers that take the place of torchtune's: compiled on a GPU, fused elsewhere."""
