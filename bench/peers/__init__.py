"""The peers: a script each, run in an environment of its own; `python -m bench.peers` has them take turns with us."""
