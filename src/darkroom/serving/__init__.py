"""What runs where the model serves."""
