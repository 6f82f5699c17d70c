"""Bytes that lie elsewhere: the right ones or none, whatever the server does; nothing of a secret is said; few requests."""

import dataclasses
import io
import logging
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from objects import (
    FAULTS,
    Answer,
    Bucket,
    Request,
    Server,
    allow_this_machine,
    environment,
    files_of,
    forwarded,
    s3_error,
    s3_server,
    serving,
)

from featcache.errors import FeatcacheError, MissingDependencyError, RefusedImage
from featcache.images.locations import check_unchanged, describe, expand, expand_braces, open_binary
from featcache.images.remote import Patience
from featcache.system.path_kinds import as_path

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")
QUICK = Patience(tries=8, first_tries=2, first=0.005, longest=0.05, request=5)
DATA = random.Random(1).randbytes(12 << 20)
SECRETS = ("SECRETKEY", "pa55word", "TOPSECRET", "bob")


@pytest.fixture(autouse=True)
def _this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    allow_this_machine(monkeypatch)


@pytest.fixture(scope="module")
def s3() -> Iterator[SimpleNamespace]:
    """moto's server behind one that fails as it is told."""
    with pytest.MonkeyPatch.context() as patch, s3_server(patch) as port, serving(forwarded(port)) as server:
        for name, value in environment(server).items():
            patch.setenv(name, value)
        bucket = Bucket("bucket", server, port)
        bucket.create()
        yield SimpleNamespace(server=server, bucket=bucket, port=port, data=bucket.put("shards/train-000.tar", DATA))


@pytest.fixture
def faulty(s3: SimpleNamespace) -> Iterator[SimpleNamespace]:
    """The same, for one test."""
    s3.server.requests.clear()
    s3.server.faults.clear()
    s3.server.bytes_sent = 0
    yield s3
    s3.server.plan = lambda _: None


def reason_of(work: Callable[[], object]) -> str:
    with pytest.raises((FeatcacheError, RefusedImage)) as error:
        work()
    text = f"{type(error.value).__name__}: {error.value}"
    assert not any(secret in text for secret in SECRETS) and "\n" not in text
    return text


# ---------------------------------------------------------------------------------------------------------------- here


@pytest.mark.parametrize(
    "pattern", ["a{08..11}.tar", "{a,b}-{1..2}", "{3..1}", "{x}", "{}", "{a,}b", "{0..003}", "a{b", "{1..2..3}x"]
)
def test_braces_are_those_of_bash(pattern: str) -> None:
    if pattern == "{1..2..3}x":  # a step, which WebDataset does not have
        assert expand_braces(pattern) == [pattern]
        return
    said = subprocess.run(["bash", "-c", f"printf '%s\n' {pattern}"], capture_output=True, text=True, check=True)
    assert expand_braces(pattern) == said.stdout.splitlines()


