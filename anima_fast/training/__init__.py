"""Training: flow mathematics, optimizers, schedules, the loop, resume states, logs."""
