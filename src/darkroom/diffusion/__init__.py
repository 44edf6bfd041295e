"""Forward process, objective, guidance and samplers: pure functions on tensors."""
