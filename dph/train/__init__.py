"""Training: recipes, the loop, run directories and their checkpoints."""
