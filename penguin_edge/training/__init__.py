"""Training: stages, what learns, batches, losses, and steps that can be resumed."""
