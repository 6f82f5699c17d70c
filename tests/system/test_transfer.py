"""Tensors there and back on a CPU, and the one lock of all that compute on an Apple GPU."""

import threading

import torch

from featcache.system.device import launching
from featcache.system.transfer import Feed, host_tensor, read_later

CPU, MPS = torch.device("cpu"), torch.device("mps")


def test_on_a_cpu_nothing_is_copied() -> None:
    one = host_tensor((2, 3), torch.float32, CPU).copy_(torch.arange(6).view(2, 3))
    two = torch.ones(4)
    assert [tensor.data_ptr() for tensor in Feed(CPU)(one, two)] == [one.data_ptr(), two.data_ptr()]
    read = read_later(one)
    assert (read() == [[0, 1, 2], [3, 4, 5]]).all()


def test_an_apple_gpu_takes_work_from_one_thread_at_a_time() -> None:
    entered = threading.Event()

    def other() -> None:
        with launching(MPS):
            entered.set()

    thread = threading.Thread(target=other)
    with launching(MPS), launching(MPS), launching(CPU):  # the same thread may again
        thread.start()
        assert not entered.wait(0.05)
    thread.join()
    assert entered.is_set()
    with launching(CPU):
        other_cpu = threading.Thread(target=lambda: launching(CPU).__enter__())
        other_cpu.start()
        other_cpu.join(5)
        assert not other_cpu.is_alive()
