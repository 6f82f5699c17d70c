"""Wrong usage: one line, exit code 2, and what was probably meant."""

import json
import shlex

import pytest
import typer

from featcache.cli import app, usage

SPLITS = (
    "splits come from folders called train, val and test, or from a column of the table, as `featcache split` writes"
)
EXTRACT = "as in: featcache extract photos/ -o features.h5"

ANSWERS = {
    # another word for a command
    "train photos -o m": "no command is called train; did you mean fit-head (on cached embeddings) or finetune (end to end)?",
    "fit f.h5 -o m": "no command is called fit; did you mean fit-head?",
    "embed photos": "no command is called embed; did you mean extract?",
    "embeddings photos": "no command is called embeddings; did you mean extract?",
    "features photos": "no command is called features; did you mean extract?",
    "infer m x.jpg": "no command is called infer; did you mean predict?",
    "inference m x.jpg": "no command is called inference; did you mean predict?",
    "classify m x.jpg": "no command is called classify; did you mean predict?",
    "test m photos": "no command is called test; did you mean evaluate?",
    "eval m photos": "no command is called eval; did you mean evaluate?",
    "val m photos": "no command is called val; did you mean evaluate?",
    "score m photos": "no command is called score; did you mean evaluate?",
    "fine-tune photos": "no command is called fine-tune; did you mean finetune?",
    "fine_tune photos": "no command is called fine_tune; did you mean finetune?",
    "finetuning photos": "no command is called finetuning; did you mean finetune?",
    "list": "no command is called list; did you mean backbones?",
    "models": "no command is called models; "
    "did you mean info (about a saved model or cache) or backbones (names for --backbone)?",
    "version": "no command is called version; did you mean featcache --version?",
    "help extract": "no command is called help; did you mean featcache COMMAND --help?",
    "convert m": "no command is called convert; did you mean export?",
    "onnx m": "no command is called onnx; did you mean export?",
    "check f.h5": "no command is called check; did you mean verify (a cache's checksums) or doctor (this machine)?",
    # a command misspelt, none, or none at all
    "exctract photos": "no command is called exctract; did you mean extract?",
    "fit_head f.h5": "no command is called fit_head; did you mean fit-head?",
    "trian f.h5": "no command is called trian; did you mean fit-head (on cached embeddings) or finetune (end to end)?",
    "Predict m x.jpg": "no command is called Predict; did you mean predict?",
    "photos": "no command is called photos; featcache --help lists them all",
    "-q": "a command is missing; featcache --help lists them",
    # another word for an option
    "extract photos -o f.h5 --gpu": "extract has no option --gpu; did you mean --device cuda?",
    "extract photos --out f.h5": "extract has no option --out; did you mean -o?",
    "extract photos --output-dir f": "extract has no option --output-dir; did you mean -o?",
    "extract photos -o f.h5 --model resnet18": "extract has no option --model; did you mean --backbone?",
    "extract photos -o f.h5 --num_workers 4": "extract has no option --num_workers; did you mean --workers?",
    "extract photos -o f.h5 -b 4": "extract has no option -b; did you mean --batch-size?",
    "extract photos -o f.h5 --imgsz 224": "extract has no option --imgsz; did you mean --resize or --crop?",
    "extract photos -o f.h5 --half": "extract has no option --half; did you mean --precision fp16?",
    "finetune photos -o m --model m0": "finetune has no option --model; did you mean --backbone or --init?",
    "finetune photos -o m --learning-rate 1": "finetune has no option --learning-rate; did you mean --lr?",
    "finetune photos -o m --optimizer sgd": "finetune has no option --optimizer; did you mean --set?",
    "fit-head f.h5 -o m --reg 1": "fit-head has no option --reg; did you mean --C?",
    "fit-head f.h5 -o m --val 0.1": f"fit-head has no option --val; {SPLITS}",
    "evaluate m photos --subset val": "evaluate has no option --subset; did you mean --split?",
    "predict m x.jpg --force": "predict has no option --force; did you mean --overwrite?",
    "predict --model m x.jpg": "predict has no option --model; "
    "MODEL stands without one, as in: featcache predict model/ photo.jpg",
    "extract --data photos -o f.h5": f"extract has no option --data; SOURCE stands without one, {EXTRACT}",
    "export m --format onnx": "export has no option --format; the ending of the file that -o names says its format",
    # an option misspelt, of another command, none at all
    "extract photos -o f.h5 --bacbone x": "extract has no option --bacbone; did you mean --backbone?",
    "extract photos -o f.h5 --batchsize 8": "extract has no option --batchsize; did you mean --batch-size?",
    "extract photos -o f.h5 --quite": "extract has no option --quite; did you mean --quiet?",
    "fit-head f.h5 -o m --c 1": "fit-head has no option --c; did you mean --C?",
    "extract photos -o f.h5 --patience 5": "extract has no option --patience; finetune has it",
    "extract photos -o f.h5 --early-stopping": "extract has no option --early-stopping; finetune has --patience",
    "extract photos -o f.h5 --zzz": "extract has no option --zzz; featcache extract --help shows all",
    "extract photos -output f.h5": "no option is called -output; did you mean --output?",
    "--verison": "no option is called --verison; did you mean --version?",
    "--bogus": "no option is called --bogus; featcache --help shows all",
    "--backbone resnet18 extract": f"--backbone stands behind a command, {EXTRACT} --backbone",
    # something missing, or too much of it
    "extract": f"extract needs SOURCE, {EXTRACT}",
    "extract photos": "extract needs -o: add -o features.h5",
    "predict m": "predict needs INPUTS, as in: featcache predict model/ photo.jpg",
    "extract photos -o": "-o needs a value: -o features.h5",
    "extract photos -o f.h5 --backbone": "--backbone needs a value: --backbone NAME",
    "extract photos -o --backbone resnet18": "-o needs a value (FILE), found the option --backbone behind it",
    "extract photos -o --force": "-o needs a value (FILE), found the option --force behind it",
    "extract my photos -o f.h5": "extract takes only SOURCE, found more: photos; put a name with spaces into quotes",
    "backbones a b": "backbones takes only PATTERN, found more: b; put a name with spaces into quotes",
    "extract photos -o f.h5 --force=yes": "--force takes no value; write it alone",
    # a value of another type
    "extract photos -o f.h5 --limit many": "--limit must be a whole number from 1, found 'many'",
    "extract photos -o f.h5 --limit=0": "--limit must be a whole number from 1, found '0'",
    "extract photos -o f.h5 --class-level 4": "--class-level must be a whole number from 1 to 3, found '4'",
    "extract photos -o f.h5 --max-bad 5%": "--max-bad must be a number from 0 to 1, found '5%'",
    "extract photos -o f.h5 --batch-size many": "--batch-size must be auto or a whole number from 1, found 'many'",
    "fit-head f.h5 -o m --seed x": "--seed must be a whole number from 0 to 4294967295, found 'x'",
    "finetune photos -o m --lr fast": "--lr must be a number, found 'fast'",
}


