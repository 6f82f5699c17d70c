"""``featcache examples``: each file is run as far as this machine can: the service for real, commands of workflows in their order."""

import asyncio
import base64
import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from conftest import TINY_FLAGS, make_photos, write_photo
from damage import bombs
from faults import Program, with_variables
from test_same_result import assert_same

from featcache.cache.cache import FeatureCache
from featcache.cli.app import app as command_line
from featcache.errors import ModelError

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "featcache" / "examples"
COMMANDS: Any = typer.main.get_command(command_line)


def test_examples_are_listed_and_printed_whole(run) -> None:
    names = sorted(path.name for path in EXAMPLES.iterdir() if not path.name.startswith("__"))
    code, out, _ = run("examples")
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == names
    assert all(len(line.split()) > 5 for line in out.splitlines())
    assert run("examples", "dvc.yaml") == (0, (EXAMPLES / "dvc.yaml").read_text(), "")
    assert json.loads(run("examples", "service.py", "--json")[1])["text"] == (EXAMPLES / "service.py").read_text()
    code, _, err = run("examples", "../errors.py")
    assert code == 2 and err == f"error: no example is called ../errors.py; there are {', '.join(names)}\n"


# --------------------------------------------------------------------------------------------------- the service


@pytest.fixture(scope="module")
def client(trained: Path) -> Iterator[Any]:
    pytest.importorskip("fastapi")
    from starlette.testclient import TestClient

    from featcache.examples.service import make_app

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEATCACHE_MODEL", str(trained / "m"))
        with TestClient(make_app()) as found:
            yield found


def ask(client: Any, images: list[bytes]) -> Any:
    return client.post("/predict", json={"images": [base64.b64encode(image).decode() for image in images]})


def test_the_service_answers_as_predict_does(client: Any, trained: Path, run) -> None:
    photos = [next((trained / "photos" / name).iterdir()) for name in ("blue", "green", "red")]
    rows = ask(client, [photo.read_bytes() for photo in photos]).json()["rows"]
    lines = [line.split(",") for line in run("-q", "predict", trained / "m", *photos)[1].splitlines()[1:]]
    assert [row["label"] for row in rows] == ["blue", "green", "red"] == [line[1] for line in lines]
    assert [round(row["probability"], 6) for row in rows] == [float(line[2]) for line in lines]
    assert client.get("/health").json()["classes"] == ["blue", "green", "red"]


def test_the_service_refuses_damaged_images_with_the_reason_and_labels_the_others(client: Any, trained: Path) -> None:
    good = next((trained / "photos" / "red").iterdir()).read_bytes()
    bombed = [case.data for case in bombs(np.zeros((9, 9, 3), np.uint8)) if case.fate == "refused"]
    bad = [b"", b"<svg onload=alert(1)>", good[:300], *bombed]
    response = ask(client, [good, *bad, good])
    first, *others, last = response.json()["rows"]
    assert (response.status_code, first["label"], last) == (200, "red", first)
    assert len(others) == len(bad)
    for row in others:
        assert row["status"] == "refused" and row["reason"] and row["label"] is None, row
    assert "/tmp" not in response.text and "000.jpg" not in response.text  # nothing of this machine


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", 422),
        (b"{", 422),
        (b'{"images": []}', 422),
        (b'{"images": "x"}', 422),
        (b'{"images": [1]}', 422),
        (b'{"images": ["A"]}', 422),
        (json.dumps({"images": ["AA=="] * 65}).encode(), 422),
        (b"[" * 100_000, 422),
        (b'{"images": ["' + b"A" * 33 * 2**20 + b'"]}', 413),
    ],
)
def test_the_service_refuses_what_is_no_batch(client: Any, body: bytes, code: int) -> None:
    response = client.post("/predict", content=body)
    assert response.status_code == code and len(response.content) < 1000


def test_the_service_reads_no_further_than_it_may(client: Any) -> None:
    """Whatever length a request states: this one states none, and never ends."""
    pieces, answers = 0, []

    async def receive() -> dict[str, Any]:
        nonlocal pieces
        pieces += 1
        return {"type": "http.request", "body": b" " * 2**20, "more_body": True}

    async def send(message: dict[str, Any]) -> None:
        answers.append(message)

    scope = {"type": "http", "method": "POST", "path": "/predict", "headers": [], "query_string": b""}
    asyncio.run(client.app(scope, receive, send))
    assert (answers[0]["status"], pieces) == (413, 33)


def test_the_service_does_not_start_without_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fastapi")
    from featcache.examples.service import make_app

    monkeypatch.setenv("FEATCACHE_MODEL", str(tmp_path / "none"))
    with pytest.raises(ModelError, match="does not exist"):
        make_app()


# --------------------------------------------------------------------------------------------------- workflows


