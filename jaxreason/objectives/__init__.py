"""Training objectives: pure functions of outputs and batch."""