def test_patterns_are_bounded_and_say_when_nothing_fits(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar", "{1..2}.tar", "*.zip", "x.zip"):
        (tmp_path / name).touch()
    assert [path.name for path in expand(tmp_path / "?.tar")] == ["a.tar", "b.tar"]
    assert expand(tmp_path / "{1..2}.tar") == [tmp_path / "{1..2}.tar"]  # a file that is called so
    assert expand(tmp_path / "*.zip") == [tmp_path / "*.zip"]
    assert "nothing matches" in reason_of(lambda: expand(tmp_path / "*.png"))
    for many in ("{1..999999}", "{1..999}{1..999}", "{1..99999999999999999}"):
        assert "more than 100,000" in reason_of(lambda: expand(many))  # noqa: B023 - called at once


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    (path := tmp_path / "a.tar").write_bytes(b"one")
    os.utime(path, ns=(0, 10**18))
    before = describe(path)
    assert before == (3, str(10**18), True)
    with open_binary(path, before) as file:
        assert file.read() == b"one"
        path.write_bytes(b"two")
        assert "changed while it was read" in reason_of(lambda: check_unchanged(file, before))
    assert not describe(path).settled
    assert "changed while it was read" in reason_of(lambda: open_binary(path, before))
    for nothing in (tmp_path / "none", tmp_path, Path(os.devnull)):
        assert reason_of(lambda: describe(nothing)).startswith("RefusedImage")  # noqa: B023


# ------------------------------------------------------------------------------------------------------------------ S3


def test_bytes_are_right_whatever_fails(faulty: SimpleNamespace) -> None:
    """300 reads by 4 threads, in order and not, of which every third request fails, each in its own way."""
    faulty.server.plan = lambda request: None if request.number % 3 else FAULTS[request.number // 3 % len(FAULTS)]
    described, wrong = describe(faulty.data, QUICK), list[object]()

    def read(number: int) -> None:
        mine, position = random.Random(number), 0
        alone = dataclasses.replace(QUICK, longest=0.05 + number / 1000)  # who waits otherwise shares nothing
        for _ in range(75):
            position = mine.randrange(len(DATA)) if mine.random() < 0.3 else position
            size = mine.randrange(200_000)
            try:
                with open_binary(faulty.data, described, alone) as file:
                    file.seek(position)
                    found = file.read(size)
            except Exception as error:
                wrong.append(error)
                return
            if found != DATA[position : position + size]:
                wrong.append((position, size))
            position = min(position + size, len(DATA) - 1)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong
    assert faulty.server.faults.keys() == set(FAULTS)


@pytest.mark.parametrize("fault", [*FAULTS, "stall"])
def test_each_fault_is_outlived_and_the_end_of_patience_says_how_to_go_on(faulty: SimpleNamespace, fault: str) -> None:
    patience = Patience(tries=3, first=0.005, longest=0.05, request=0.2) if fault == "stall" else QUICK
    address = faulty.bucket.put(f"{fault}.tar", data := DATA[: 4 << 20])
    asked = list[Request]()  # of this object: others may still be under way from before

    def plan(request: Request) -> str | None:
        if not request.path.endswith(f"/{fault}.tar"):
            return None
        asked.append(request)
        return fault if len(asked) in failing else None

    failing = range(2, 4)
    faulty.server.plan = plan
    with open_binary(address, patience=patience) as file:
        file.seek(-1000, io.SEEK_END)
        assert file.read(1000) == data[-1000:] and len(asked) >= 4
        failing = range(1000)
        file.seek(2_000_000)
        asked.clear()
        reason = reason_of(lambda: file.read(1000))
    assert reason.startswith(f"SourceError: {address}: ")
    assert f"{patience.tries} times" in reason and "the same command goes on from there" in reason
    assert patience.tries <= len(asked) <= 2 * patience.tries  # a client repeats what found a line dead


def test_a_server_says_when_to_come_back(faulty: SimpleNamespace) -> None:
    slow = [s3_error(503, "SlowDown", **{"Retry-After": "1"})]
    address = faulty.bucket.put("slow.tar", b"x")
    faulty.server.plan = lambda request: slow.pop() if slow and request.path.endswith("/slow.tar") else None
    waits = Patience(first=0.001, longest=0.4)  # but not for ever
    started = time.monotonic()
    describe(address, waits)
    assert 0.39 < time.monotonic() - started < 3


def test_few_requests_in_order_and_no_more_than_asked_for_out_of_it(faulty: SimpleNamespace) -> None:
    described = describe(faulty.data)
    faulty.server.requests.clear()
    faulty.server.bytes_sent = 0
    for position in range(0, len(DATA), 60_000):  # as a listing, and images one after the other
        with open_binary(faulty.data, described) as file:
            file.seek(position)
            assert file.read(512) == DATA[position : position + 512]
    assert len(faulty.server.requests) <= 10 and faulty.server.bytes_sent <= len(DATA) * 1.01
    other = faulty.bucket.put("other.tar", DATA[::-1])
    described = describe(other)
    faulty.server.bytes_sent = 0
    for position in range(len(DATA) - 2000, 1 << 20, -600_000):
        with open_binary(other, described) as file:
            file.seek(position)
            assert file.read(1000) == DATA[::-1][position : position + 1000]
    assert faulty.server.bytes_sent <= 20 * 1000


def test_what_changes_meanwhile_is_refused(faulty: SimpleNamespace) -> None:
    address = faulty.bucket.put("changing.tar", DATA)
    described = describe(address)
    faulty.bucket.put("changing.tar", DATA[::-1])  # of the same size
    with open_binary(address, described) as file:
        assert "changed while it was read" in reason_of(lambda: file.read(10))
    faulty.bucket.delete("changing.tar")
    with open_binary(address, described) as file:
        assert "no such object" in reason_of(lambda: file.read(10))


def test_listing(faulty: SimpleNamespace) -> None:
    for name in ("shards/train-001.tar", "shards/below/train-002.tar", "shards/val-[0].tar", "shards/notes.txt"):
        faulty.bucket.put(name, b"x")
    faulty.server.plan = lambda request: "slow-down" if request.number == 0 else None

    def names(pattern: str) -> list[str]:
        return [path.as_posix().removeprefix("s3:/bucket/shards/") for path in expand(pattern, QUICK)]

    assert names("s3://bucket/shards/train-*.tar") == ["train-000.tar", "train-001.tar"]
    assert names("s3://bucket/shards/train-{001..002}.tar") == ["train-001.tar", "train-002.tar"]
    everything = ["notes.txt", "train-000.tar", "train-001.tar", "val-[0].tar"]
    assert names("s3://bucket/shards/") == names("s3://bucket/shards") == everything
    assert "nothing matches" in reason_of(lambda: expand("s3://bucket/shards/none-*.tar", QUICK))


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (403, "InvalidAccessKeyId", "refuses access (403 InvalidAccessKeyId); set AWS_ACCESS_KEY_ID"),
        (403, "SignatureDoesNotMatch", "set AWS_ACCESS_KEY_ID"),
        (400, "ExpiredToken", "set AWS_ACCESS_KEY_ID"),
        (403, "InvalidObjectState", "Glacier"),
        (404, "NoSuchBucket", "there is no bucket"),
        (404, "NoSuchKey", "no such object"),
        (400, "Odd\x1b[31m", "answers 400"),
    ],
)
def test_what_will_not_pass_is_not_asked_for_again(faulty: SimpleNamespace, status: int, code: str, said: str) -> None:
    faulty.server.plan = lambda _: s3_error(status, code.encode("ascii", "xmlcharrefreplace").decode())
    name = f"{status}{code[:3]}.tar"
    assert said in reason_of(lambda: describe(f"s3://bucket/{name}", QUICK))
    assert [request.path for request in faulty.server.requests].count(f"/bucket/{name}") == 1


