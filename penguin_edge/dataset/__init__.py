"""Data sets with questions and answers: records, samples, and penguin-nano's drawn ones."""
