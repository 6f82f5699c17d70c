"""The command line: what it prints where, and how it exits."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import COLOURS, TINY_FLAGS, make_photos, write_photo
from PIL import Image

from featcache.backbones.backbone import OFFLINE_BACKBONE
from featcache.cache.cache import FeatureCache
from featcache.cli import options
from featcache.cli.demo import write_digits
from featcache.errors import UsageError
from featcache.images.source import list_images
from featcache.models.model import load_model

QUICK = ["--epochs", "1", "--batch-size", "6", "--precision", "fp32"]


def last_json(out: str) -> dict:
    return json.loads(out.splitlines()[-1])


def test_three_commands(tmp_path: Path, run) -> None:
    photos = make_photos(tmp_path / "photos", each=8, splits=("train", "val", "test"))
    cache, model = tmp_path / "f.h5", tmp_path / "m"

    code, out, _ = run("extract", photos, "-o", cache, *TINY_FLAGS, "--json")
    assert code == 0
    facts = last_json(out)
    assert len(out.splitlines()) == 1
    assert {"cache", "reused", "removed", "refused", "seconds", "images_per_second"} <= set(facts)
    assert (facts["images"], facts["embedded"], facts["dim"]) == (72, 72, 512)

    code, out, _ = run("fit-head", cache, "-o", model, "--self-contained", "--json")
    assert code == 0
    facts = last_json(out)
    assert facts["clf"] == "logreg"
    assert facts["val_accuracy"] == facts["test_accuracy"] == 1.0

    code, out, _ = run(
        "predict", model, photos / "val" / "red" / "00.jpg", photos / "test" / "blue", "--top-k", 2, "--probs", "--json"
    )
    assert code == 0
    rows = out.splitlines()
    assert rows[0] == "path,label,probability,status,reason,label_2,probability_2,prob:blue,prob:green,prob:red"
    assert [row.split(",")[1] for row in rows[1:-1]] == ["red"] + ["blue"] * 8
    assert json.loads(rows[-1])["labelled"] == 9

    code, out, _ = run("predict", model, photos / "val", "-o", tmp_path / "out.jsonl")
    assert (code, out.count("\n")) == (0, 1)
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 24

    code, out, _ = run("evaluate", model, cache, "--json")
    assert (code, last_json(out)["accuracy"], last_json(out)["split"]) == (0, 1.0, "test")

    for path in (cache, model):
        code, out, _ = run("info", path, "--json")
        assert code == 0
        assert last_json(out)["fingerprint"]
        assert run("info", path)[0] == 0
    assert run("verify", cache, "--json")[0] == 0


def test_exit_codes(tmp_path: Path, run) -> None:
    photos = make_photos(tmp_path / "photos", each=2)
    (photos / "red" / "bad.jpg").write_text("no image")
    arguments = ("extract", photos, "-o", tmp_path / "f.h5", *TINY_FLAGS)
    code, out, err = run(*arguments, "--json")
    assert (code, last_json(out)["refused"]) == (3, 1)
    assert "more than --max-bad 0.05 allows" in err
    assert run(*arguments, "--max-bad", 0.5)[0] == 0
    for wrong in (
        ("extract", photos),
        ("extract", photos, "-o", tmp_path / "f.h5", "--batch-size", "many"),
        ("extract", photos, "-o", tmp_path / "f.h5", "--batch-size", "99999999"),
        ("extract", photos, "-o", tmp_path / "f.h5", "--resize", "axb"),
        ("extract", photos, "-o", tmp_path / "f.h5", "--device", "abacus"),
        ("extract", photos, "-o", tmp_path / "g.h5", *TINY_FLAGS, "--device", "cuda:77"),
        ("fit-head", tmp_path / "f.h5", "-o", tmp_path / "m", "--C", "small"),
        ("fit-head", tmp_path / "f.h5", "-o", tmp_path / "m", "--seed", "-1"),
        ("predict", tmp_path / "m", photos, "-o", tmp_path / "out.txt"),
        ("nonsense",),
    ):
        assert run(*wrong)[0] == 2, wrong
    for failing in (
        ("extract", tmp_path / "nowhere", "-o", tmp_path / "g.h5"),
        ("extract", photos, "-o", tmp_path / "no" / "g.h5"),
        ("extract", photos, "-o", photos),
        ("extract", photos, "-o", tmp_path / "g.h5", "--backbone", "resnet51"),
        ("fit-head", tmp_path / "nowhere.h5", "-o", tmp_path / "m"),
        ("predict", tmp_path / "nowhere", photos),
        ("info", tmp_path / "nowhere"),
    ):
        code, out, err = run(*failing)
        assert (code, out, err.count("\n")) == (1, "", 1), (failing, err)
        assert err.startswith("error: ")


def test_texts_of_options() -> None:
    assert (options.count("auto", "workers"), options.number("auto", "C"), options.size("auto")) == (None, None, None)
    assert (options.count("3", "workers"), options.number("0.5", "C")) == (3, 0.5)
    assert (options.size("40"), options.size("40x30")) == (40, (40, 30))
    for convert, text in ((options.count, "0"), (options.count, "1.5"), (options.count, "²"), (options.number, "few")):
        with pytest.raises(UsageError, match=f"^--head-C must be auto or .*, found {text!r}$"):
            convert(text, "head C")
    for text in ("axb", "40x", "x40", "0"):
        with pytest.raises(UsageError, match="resize must be auto or a whole number"):
            options.size(text)


def test_all_refused_still_writes_the_rows(trained: Path, tmp_path: Path, run) -> None:
    (tmp_path / "bad.jpg").write_text("no image")
    code, out, err = run("predict", trained / "m", tmp_path / "bad.jpg")
    assert code == 1
    assert out.splitlines()[1].endswith('refused,"not an image, or of an unsupported format"')
    assert "not one image could be labelled" in err


@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_a_table_is_replaced_only_when_asked_and_never_if_it_is_the_input(
    trained: Path, tmp_path: Path, run, command: str
) -> None:
    table = tmp_path / "t.csv"
    table.write_text(f"path\n{trained / 'f.h5'}\n")
    (tmp_path / "link.csv").symlink_to(table)
    before = table.read_bytes()
    for output, words in (
        ((trained / "f.h5", "-o", table), "exists; choose another -o, or give --overwrite"),
        ((table, "-o", table), "is one of the inputs"),
        ((table, "-o", table, "--overwrite"), "is one of the inputs"),
        ((table, "-o", tmp_path / "link.csv", "--overwrite"), "is one of the inputs"),
        ((trained / "f.h5", "-o", trained / "m" / "t.csv"), "is a model folder, which keeps no other files"),
        ((trained / "f.h5", "--overwrite"), "add -o"),
    ):
        code, out, err = run(command, trained / "m", *output)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert words in err
        assert table.read_bytes() == before
    assert run(command, trained / "m", trained / "f.h5", "-o", table, "--overwrite")[0] == 0
    assert len(table.read_text().splitlines()) == 25


def test_evaluate_writes_rows_beside_its_scores(trained: Path, tmp_path: Path, run) -> None:
    for name in ("rows.csv", "rows.jsonl"):
        code, out, _ = run("evaluate", trained / "m", trained / "photos", "-o", tmp_path / name)
        assert (code, out.splitlines()[-1]) == (0, f"  24 rows: {tmp_path / name}")
    csv, jsonl = (tmp_path / name for name in ("rows.csv", "rows.jsonl"))
    header = "path,label,probability,status,reason,true_label,true_probability,correct,seen"
    assert csv.read_text().splitlines()[0] == header
    assert list(json.loads(jsonl.read_text().splitlines()[0])) == header.split(",")
    code, out, _ = run("evaluate", trained / "m", trained / "f.h5", "-o", csv, "--overwrite", "--json")
    facts = last_json(out)
    assert (code, facts["output"], facts["n"]) == (0, str(csv), 24)
    assert "rows" not in facts
    assert {"accuracy_interval", "balanced_accuracy", "macro_f1", "confusion"} <= set(facts)
    assert last_json(run("evaluate", trained / "m", trained / "f.h5", "--json")[1])["output"] is None
    before = csv.read_bytes()
    broken = ("evaluate", trained / "m", trained / "f.h5", "--split", "test", "-o", csv, "--overwrite")
    assert run(*broken)[0] == 1  # there is no test
    assert csv.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (
            ("--clf", "mlp", "--hidden", "20,9", "--dropout", "0.1"),
            0,
            "hidden 20, 9; dropout 0.1, 0.1; 3 epochs in steps of 8",
        ),
        (("--clf", "linear"), 0, "  3 epochs in steps of 8, lr 0.01"),
        (("--clf", "linear", "--hidden", "20"), 2, "hidden belongs to mlp, not to linear; leave it out"),
        (("--C", "1"), 2, "epochs belongs to linear and mlp, not to logreg; leave it out"),
        (("--clf", "mlp", "--hidden", "20;9"), 2, "hidden takes whole numbers with commas between them, found '20;9'"),
        (("--clf", "mlp", "--dropout", "1"), 2, "dropout must lie between 0 and below 1, found 1.0"),
    ],
)
def test_fit_head_takes_a_shape_and_how_to_train_it(
    trained: Path, tmp_path: Path, run, options: tuple, code: int, words: str
) -> None:
    how = ("--epochs", 3, "--lr", "0.01", "--batch-size", 8, "--folds", 0)
    found, out, err = run("fit-head", trained / "f.h5", "-o", tmp_path / "m", *options, *how)
    assert found == code
    assert words in (err if code else out)
    assert code or "  classes: blue, green, red\n" in out
    assert (tmp_path / "m").exists() == (code == 0)


@pytest.mark.parametrize(
    "command",
    [
        ("extract", "photos", "-o", "f.h5"),
        ("finetune", "photos", "-o", "ft", "--init", "m"),
        ("predict", "m", "f.h5"),
        ("evaluate", "m", "f.h5"),
        ("verify", "f.h5", "--repair", "photos"),
        ("doctor", "--seconds", "0"),
    ],
    ids=lambda command: command[0],
)
@pytest.mark.parametrize(
    ("option", "words"),
    [
        (("--device", "gpu"), "unknown device 'gpu'; choose auto, cpu, cuda, cuda:N or mps"),
        (("--device", "cuda:one"), "unknown device 'cuda:one'"),
        (("--workers", "5000"), "workers must lie between 1 and 1024, found 5000"),
    ],
    ids=str,
)
def test_what_no_machine_has_is_refused_also_where_nothing_is_computed(
    trained: Path, run, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], option: tuple[str, ...], words: str
) -> None:
    monkeypatch.chdir(trained)
    extra = TINY_FLAGS if command[0] == "extract" else []
    code, out, err = run(*command, *extra, *option)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err


def test_flat_folder_can_be_embedded_but_not_fitted(tmp_path: Path, run) -> None:
    for number in range(3):
        write_photo(tmp_path / "p" / f"{number}.png", (1, 2, 3), number)
    assert run("extract", tmp_path / "p", "-o", tmp_path / "f.h5", *TINY_FLAGS)[0] == 0
    code, _, err = run("fit-head", tmp_path / "f.h5", "-o", tmp_path / "m")
    assert code == 1
    assert "no labels" in err


def test_curves_are_drawn_beside_the_model(trained: Path, tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch) -> None:
    photos, start = trained / "photos", trained / "m"
    for name in ("a.curves.png", "a.val.png"):  # photos like any other
        write_photo(photos / "red" / name, COLOURS["red"], 1)
    before = list_images(photos).paths
    assert {"red/a.curves.png", "red/a.val.png"} < {*before}

    model, curves = photos / "ft", photos / "ft.curves.png"  # among the photos, where it must not become one
    code, out, err = run("finetune", photos, "--init", start, "-o", model, *QUICK, "--json")
    assert (code, last_json(out)["epochs"]) == (0, 1)
    report, sheet = photos / "ft.report.html", photos / "ft.val.png"
    assert err.endswith(f"  curves in {curves}\n  report in {report}\n  contact sheet in {sheet}\n")
    assert "data:image/webp" in report.read_text()  # of val, found by their digests
    with Image.open(curves) as image:
        assert (image.format, image.text["Software"]) == ("PNG", "featcache")
    assert not list(model.glob("*.png"))
    assert list_images(photos).paths == before

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    (tmp_path / "quick.toml").write_text("epochs = 1\nbatch-size = 6\nlr = 1\n")
    settings = (
        "--recipe",
        tmp_path / "quick.toml",
        "--set",
        "lr=1e-3",
        "--set",
        "hidden=9,8",
        "--set",
        "optimizer=sgd",
    )
    code, out, err = run("finetune", photos, "--init", start, "-o", tmp_path / "ft", *settings, *QUICK[-2:])
    assert code == 0
    training = load_model(tmp_path / "ft").manifest["training"]
    assert training["recipe"] == "quick.toml"
    expected = {"epochs": 1, "batch_size": 6, "lr": 0.001, "hidden": [9, 8], "optimizer": "sgd", "ema": 0.98}
    assert expected.items() <= training["settings"].items()
    assert "val: frozen head" in out
    assert out.endswith("metrics.json and history.csv\n")
    remedy = "figures need matplotlib: pip install 'featcache[report]'"
    assert f"no curves of {tmp_path / 'ft'}: {remedy}\n" in err
    assert (tmp_path / "ft" / "history.csv").is_file()


def test_the_log_is_short_and_says_more_when_asked(
    trained: Path, tmp_path: Path, run, caplog: pytest.LogCaptureFixture, bf16_arithmetic: bool
) -> None:
    """One line each for device and backbone, one on the precision where another could be chosen; figures only with -v."""

    def lines(*words: object) -> list[str]:
        caplog.clear()
        assert run(*words)[0] == 0
        return [
            record.getMessage() for record in caplog.records if not record.getMessage().startswith((" ", str(photos)))
        ]

    photos, flags = trained / "photos", TINY_FLAGS[: TINY_FLAGS.index("--precision")]
    said = lines("extract", photos, "-o", tmp_path / "f.h5", *flags)
    assert said[0].startswith("device ")
    assert said[1] == "backbone squeezenet1_1: 512 dimensions, weights random, seed 0; shorter side 40, middle 32 x 32"
    rest = [line for line in said[2:] if not line.startswith("decoder: JPEGs by Pillow; pip install")]
    told = re.fullmatch(
        r"precision float32: bf16 would change these embeddings by \d+\.\d % \(3.2 % is allowed\); -v shows more",
        "".join(rest),
    )
    assert bool(told) == bf16_arithmetic
    assert all(len(line) <= 100 for line in said)
    said = lines("extract", photos, "-o", tmp_path / "g.h5", *flags, "-v")
    assert (re.search("bf16 (fused|folded) cosine", "".join(said)) is not None) == bf16_arithmetic
    assert any(line.startswith("decoder: ") for line in said)
    new = [write_photo(tmp_path / "new" / f"{seed}.jpg", COLOURS["red"], seed) for seed in (998, 999)]
    for words in (("predict", trained / "m", new[0].parent), ("predict", trained / "m", new[0])):
        said = [line for line in lines(*words) if not line.startswith("decoder: JPEGs by Pillow; pip install")]
        assert [line.split()[0] for line in said] == ["device", "backbone"]
    assert "bf16" not in "".join(lines("-v", *words))  # which a single image cannot prove


def test_the_summary_names_classes_and_splits(tmp_path: Path, run) -> None:
    photos = make_photos(tmp_path / "photos", each=2, splits=("train", "test"))
    out = run("extract", photos, "-o", tmp_path / "f.h5", *TINY_FLAGS)[1].splitlines()
    assert out[:3] == [
        f"{tmp_path / 'f.h5'}: 12 embeddings of 512 dimensions",
        "  3 classes: blue, green, red; train 6, test 6",
        "  embedded 12, reused 0, refused 0; added 12, changed 0, removed 0",
    ]
    out = run("extract", photos / "train" / "red", "-o", tmp_path / "g.h5", *TINY_FLAGS)[1].splitlines()
    assert out[1] == "  no classes; no splits"
    for number in range(10):
        write_photo(tmp_path / "many" / f"c{number}" / "0.png", (number, 2, 3), number)
    out = run("extract", tmp_path / "many", "-o", tmp_path / "h.h5", *TINY_FLAGS)[1].splitlines()
    assert out[1] == "  10 classes: c0, c1, c2, c3, c4, c5, c6, c7, ...; no splits"


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        (
            "extract 'my photos' -o f.h5 --backbone resnet50",
            "featcache extract 'my photos' -o f.h5 --backbone BACKBONE",
        ),
        (
            "extract 'my photos' -o f.h5 --backbone resnet18 --weights IMAGENET1K_V1 --device cpu",
            "featcache extract 'my photos' -o f.h5 --device cpu --backbone BACKBONE",
        ),
        (
            "extract --backbone=resnet18 -o f.h5 -- 'my photos'",
            "featcache extract -o f.h5 --backbone BACKBONE -- 'my photos'",
        ),
        ("finetune 'my photos' -o m --backbone resnet18", "featcache finetune 'my photos' -o m --backbone BACKBONE"),
    ],
)
def test_without_a_network_the_command_that_works_is_shown(
    tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch, typed: str, answer: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    make_photos(Path("my photos"), each=3)
    code, out, err = run(*shlex.split(typed))
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("error: the weights IMAGENET1K_V1 of resnet")
    assert err.endswith(f"which is installed: {answer}\n".replace("BACKBONE", OFFLINE_BACKBONE))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--recipe", "list"), "no recipe is called 'list'; choose default ("),
        (("--recipe", "nowhere.toml"), "the recipe nowhere.toml is not a file"),
        (("--set", "learning"), "--set takes FIELD=VALUE"),
        (("--set", "epoch=3"), "did you mean epochs?"),
        (("--lr", "1", "--set", "lr=2"), "lr is given twice, by --lr and by --set lr=2; leave one out"),
        (("--set", 'augmentation=[["sharpen", 1]]'), "unknown augmentation 'sharpen'"),
        (("--set", "hidden=many"), "hidden must be a whole number from 1 to 1,000,000, found 'many'"),
        (("--set", "lr=\x1b[31m"), "lr must be a number from 0 to 1,000,000, found '\\x1b[31m'"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_before_any_work(
    trained: Path, tmp_path: Path, run, no_model: None, options: tuple, words: str
) -> None:
    code, out, err = run("finetune", trained / "photos", "--init", trained / "m", "-o", tmp_path / "ft", *options)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err
    assert not list(tmp_path.iterdir())


def test_lists(run) -> None:
    code, out, _ = run("backbones", "resnet50", "--all")
    assert code == 0
    assert {"resnet50", "wide_resnet50_2", "timm/resnet50"} <= set(out.split())
    assert run("--version")[1].startswith("featcache 0.")


def test_doctor_shows_facts(run) -> None:
    code, out, _ = run("doctor", "--seconds", 0, "--workers", 3, "--json")
    facts = last_json(out)
    assert code == 0
    assert {"runtime", "cores", "cpu", "gpus", "automatic", "decoders", "codecs", "packages", "hdf5"} <= set(facts)
    assert facts["automatic"]["workers"].startswith("3;")
    assert "measured" not in facts
    code, out, _ = run("doctor", "--seconds", 0)
    assert code == 0
    assert "torch_uses: " in out
    assert "FEATCACHE_KEEP_MEMORY=0" in out


def test_doctor_measures_photos_of_its_own(run) -> None:
    code, out, _ = run("doctor", "--seconds", 1, "--backbone", "squeezenet1_1", "--json")
    measured = last_json(out)["measured"]
    assert (code, len(out.splitlines())) == (0, 1)
    assert (measured["backbone"], measured["images"]) == ("squeezenet1_1", 64)
    assert measured["source"].startswith("generated photos")
    assert min(measured[name] for name in ("decode", "forward", "end_to_end", "ceiling", "efficiency")) > 0
    assert measured["limit"] in ("decode", "forward")
    assert "limits: it takes" in measured["advice"][0]
    assert "random weights" in measured["note"]
    assert all(cosines["min_cosine"] > 0.99 for cosines in measured["self_check"].values())


def test_doctor_measures_with_what_it_is_given(trained: Path, photos: Path, tmp_path: Path, run) -> None:
    tiny = ("doctor", "--images", photos, "--backbone", "squeezenet1_1", "--batch-size", 2)
    code, out, err = run(*tiny, "--seconds", 0.1)
    assert code == 0
    assert "\n  images: 18\n  median_shorter_edge: 47\n" in out
    assert "limits: it takes" in "".join(line for line in out.splitlines() if line.startswith(("Dec", "The")))
    assert "advice" not in out
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "0.jpg").write_text("no image")
    code, out, _ = run("doctor", "--images", photos, "--backbone", trained / "m", "--seconds", 0.1, "--json")
    assert (code, last_json(out)["measured"]["backbone"]) == (0, "squeezenet1_1")
    for expected, wrong in (
        (1, ("--images", tmp_path / "nowhere")),
        (1, ("--images", tmp_path / "nowhere", "--seconds", 0)),
        (1, ("--images", tmp_path / "bad")),
        (1, ("--backbone", "resnet51")),
        (2, ("--device", "abacus")),
        (2, ("--workers", "many", "--seconds", 0)),
        (2, ("--precision", "int8")),
        (2, ("--seconds", -1)),
        (2, ("--seconds", "nan")),
    ):
        code, out, err = run(*tiny, *wrong)
        assert (code, out) == (expected, ""), (wrong, err)


@pytest.mark.parametrize(
    "command", ["-", "extract", "fit-head", "predict", "evaluate", "info", "verify", "backbones", "doctor", "demo"]
)
def test_help(run, command: str) -> None:
    code, out, _ = run(*([] if command == "-" else [command]), "--help")
    assert code == 0
    assert "Usage: featcache" in out
    assert "featcache" in out.split("Usage:")[1]


def test_help_is_quick_because_nothing_heavy_is_imported() -> None:
    script = (
        "import sys; from featcache.cli import app as cli; sys.argv = ['featcache', '--help']\n"
        "try: cli.main()\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'torchvision', 'sklearn', 'h5py', 'numpy', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_demo_writes_the_digits_once(tmp_path: Path) -> None:
    assert write_digits(tmp_path) == 1797
    files = sorted(tmp_path.rglob("*.png"))
    assert len(files) == 1797
    assert {path.parent.name for path in files} == set("0123456789")
    before = files[0].stat().st_mtime_ns
    write_digits(tmp_path)
    assert files[0].stat().st_mtime_ns == before


def test_the_level_of_classes_reaches_every_listing(tmp_path: Path, cache: Path, model: Path, run) -> None:
    """Places with species in them: refused by every command that takes a source, and read as it is told to."""
    for folder in ("north/deer", "north/fox", "south/fox"):
        write_photo(tmp_path / "sites" / folder / "0.jpg", (1, 2, 3), 1)
    broken = tmp_path / "broken.h5"
    row = FeatureCache.open(cache).X[7].tobytes()
    broken.write_bytes(cache.read_bytes().replace(row, row[::-1]))
    sites = tmp_path / "sites"
    for command in (
        ("extract", sites, "-o", tmp_path / "g.h5"),
        ("finetune", sites, "-o", tmp_path / "ft"),
        ("evaluate", model, sites),
        ("verify", broken, "--repair", sites),
    ):
        code, _, err = run(*command)
        assert code == 1 and "say --class-level 1 if" in err, (command, err)
        code, _, err = run(*command, "--class-level", 3)
        assert code == 2 and f"{sites} has no image 3 folders deep" in err, (command, err)
    for command in (("evaluate", model, cache), ("verify", cache)):
        code, _, err = run(*command, "--class-level", 2)
        assert code == 2 and "leave" in err, (command, err)
