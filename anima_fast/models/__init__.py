"""The networks and the readers of their published files."""
