"""Measures saga against what it stands on and what it competes with: `python -m bench`."""
