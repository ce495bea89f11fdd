"""`anima-fast watch OUT`: a local web page that follows a run through the files it writes.

The trainer knows nothing about it. `log.py` reads the logs as they grow, `curves.py` keeps a log of
any length in a few thousand points, `run.py` and `pictures.py` make the answers, `server.py` sends
them to the browser, and `page/` is what it shows.
"""
