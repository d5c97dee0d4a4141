"""The recipe that tests change as they need."""

from pathlib import Path

SMALL_RECIPE = str(Path(__file__).with_name("small.yaml"))