def test_missing_credentials_and_packages(faulty: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    reason = reason_of(lambda: describe("s3://bucket/shards/train-000.tar", QUICK))
    assert "needs credentials, and there are none; set AWS_ACCESS_KEY_ID" in reason
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    assert "set AWS_ACCESS_KEY_ID" in reason_of(lambda: describe(faulty.data, QUICK))
    monkeypatch.setitem(sys.modules, "fsspec", None)
    monkeypatch.setenv("AWS_REGION", "another")
    with pytest.raises(MissingDependencyError, match=r"pip install 'featcache\[remote\]'$"):
        describe(faulty.data, QUICK)
    assert not faulty.server.requests


# ----------------------------------------------------------------------------------------------------------------- web


@pytest.fixture
def web() -> Iterator[Server]:
    with serving(files_of({"/d/a.tar": DATA, "/d/empty.tar": b""})) as server:
        yield server


def test_secrets_of_an_address_reach_the_server_and_nobody_else(web: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "featcache")
    place = f"127.0.0.1:{web.port}/d"
    address = as_path(f"http://bob:pa55word@{place}/a.tar?sig=TOPSECRET")
    assert address == Path(f"http:/{place}/a.tar") and as_path(address) == address
    web.plan = lambda request: "error" if request.number in (0, 2) else None
    with open_binary(address, patience=QUICK) as file:
        assert file.read() == DATA
    assert {request.path for request in web.requests} == {"/d/a.tar?sig=TOPSECRET"}
    assert {request.headers.get("Authorization") for request in web.requests} == {"Basic Ym9iOnBhNTV3b3Jk"}
    several = expand(f"http://{place}/{{a,b}}.tar?sig=TOPSECRET2")
    assert [path.name for path in several] == ["a.tar", "b.tar"] and several[
        0
    ] != address  # another address, as far as one knows
    assert "no such object" in reason_of(lambda: describe(several[1], QUICK))
    web.plan = lambda _: Answer(403, {}, b"")
    assert "may have expired" in reason_of(lambda: describe(address, QUICK))
    web.plan = lambda _: "reset"
    assert "no connection" in reason_of(lambda: describe(address, QUICK))
    assert not any(secret in caplog.text for secret in SECRETS)


def to(place: str) -> Answer:
    return Answer(302, {"Location": place}, b"")


def test_redirects(web: Server) -> None:
    described = describe(f"{web.url}/d/a.tar", QUICK)
    with serving(lambda *_: to(f"{web.url}/d/a.tar?x=1")) as other:
        web.requests.clear()
        sent_on = f"http://bob:pa55word@127.0.0.1:{other.port}/moved"
        assert describe(sent_on, QUICK) == described
        with open_binary(sent_on, described, QUICK) as file:
            assert file.read(100) == DATA[:100]
        assert {request.headers.get("Authorization") for request in web.requests} == {None}  # of another place
    for place, said in (("/round", "more than 5 times"), ("file:///etc/passwd", "sends on to file:///etc/passwd")):
        web.plan = lambda _, place=place: to(place)  # type: ignore[misc]
        assert said in reason_of(lambda: describe(f"{web.url}/d/a.tar", QUICK))


WHOLE = {"Content-Range": "bytes 0-0/9", "ETag": '"x"'}


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (Answer(200, {"ETag": '"x"'}, b"all of it"), "only whole, not in pieces; save it first: `curl"),
        (Answer(206, {"Content-Range": "bytes 0-0/9"}, b"a"), "a change would go unnoticed"),
        (Answer(206, {**WHOLE, "Content-Range": f"bytes 0-0/{'9' * 40}"}, b"a"), "cut off"),
        (Answer(206, {**WHOLE, "Content-Range": "bytes */9"}, b"a"), "cut off"),
        (Answer(206, {"ETag": '"x"'}, b"a"), "cut off"),
        (Answer(401, {}, b""), "~/.netrc"),
        (Answer(407, {}, b""), "the proxy refuses"),
        (Answer(418, {}, b""), "answers 418"),
    ],
)
def test_servers_of_other_kinds(web: Server, answer: Answer, said: str) -> None:
    web.plan = lambda _: answer
    assert said in reason_of(lambda: describe(f"{web.url}/d/a.tar?sig=TOPSECRET", QUICK))


