"""Outputs of frozen models, stored on disk."""
