"""`python -m dit_sparse` is the command line."""

from dit_sparse.cli import main

if __name__ == "__main__":
    main()
