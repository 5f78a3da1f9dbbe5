"""`python -m afnext` is the command line."""

from afnext.runtime.app.cli import main

if __name__ == "__main__":
    main()
