"""`anima-fast demo`: a complete run on tiny models, from images to a report."""
