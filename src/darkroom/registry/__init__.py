"""MLflow: runs, the packaged model, the gate and promotion."""
