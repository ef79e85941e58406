"""Penguin-VL in PyTorch, and the checkpoints that hold its weights."""
