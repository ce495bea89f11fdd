"""Parity and benchmarks: what is measured, run files, their comparison, predicted times."""
