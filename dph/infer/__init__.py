"""Sampling, and the choice of the best answer."""
