"""Optimizers, schedules and how weights are updated."""
