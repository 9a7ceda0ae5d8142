"""Examples: whole programs, run from the root of the repository as `python -m examples.<name>`."""
