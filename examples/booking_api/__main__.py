"""Serve the example: `python -m examples.booking_api [DATABASE]`."""

import sys
from pathlib import Path

import uvicorn

from examples.booking_api.app import create_app

uvicorn.run(create_app(Path(sys.argv[1] if len(sys.argv) > 1 else "trips.sqlite")))
