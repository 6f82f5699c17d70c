"""Puts the folders of the tests on ``sys.path``: in pytest and in the processes that tests start, which unpickle their functions."""

import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), *(str(folder) for folder in sorted(TESTS.iterdir()) if folder.is_dir())]
