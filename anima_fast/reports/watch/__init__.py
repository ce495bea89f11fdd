"""`anima-fast watch OUT`: a local web page that follows a run through the files it writes.

The trainer knows nothing of it. `reading.py` and `tail.py` open the run's files so that they can be
replaced meanwhile, `curves.py` keeps a log of any length in a few thousand points, `run.py` and
`pictures.py` make the answers, `server.py` gives them to the browser, and `page/` is what it shows.
"""
