"""Targets, one folder each: what it takes, how its graphs look, what they weigh."""
