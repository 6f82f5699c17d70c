"""What a notebook shows: escaped, short, and no bar that stays."""

import logging
import sys
from pathlib import Path

import numpy as np
import pytest

from featcache.system.display import (
    Shown,
    all_refused,
    bar_in_notebook,
    count_rows,
    describe_images,
    html_table,
    quantity,
)

HOSTILE = "<script>alert('x')</script>&\udce9"


def test_tables_are_escaped_and_fit_to_be_saved() -> None:
    table = html_table([("a", HOSTILE), (1, 2)], caption=HOSTILE)
    assert "<script>" not in table and table.count("&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;&amp;\\udce9") == 2
    assert table.encode().count(b"<th>") == table.count("<td>") == 2


def test_counts() -> None:
    names = ("none", "train", "val")
    labels, splits = np.array([0, 1, 1, -1]), np.array([1, 1, 2, 0])
    assert count_rows(("a", "b", "c"), labels, splits, names=names) == [
        ["class", "no split", "train", "val"],
        ["a", "0", "1", "0"],
        ["b", "0", "1", "1"],
        ["c", "0", "0", "0"],
        ["(no label)", "1", "0", "0"],
        ["all", "1", "2", "1"],
    ]
    none = np.zeros(3, np.int64)
    assert count_rows((), none - 1, none, names=names) == count_rows(("a",), none[:0], none[:0], names=names) == []
    many = count_rows([str(k) for k in range(50)], np.arange(50), np.zeros(50, np.int64), names=names)
    assert (len(many), many[6]) == (13, ["... 40 classes between", ""])


def test_one_is_not_several() -> None:
    assert [quantity(n, "image") for n in (0, 1, 2, 1234)] == ["0 images", "1 image", "2 images", "1,234 images"]
    assert [quantity(n, "class") for n in (1, 2)] == ["1 class", "2 classes"]
    assert [quantity(n, "image is", "images are") for n in (1, 2)] == ["1 image is", "2 images are"]
    assert [quantity(n, "epoch") for n in (1.0, 2.5, 30.0)] == ["1 epoch", "2.5 epochs", "30 epochs"]
    assert all_refused(1, "photos") == "the only image of photos was refused"
    assert all_refused(24, "photos") == "all 24 images of photos were refused"


def test_a_report_is_short() -> None:
    class Report(Shown):
        _shown = ("model", "val_accuracy", "test_accuracy", "splits")
        model, val_accuracy, test_accuracy, splits = Path(HOSTILE), 2 / 3, None, {"train": 3, "val": 1}

    assert repr(Report()) == f"Report(model={HOSTILE!r}, val_accuracy=0.6667, splits={{'train': 3, 'val': 1}})"
    shown = Report()._repr_html_()
    assert "<td>val accuracy</td><td>66.67%</td>" in shown and "<td>train 3, val 1</td>" in shown
    assert "test accuracy" not in shown and "<script>" not in shown


@pytest.mark.parametrize("fails", [False, True])
def test_a_bar_is_gone_at_the_end(kernel: list[dict[str, str]], *, fails: bool) -> None:
    def work() -> None:
        with bar_in_notebook(None, describe_images("<embedding>"), delay=0) as progress:
            assert progress
            progress(0, 10, "decode")
            if fails:
                raise KeyboardInterrupt

    if fails:
        with pytest.raises(KeyboardInterrupt):
            work()
    else:
        work()
    assert 'value="0" max="10"' in kernel[0]["text/html"] and "&lt;embedding&gt; 0/10" in kernel[0]["text/html"]
    assert kernel[-1] == {"text/html": "", "text/plain": ""}


def test_where_no_bar_is_shown(kernel: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    with bar_in_notebook(None, describe_images("x")) as progress:  # short work
        progress(0, 10, "decode")  # type: ignore[misc]
    given: list[tuple[int, int, str]] = []
    mine = lambda *report: given.append(report)  # noqa: E731
    with bar_in_notebook(mine, describe_images("x"), delay=0) as progress:
        assert progress is mine
    logging.getLogger("featcache").setLevel(logging.WARNING)
    with bar_in_notebook(None, describe_images("x"), delay=0) as progress:
        assert progress is None
    logging.getLogger("featcache").setLevel(logging.NOTSET)
    monkeypatch.setattr(sys.modules["IPython"], "get_ipython", lambda: None)  # plain Python
    with bar_in_notebook(None, describe_images("x"), delay=0) as progress:
        assert progress is None
    assert kernel == []
