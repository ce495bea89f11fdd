"""A whole run on a tiny stack, from images to a report."""
