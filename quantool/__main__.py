"""`python -m quantool`."""

from quantool.cli import main

if __name__ == "__main__":
    main()