@pytest.mark.parametrize(
    "answer",
    [
        Answer(206, {**WHOLE, "Content-Length": "9", "Content-Range": "bytes 1-9/9"}, b"123456789"),
        Answer(206, {**WHOLE, "Content-Length": str(10**13), "Content-Range": "bytes 0-8/9"}, b"123456789"),
        Answer(
            206,
            {**WHOLE, "Transfer-Encoding": "chunked", "Content-Range": "bytes 0-8/9"},
            b"9\r\n123456789\r\n0\r\n\r\n",
        ),
        Answer(200, {"ETag": '"x"'}, b"123456789" * 1000),
    ],
    ids=["elsewhere", "endless", "of no length", "whole"],
)
def test_answers_to_another_question_are_not_taken(web: Server, answer: Answer) -> None:
    """And not read, whatever they say of their length."""
    web.plan = lambda request: Answer(206, WHOLE, b"a") if request.headers["Range"] == "bytes=0-0" else answer
    with open_binary(f"{web.url}/d/a.tar", patience=QUICK) as file:
        assert "the answer was cut off, 8 times" in reason_of(file.read)


def test_a_server_that_is_not_there_is_not_waited_for(web: Server) -> None:
    with serving(files_of({})) as gone:
        pass
    reason = reason_of(lambda: describe(f"http://127.0.0.1:{gone.port}/a.tar", QUICK))
    assert "is the address right, and is there a network?" in reason or "8 times" in reason
    assert "empty" in reason_of(lambda: describe(f"{web.url}/d/empty.tar", QUICK))
    assert "has no listing" in reason_of(lambda: expand(f"{web.url}/d/*.tar", QUICK))


def test_the_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Request] = []
    inside = files_of({"http://data.example/a.tar": DATA})

    def proxy(request: Request, body: bytes) -> Answer:
        seen.append(request)
        return inside(request, body)

    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving(proxy) as server:
        monkeypatch.setenv("http_proxy", server.url)
        with open_binary("http://data.example/a.tar", patience=QUICK) as file:
            assert file.read(100) == DATA[:100]
    assert seen
