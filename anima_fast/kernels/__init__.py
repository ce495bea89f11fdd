"""Fused operators: one per file, each with its definition in plain torch; registry.py lists them.

This package imports nothing else of anima_fast. Files that the eager model reads too (losses.py,
op.py) do without Triton.
"""
