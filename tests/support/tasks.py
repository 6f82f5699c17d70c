"""What worker processes are asked to do in tests."""

import os
import signal
import time
from typing import Any

import numpy as np


def prepare() -> None:
    """Nothing."""


def work(memory: np.ndarray, task: Any) -> Any:
    """A word and its arguments."""
    word, *given = task
    if word == "add":
        place, value = given
        memory[place] += value
        return int(memory[place])
    if word == "kill":
        os.kill(os.getpid(), given[0])
    if word == "raise":
        raise ValueError(given[0])
    if word == "sleep":
        time.sleep(given[0])
    if word == "signals":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), number)
    return os.getpid(), os.getppid()
