"""The command line, a module each theme; `anima_fast/cli.py` puts it together."""
