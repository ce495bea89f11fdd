"""The options of a training run, one dataclass for each group of the help page."""
