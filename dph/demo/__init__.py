"""The quickstart: a small model trained end to end."""
