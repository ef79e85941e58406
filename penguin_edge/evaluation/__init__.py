"""Scores: questions, answers, and studies of budgets and layers."""
