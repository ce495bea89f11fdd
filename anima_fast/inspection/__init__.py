"""`anima-fast inspect`, what a file holds and which programs load it, and `anima-fast doctor`."""
