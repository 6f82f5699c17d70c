"""A signal while modules are imported waits for their end; a second one does not wait."""

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest


def start(folder: Path, seconds: float) -> subprocess.Popen[str]:
    """A process that says when it is in the middle of an import that takes so long, and how it was interrupted."""
    (folder / "slow.py").write_text(f"import time; print('importing', flush=True); time.sleep({seconds}); whole = True")
    program = """
        import signal, sys, time
        from featcache.system.signals import interrupt_on_signals
        signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run in the background
        asked = interrupt_on_signals()
        try:
            import slow
            time.sleep(30)
        except KeyboardInterrupt:
            print(int(asked.signal), hasattr(sys.modules.get("slow"), "whole"), flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_import_is_not_cut_off(tmp_path: Path, number: int) -> None:
    process = start(tmp_path, 0.5)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (out, err, process.returncode) == (f"{int(number)} True\n", "", 0)


def test_a_second_signal_interrupts_at_once(tmp_path: Path) -> None:
    process = start(tmp_path, 20)
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.7)  # longer than what counts as an echo of the first
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=10)
    assert out == f"{int(signal.SIGINT)} False\n"


def test_sigint_stays_ignored_where_it_was() -> None:
    program = """
        import os, signal
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for what runs in the background
        from featcache.system.signals import interrupt_on_signals
        interrupt_on_signals()
        os.kill(os.getpid(), signal.SIGINT)
        print("going on")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True, timeout=30
    )
    assert done.stdout == "going on\n"
