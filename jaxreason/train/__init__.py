"""The training loop: phases, step, optimisers, checkpoints, logs. It knows no method."""