@pytest.mark.parametrize("typed", ANSWERS)
def test_one_line_says_what_was_meant(run, typed: str) -> None:
    assert run(*shlex.split(typed)) == (2, "", f"error: {ANSWERS[typed]}\n")


@pytest.mark.parametrize("typed", ["exctract photos", "extract photos", "extract photos -o f.h5 --gpu", "info"])
def test_the_object_holds_the_same_line(run, typed: str) -> None:
    code, out, err = run(*shlex.split(typed), "--json")
    error = json.loads(out)["error"]
    assert (code, error["exit_code"], err) == (2, 2, f"error: {error['message']}\n")


def test_what_follows_two_dashes_is_no_option(run) -> None:
    assert run("info", "--", "-output")[2].startswith("error: -output does not exist")


def test_a_name_commands_no_terminal(run) -> None:
    code, out, err = run("extract", "photos", "-o", "f.h5", "--\x1b[31m\n")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "\x1b" not in err


def test_what_typer_may_say_one_day_stays_one_line(run, monkeypatch: pytest.MonkeyPatch) -> None:
    class NewError(Exception):
        show = None

        def format_message(self) -> str:
            return "Usage: featcache\n\n Nothing like this\x1b[31m\n"

    def refuse(*_: object) -> None:
        raise NewError

    monkeypatch.setattr("featcache.cli.help.Command.parse_args", refuse)
    assert run("info", "x") == (2, "", "error: Usage: featcache Nothing like this\\x1b[31m\n")


def test_every_word_leads_to_something_that_is_there() -> None:
    commands = typer.main.get_command(app.app).commands
    known = {name for command in commands.values() for param in command.params for name in (*param.opts, param.metavar)}
    assert {target for target in usage._COMMANDS if not target.startswith("featcache ")} == set(commands)
    assert {target.split()[0] for target in usage._OPTIONS if not target[0].islower()} <= known
