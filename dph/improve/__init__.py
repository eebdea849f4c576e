"""The improvement loop: a model learns which of its own answers are right, round by round."""
