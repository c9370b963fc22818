"""The sample corpus that ships with Clew; README.md beside this file says what is in it."""

from pathlib import Path


def sample_dir() -> Path:
    """The folder of the shipped sample: `train/`, `heldout/` and `text/` lie in it."""
    return Path(__file__).parent
