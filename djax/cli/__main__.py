"""`python -m djax.cli`."""

from djax.cli import main

if __name__ == "__main__":
    main()
