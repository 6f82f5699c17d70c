"""Who this process is, by the environment that torchrun, or a scheduler that does half of it, has made."""

import pytest

from featcache.errors import UsageError
from featcache.system import distributed
from featcache.system.device import choose_runtime

NAMES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
WHERE = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


def enter(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> distributed.Processes:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with distributed.init(choose_runtime("cpu")) as (processes, _):
        return processes


@pytest.mark.parametrize("environment", [{}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": "1", "RANK": "0"}])
def test_one_process(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    assert enter(monkeypatch, environment) == distributed.Processes()


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 and RANK, MASTER_ADDR, MASTER_PORT not set"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR, MASTER_PORT not set"),
        ({"WORLD_SIZE": "two", "RANK": "0", **WHERE}, "WORLD_SIZE is 'two', expected a number"),
        ({"WORLD_SIZE": "2", "RANK": "-1", **WHERE}, "RANK is '-1', expected a number"),
        ({"WORLD_SIZE": "2", "RANK": "2", **WHERE}, "RANK is 2 and WORLD_SIZE 2"),
    ],
)
def test_half_an_environment_is_wrong_usage(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], words: str
) -> None:
    with pytest.raises(
        UsageError, match=f"{words}; start several processes with torchrun, or one with WORLD_SIZE unset"
    ):
        enter(monkeypatch, environment)
