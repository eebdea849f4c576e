"""Estimates of arithmetic, memory and time."""
