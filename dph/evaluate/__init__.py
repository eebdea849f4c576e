"""Evaluation of models on tasks and preferences."""
