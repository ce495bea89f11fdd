"""`python -m anima_fast`: the same as the `anima-fast` command."""

from anima_fast.cli import main

if __name__ == "__main__":
    main()
