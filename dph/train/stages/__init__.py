"""Training stages: batches and a loss each."""
