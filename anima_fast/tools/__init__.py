"""What is done with finished files: merge, extract, resize and remap."""
