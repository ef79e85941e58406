"""Measuring: stages, clips, streams, power, and the comparison of two results."""
