"""`python -m saga` is `saga`."""

from saga.cli import main

if __name__ == "__main__":
    main()
