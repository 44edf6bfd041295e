"""The training loop and what makes it resumable: stateless batches, EMA, checkpoints."""
