"""Meeting points between a test and a process that it runs, so that two things happen in a chosen order without sleeping.

In: a function of featcache before which the process is to wait. Out: the test knows that it waits there, and lets it go on.
"""

import dataclasses
import importlib
import os
import select
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Gate:
    """Where one process waits for the test. ``path`` is of no file yet."""

    path: str

    @classmethod
    def make(cls, path: Path) -> "Gate":
        """A gate whose pipes lie at ``path``."""
        for name in ("arrived", "go"):
            os.mkfifo(f"{path}.{name}")
        return cls(str(path))

    def stop_before(self, name: str) -> None:
        """Let this process wait here when it first calls ``featcache.NAME``; to be passed as ``before`` to ``Program.run``."""
        module, _, attribute = name.rpartition(".")
        home = importlib.import_module(f"featcache.{module}")
        original = getattr(home, attribute)

        def wait(*arguments: Any, **options: Any) -> Any:
            if getattr(home, attribute) is wait:
                setattr(home, attribute, original)
                self.pass_through()
            return original(*arguments, **options)

        setattr(home, attribute, wait)

    def pass_through(self) -> None:
        """Say that this process is here, and wait."""
        Path(f"{self.path}.arrived").write_text("here")
        Path(f"{self.path}.go").read_text()

    def wait(self, seconds: float = 60.0) -> None:
        """The test's side: wait until the process is there."""
        pipe = os.open(f"{self.path}.arrived", os.O_RDONLY | os.O_NONBLOCK)
        try:
            assert select.select([pipe], [], [], seconds)[0], f"nobody came to {self.path}"
        finally:
            os.close(pipe)

    def open(self) -> None:
        """The test's side: let it go on."""
        Path(f"{self.path}.go").write_text("go")
