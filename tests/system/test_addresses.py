"""What of an address may be shown, and that the rest is kept for this process alone."""

from pathlib import Path

import pytest

from featcache.images.source import Source
from featcache.system.addresses import address_of, shown
from featcache.system.path_kinds import as_path


@pytest.mark.parametrize(
    ("address", "visible"),
    [
        ("https://a.b/c.tar", "https://a.b/c.tar"),
        ("https://ann:SECRET@a.b:8000/c.tar", "https://a.b:8000/c.tar"),
        ("https://SECRET@a.b/c@d.tar", "https://a.b/c@d.tar"),
        ("https://ann:SEC@RET@a.b/c.tar", "https://a.b/c.tar"),
        ("https://ann:SE/CRET@a.b/c.tar", "https://a.b/c.tar"),  # no address, and shown all the same
        ("https://ann:SE?CRET@a.b/c.tar", "https://a.b/c.tar"),
        ("https://a.b/c.tar?X-Amz-Signature=SECRET", "https://a.b/c.tar"),
        ("https://a.b/c.tar?token=SECRET&to=https://x.y/SECRET", "https://a.b/c.tar"),
        ("https://a.b?SECRET", "https://a.b"),
        ("https://a.b/c.tar#SECRET", "https://a.b/c.tar"),
        ("https://[::1]:80/c.tar", "https://[::1]:80/c.tar"),
        ("s3://KEY:SECRET@bucket/c.tar", "s3://bucket/c.tar"),
        ("s3://bucket/what?.tar", "s3://bucket/what?.tar"),  # a name may have it
        ("hf://u:SECRET@x", "hf://x"),
        ("photos/a@b?.jpg", "photos/a@b?.jpg"),
    ],
)
def test_secrets_are_left_out(address: str, visible: str) -> None:
    kept = as_path(address)
    assert shown(address) == shown(Path(address)) == shown(kept) == visible
    assert as_path(kept) == kept
    texts = (str(kept), repr(kept), str(Source(address)), repr(Source(address)), Source(address).typed)
    assert not any("SECRET" in text or "CRET" in text for text in texts)
    if "://" in address:
        assert address_of(kept) == address


def test_addresses_that_are_shown_alike_are_not_taken_for_one_another() -> None:
    first, second, plain = (as_path(f"https://alike.example/get.tar{end}") for end in ("?id=1", "?id=2", ""))
    assert len({first, second, plain}) == 3 and {first.name, second.name, plain.name} == {"get.tar"}
    assert [address_of(path) for path in (first, second)] == [f"https://alike.example/get.tar?id={n}" for n in (1, 2)]
    assert address_of(plain) == "https://alike.example/get.tar"
    assert shown(first) == shown(second) == shown(plain)
