"""Workers that really die: what is worth another one, and that none is left behind."""

import os
import select
import signal
import subprocess
import sys
import threading

import pytest

from featcache.system.supervisor import Notes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")

PROGRAM = """
import ctypes, os, sys, time
from featcache.errors import Interrupted
from featcache.system.supervisor import notes, supervised
try:
    code = supervised()
except Interrupted as ended:
    print(ended.exit_code)
    sys.exit()
if code is not None:
    print(code)
    sys.exit()
os.write(1, b"worker\\n")
shared = notes.shared
{work}
"""


@pytest.mark.parametrize(
    ("work", "workers", "code"),
    [
        ("sys.exit(3)", 1, 3),
        ("notes.write(7); notes.write(0); ctypes.string_at(0)", 1, 128 + signal.SIGSEGV),  # nothing was being decoded
        ("notes.write(os.getpid()); ctypes.string_at(0)", 2, 128 + signal.SIGSEGV),  # twice, and nothing found out
        ("notes.write(7); shared.crashed_images += 1; ctypes.string_at(0)", 2, 128 + signal.SIGSEGV),  # nothing new
        ("shared.crashed_images += 1; notes.write(min(shared.crashed_images, 3)); os.abort()", 4, 128 + signal.SIGABRT),
        ("notes.write(7); shared.output_started = True; os.abort()", 1, 128 + signal.SIGABRT),
        ("notes.write(7); os.kill(os.getpid(), 9)", 1, 137),  # killed: somebody wanted that
        ("os.kill(os.getppid(), 15); time.sleep(60)", 1, 143),  # passed on
    ],
)
def test_what_is_worth_another_worker(work: str, workers: int, code: int) -> None:
    command = [sys.executable, "-c", PROGRAM.format(work=work)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines() == ["worker"] * workers + [str(code)]


def test_no_worker_outlives_the_process_that_waits() -> None:
    program = PROGRAM.format(work="print(os.getpid(), flush=True); time.sleep(600)")
    waiting = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert waiting.stdout
    lines = [waiting.stdout.readline() for _ in range(2)]
    worker = os.pidfd_open(int(lines[1]))
    waiting.kill()
    waiting.wait()
    waiting.stdout.close()
    ended, _, _ = select.select([worker], [], [], 30)
    os.close(worker)
    assert ended, "the worker is still there"


def test_every_thread_has_its_own_note() -> None:
    notes, keys = Notes(), [1, 2**64 - 1, 77]
    threads = [threading.Thread(target=notes.write, args=(key,)) for key in keys]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    notes.write(5)
    notes.write(0)  # of this thread only
    assert notes.take() == frozenset(keys)
    assert notes.take() == frozenset()