def commands_of(text: str) -> list[list[str]]:
    """Each command of ours in a text, as words."""
    names = "|".join([*COMMANDS.commands, "merge"])
    return [shlex.split(found) for found in re.findall(rf"featcache (?:-q )?(?:{names}) [^\n>]*", text)]


def test_dvc_stages_make_what_they_say(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    yaml = pytest.importorskip("yaml")
    stages = yaml.safe_load((EXAMPLES / "dvc.yaml").read_text())["stages"]
    monkeypatch.chdir(tmp_path)
    make_photos(Path("photos"), each=6)
    there = {"photos"}
    for stage in stages.values():
        assert set(stage["deps"]) <= there  # in their order
        command, _, target = stage["cmd"].replace("--backbone resnet50", " ".join(TINY_FLAGS)).partition(" > ")
        code, out, err = run(*shlex.split(command)[1:])
        assert code == 0, err
        if target:
            Path(target).write_text(out)
        for output in [*stage.get("outs", ()), *stage.get("metrics", ())]:
            there |= {output} if isinstance(output, str) else output.keys()
        assert all(Path(name).exists() for name in there)
    assert json.loads(Path("scores.json").read_text())["n"] == 18


@pytest.mark.parametrize("name", ["Snakefile", "slurm.sh", "Dockerfile", "dvc.yaml"])
def test_commands_in_examples_are_ours(name: str) -> None:
    """Every command and option there is; what another version would have to have is found here."""
    found = commands_of((EXAMPLES / name).read_text().replace('"', " "))
    assert len(found) >= (1 if name == "Dockerfile" else 3)
    for _, command, *words in ([word for word in words if word != "-q"] for words in found):
        if command == "merge" and "merge" not in COMMANDS.commands:
            continue
        options = {name for param in COMMANDS.commands[command].params for name in param.opts}
        unknown = {word for word in words if word.startswith("-")} - options
        assert unknown <= ({"--part"} if "merge" not in COMMANDS.commands else set())


# Runs what it is given at once, each task of an array with the variables that Slurm sets; prints a number as --parsable does.
SBATCH = """#!/bin/bash
echo "$*" >> "$JOBS"
for word in "$@"; do case $word in --wrap=*) job=${word#--wrap=};; --array=1-*) count=${word#--array=1-};; esac; done
for task in $(seq "${count:-1}"); do
  if [ "${count:-}" ]; then export SLURM_ARRAY_TASK_ID=$task SLURM_ARRAY_TASK_COUNT=$count; fi
  sh -c "$job" >&2 || exit 1
done
wc -l < "$JOBS"
"""


def test_slurm_jobs_follow_each_other_whatever_folders_are_called(tmp_path: Path) -> None:
    if shutil.which("bash") is None:
        pytest.skip("no bash")
    for name, text in (
        ("sbatch", SBATCH),
        ("featcache", '#!/bin/sh\nprintf "%s|" "$SLURM_ARRAY_TASK_ID" "$@" >> "$CALLS"'),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    files = {"JOBS": str(tmp_path / "jobs"), "CALLS": str(tmp_path / "calls")}
    environment = (
        os.environ | files | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PARTS": "2", "EXTRACT": "--crop 32"}
    )
    words = ["my photos; $(rm x)", "it's.h5", "m o"]
    subprocess.run(["bash", EXAMPLES / "slurm.sh", *words], env=environment, check=True, capture_output=True)
    photos, features, model = words
    extract = "|".join(["extract", photos, "-o", features, "--part", "auto", "--crop", "32", ""])
    fit = "|".join(["", "fit-head", features, "-o", model, ""])
    assert (tmp_path / "calls").read_text() == f"1|{extract}2|{extract}|merge|{features}|{fit}"
    jobs = (tmp_path / "jobs").read_text().splitlines()
    assert ["--dependency=afterok:1" in jobs[1], "--dependency=afterok:2" in jobs[2]] == [True, True]


def stand_in(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, warm: Program) -> Path:
    """A folder with photos, and what one run makes of them."""
    folder = tmp_path_factory.mktemp("alone")
    make_photos(folder / "photos", settled=True)
    warm.check("extract", folder / "photos", "-o", folder / "whole.h5", *TINY_FLAGS)
    return folder


def calls_of(script: list[Any], folder: Path, **environ: str) -> list[tuple[dict[str, str], list[str]]]:
    """The ``featcache`` commands that a shell runs for ``script``, in ``folder``, each with Slurm's variables there."""
    names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT")
    values = " ".join(f'":${name}"' for name in names)
    stand_in(folder, "featcache", f"#!/bin/sh\nprintf '%s\\0' {values} \"$@\" '' >> \"$CALLS\"\n")
    stand_in(folder, "sbatch", SBATCH)
    files = {"JOBS": str(folder / "jobs"), "CALLS": str(folder / "calls")}
    path = {"PATH": f"{folder}:{os.environ['PATH']}"}
    subprocess.run(script, env=os.environ | files | path | environ, cwd=folder, check=True, capture_output=True)
    calls = [call.split("\0") for call in (folder / "calls").read_text().split("\0\0")[:-1]]
    return [
        ({name: value[1:] for name, value in zip(names, call, strict=False) if value != ":"}, call[2:])
        for call in calls
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["slurm.sh", "README", "kubernetes.yaml"])
def test_what_a_scheduler_starts_makes_what_one_run_makes(
    alone: Path, tmp_path: Path, warm: Program, name: str
) -> None:
    """The very text that people see; only who starts it, with which variables, is made up."""
    photos, output = shutil.copytree(alone / "photos", tmp_path / "photos"), tmp_path / "features.h5"
    if name == "slurm.sh":
        words = ["bash", EXAMPLES / name, photos, output, tmp_path / "model"]
        calls = calls_of(words, tmp_path, PARTS="2", EXTRACT=" ".join(TINY_FLAGS))
    elif name == "README":
        section = (ROOT / "README.md").read_text().split("\n## More machines, other tools\n")[1]
        sbatch, *_, merge = section.split("```")[1].splitlines()[1:]
        asked, auto = " ".join(TINY_FLAGS), '--part auto"'
        assert sbatch.count(auto) == sbatch.count("--array=1-64") == 1
        script = sbatch.replace("1-64", "1-2").replace(auto, f'{auto[:-1]} {asked}"') + "\n" + merge
        calls = calls_of(["bash", "-c", script], tmp_path)
    else:
        embed, pack = pytest.importorskip("yaml").safe_load_all((EXAMPLES / name).read_text())
        count = embed["spec"]["completions"]
        args, last = (job["spec"]["template"]["spec"]["containers"][0]["args"] for job in (embed, pack))
        assert embed["spec"]["completionMode"] == "Indexed" and args[-1] == f"auto/{count}"
        args = [word.replace(f"auto/{count}", "auto/2") for word in args]  # 16 starts would show no more
        shares = [({"JOB_COMPLETION_INDEX": str(index)}, [*args, *TINY_FLAGS]) for index in (1, 0)]
        assert warm.run(*last, before=with_variables({}, folder=tmp_path)).code == 1  # and the Job tries again
        calls = [*shares, ({}, last)]
    assert [call[0] for _, call in calls[:3]] == ["extract", "extract", "merge"]
    for variables, call in calls:
        warm.check(*call, before=with_variables(variables, folder=tmp_path))
    assert (tmp_path / "model" / "model.json").exists() == (name == "slurm.sh")
    assert_same(output, FeatureCache.open(alone / "whole.h5"))


def test_the_dockerfile_names_what_there_is() -> None:
    """Parsed, not built: that takes Docker and a network."""
    lines = re.sub(r"\\\n", " ", (EXAMPLES / "Dockerfile").read_text()).splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    assert steps[0][0] == "FROM" and {step[0] for step in steps} <= {
        "ARG",
        "FROM",
        "RUN",
        "COPY",
        "ENV",
        "WORKDIR",
        "ENTRYPOINT",
        "CMD",
    }
    for _, words in (step for step in steps if step[0] == "COPY"):
        *sources, target = words.split()
        assert all((ROOT / source).exists() for source in sources) and target.startswith("/src")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = re.search(r"/src\[([\w,]+)\]", " ".join(lines))
    assert extras and set(extras[1].split(",")) <= project["optional-dependencies"].keys()
    python = re.fullmatch(r"python:3\.(\d+)-slim", steps[0][1])
    assert python and int(python[1]) >= int(project["requires-python"].removeprefix(">=3."))
    assert [json.loads(words) for name, words in steps if name in ("ENTRYPOINT", "CMD")] == [["featcache"], ["--help"]]


@pytest.mark.slow
def test_snakemake_embeds_only_new_photos(tmp_path: Path) -> None:
    """Where snakemake is installed, for which CI has no need."""
    if (snakemake := shutil.which("snakemake")) is None or shutil.which("featcache") is None:
        pytest.skip("no snakemake")
    shutil.copy(EXAMPLES / "Snakefile", tmp_path)
    photos = make_photos(tmp_path / "photos", each=4)
    command = [snakemake, "--cores", "1", "--config", "backbone=timm/tf_efficientnet_lite0"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert json.loads((tmp_path / "scores.json").read_text())["n"] == 12
    write_photo(photos / "red" / "new.jpg", (210, 40, 30), 99)
    again = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert "embedded 1, reused 12" in again.stdout + again.stderr
    assert json.loads((tmp_path / "scores.json").read_text())["n"] == 13
