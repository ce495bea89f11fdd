"""`anima-fast inspect`: what a file holds and which programs load it, told from headers."""
