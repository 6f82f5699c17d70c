"""What is said about wrong usage: one line, with the command or option that was probably meant.

In: what typer refused, and all commands. Out: the line. Words that people know from elsewhere are in two tables.
"""

import difflib
import itertools
import re
import shlex
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from featcache.errors import UsageError

# Commands, and what else people call them. Where a word fits several, all are named.
_COMMANDS = {
    "extract": "embed embeddings embedding encode features feature feature-extraction featurize vectorize cache preprocess",
    "merge": "pack combine join gather parts shards",
    "fit-head": "train training fit head probe linear-probe classifier logreg",
    "finetune": "train training finetuning tune tuning transfer unfreeze",
    "audit": "clean curate duplicates dedup dedupe copies outliers label-errors mislabelled quality",
    "predict": "infer inference classify label prediction run",
    "evaluate": "eval evaluation val validate test score scores metrics accuracy benchmark",
    "report": "page html dashboard results visualize visualise confusion confusion-matrix errors mistakes",
    "export": "convert onnx save deploy safetensors parquet faiss fiftyone",
    "import": "load ingest from-parquet",
    "preview": "augment augmentation augmentations transforms",
    "stats": "statistics eda explore count analyze analyse summary",
    "split": "train-test-split splitfolders partition divide holdout hold-out stratify manifest",
    "info": "show inspect describe summary models",
    "verify": "check validate-cache repair fix mend",
    "backbones": "list models model-list list-models archs networks",
    "doctor": "check bench benchmark speed env system settings checks",
    "demo": "example tutorial quickstart",
    "examples": "example recipe recipes template templates docker dockerfile slurm snakemake dvc fastapi serve server service api",
    "featcache --version": "version",
    "featcache COMMAND --help": "help usage man",
}
_ABOUT = {
    "fit-head": "on cached embeddings",
    "finetune": "end to end",
    "stats": "of images",
    "info": "about a saved model or cache",
    "backbones": "names for --backbone",
    "verify": "a cache's checksums",
    "evaluate": "a model",
    "report": "a page about a model",
    "doctor": "this machine",
    "demo": "the whole job on digits",
    "examples": "files to copy",
}
# Options and arguments, and what else people call them: those count that the command has. Instead of an option, a sentence.
_OPTIONS = {
    "--output": "out outfile output-file output-dir output-path outdir out-dir save save-dir save-to save-path dest name project",
    "--backbone": "model arch architecture network net encoder model-name feature-extractor extractor m",
    "--init": "model checkpoint ckpt pretrained base head m",
    "--weights": "pretrained checkpoint ckpt pth state-dict",
    "--clf": "classifier head model head-type",
    "MODEL": "model weights checkpoint ckpt m",
    "CACHE": "features embeddings cache data dataset input file source i",
    "SOURCE": "data dataset data-dir dataset-dir images image-dir image-folder folder input input-dir source train-dir i",
    "INPUTS": "data dataset images image image-dir folder input inputs source file i",
    "--batch-size": "batch bs mini-batch b",
    "--workers": "num-workers n-workers jobs n-jobs threads num-threads cpus j w",
    "--device cuda": "gpu gpus cuda use-gpu use-cuda",
    "--device cpu": "cpu no-gpu no-cuda",
    "--device mps": "mps",
    "--device": "d",
    "--precision fp16": "fp16 half amp float16 mixed-precision",
    "--precision bf16": "bf16 bfloat16",
    "--precision fp32": "fp32 float32",
    "--resize": "image-size img-size imgsz size input-size imsz resolution",
    "--crop": "image-size img-size imgsz size input-size imsz crop-size center-crop",
    "--log tensorboard": "tensorboard tb",
    "--log mlflow": "mlflow",
    "--log wandb": "wandb",
    "--log": "logger loggers report-to tracker track with-tracking",
    "--eval-every": "eval-steps eval-interval val-every val-interval val-check-interval evaluation-steps",
    "--budget": "time-limit max-time time-budget max-seconds time",
    "--epochs": "num-epochs n-epochs max-epochs num-train-epochs epoch e n",
    "--lr": "learning-rate lr0 eta head-lr",
    "--C": "reg regularization regularisation l2",
    "--folds": "cv n-folds num-folds k-fold",
    "--seed": "random-state random-seed rng",
    "--top-k": "topk top k n",
    "--probs": "proba probabilities probability scores conf confidence softmax",
    "--overwrite": "force exist-ok clobber yes y f replace",
    "--force": "overwrite exist-ok clobber yes y f replace",
    "--limit": "max-images max-samples num-images n-images num-samples subset n",
    "--sample": "limit max-images max-samples num-images n-images num-samples subset n",
    "--max-bad": "ignore-errors skip-errors skip-bad skip-broken",
    "--split": "set subset val test train on",
    "--val": "val-size val-split val-ratio valid validation validation-split",
    "--test": "test-size test-split test-ratio",
    "--group-column": "group patient patient-column by group-by subject",
    "--copy-to": "copy",
    "--link-to": "link symlink hardlink",
    "--reassign": "force overwrite shuffle reshuffle",
    "--recipe": "config cfg preset",
    "--set": "optimizer optim scheduler schedule augment augmentation weight-decay momentum label-smoothing field param",
    "--hidden": "hidden-size hidden-sizes hidden-dim hidden-layers layers",
    "--unfreeze": "freeze freeze-backbone layers",
    "--resume": "continue",
    "--patience": "early-stopping",
    "--class-weight": "class-weights balanced weighted",
    "--repair": "fix mend",
    "splits come from folders called train, val and test, or from a column of the table, as `featcache split` writes": "val "
    "val-split val-size test test-size test-split train train-size valid validation validation-split split splits",
    "the ending of the file that -o names says its format": "format type",
}
_EVERYWHERE = ("--quiet", "--verbose", "--version", "--help")
_NEAR = 0.7  # of difflib's ratio: a letter left out, added or exchanged in a short word


def explain(error: Any, commands: Mapping[str, Any], examples: Mapping[str, str], words: Sequence[str]) -> str:
    """One line on what typer refused.

    Args:
        error: told apart by its class's name, as these classes have moved before.
        commands: all of them. examples: a runnable one of each. words: what was typed.
    """
    context, kind = getattr(error, "ctx", None), type(error).__name__
    name = context.command.name if context else next((word for word in words if word in commands), None)
    command: Any = commands.get(name or "")
    if kind == "NoSuchOption" and command:
        return _no_option(error.option_name, command, commands, examples)
    if kind == "NoSuchOption":
        return _no_option_alone(error.option_name, commands, examples)
    if kind == "UsageError" and command:
        return _too_many(error.message, command)
    if kind == "UsageError":
        return _no_command(next((word for word in words if not word.startswith("-")), None), commands)
    if kind == "MissingParameter" and command:
        return _missing(error.param, command.name, examples[command.name])
    if kind == "BadOptionUsage" and command and (param := _options(command).get(error.option_name)):
        needs = f"needs a value: {_as_typed(error.option_name, param, examples[command.name])}"
        return f"{error.option_name} {'takes no value; write it alone' if param.is_flag else needs}"
    if kind == "BadParameter" and command and value_type(command, error.param)[0] in (int, float):
        return _no_number(error.param, command, words)
    return " ".join(getattr(error, "format_message", error.__str__)().split())


def check_words(params: Iterable[Any], words: Sequence[str]) -> None:
    """Raise UsageError where typer would take one option for the value of another, or ``-output`` for ``-o utput``."""
    options = {name: param for param in params for name in param.opts if param.param_type_name == "option"}
    words = list(itertools.takewhile("--".__ne__, words))
    position = 0
    while position < len(words):
        word, *behind = words[position : position + 2]
        valued = word in options and not options[word].is_flag
        if valued and behind and behind[0] in options:
            raise UsageError(f"{word} needs a value ({options[word].metavar}), found the option {behind[0]} behind it")
        if word[1:2] != "-" and f"-{word.partition('=')[0]}" in options:
            raise UsageError(f"no option is called {word}; did you mean -{word}?")
        position += 1 + valued


def with_backbone(words: Sequence[str], backbone: str) -> str:
    """The command that was typed, with another backbone and its own weights: to be pasted into a shell."""
    options = list(itertools.takewhile("--".__ne__, words))
    kept, behind = [], words[len(options) :]
    while options:
        name, equals, _ = (word := options.pop(0)).partition("=")
        if name in ("--backbone", "--weights"):
            options = options if equals else options[1:]
        else:
            kept.append(word)
    return shlex.join(["featcache", *kept, "--backbone", backbone, *behind])


def value_type(command: Any, param: Any) -> tuple[Any, Any]:
    """The type of a parameter's value as its function names it, and the ``typer.Option`` beside it; None for typer's own."""
    annotation = typing.get_type_hints(command.callback, include_extras=True).get(param.name)
    if annotation is None:
        return None, None
    kind, option = typing.get_args(annotation)
    if isinstance(kind, types.UnionType):
        kind = typing.get_args(kind)[0]
    return typing.get_args(kind)[0] if typing.get_origin(kind) is list else kind, option


def _no_command(typed: str | None, commands: Iterable[str]) -> str:
    if typed is None:
        return "a command is missing; featcache --help lists them"
    words = {_plain(word): _with_word(word, _COMMANDS) for words in _COMMANDS.values() for word in words.split()}
    words |= {_plain(command): [command] for command in commands}
    near = difflib.get_close_matches(_plain(typed), words, n=1, cutoff=_NEAR)
    meant = words[near[0]] if near else []
    about = [f"{name} ({_ABOUT[name]})" if name in _ABOUT and len(meant) > 1 else name for name in meant]
    return f"no command is called {typed}; " + (
        f"did you mean {' or '.join(about)}?" if about else "featcache --help lists them all"
    )


def _no_option_alone(typed: str, commands: Mapping[str, Any], examples: Mapping[str, str]) -> str:
    """What an option before the command might mean."""
    if owner := next((name for name, other in commands.items() if typed in _options(other)), None):
        return f"{typed} stands behind a command, as in: {examples[owner]} {typed}"
    return f"no option is called {typed}" + (_did_you_mean(_near(typed, _EVERYWHERE)) or "; featcache --help shows all")


def _no_option(typed: str, command: Any, commands: Mapping[str, Any], examples: Mapping[str, str]) -> str:
    """What ``typed`` might mean: by another name, in another command, or misspelt."""
    options, none = _options(command), f"{command.name} has no option {typed}"
    synonyms = _with_word(typed, _OPTIONS)
    if own := [target for target in synonyms if target.split()[0] in options]:
        if not own[0].startswith("-"):
            return f"{none}; {own[0]} stands without one, as in: {examples[command.name]}"
        named = (target.split() for target in own if target.startswith("-"))
        return none + _did_you_mean([" ".join([options[first].opts[0], *value]) for first, *value in named])
    if sentence := next((target for target in synonyms if target[0].islower()), None):
        return f"{none}; {sentence}"
    if owners := [name for name, other in commands.items() if typed in _options(other)]:
        return f"{none}; {', '.join(owners[:3])} {'has' if len(owners) == 1 else 'have'} it"
    if near := _near(typed, [*options, *_EVERYWHERE]):
        return none + _did_you_mean(near)
    for target in synonyms:
        if owner := next((name for name, other in commands.items() if target.split()[0] in _options(other)), None):
            return f"{none}; {owner} has {target}"
    return f"{none}; featcache {command.name} --help shows all"


def _too_many(message: str, command: Any) -> str:
    spare = message.partition("(s) (")[2].removesuffix(")")
    takes = " ".join(param.metavar for param in command.params if param.param_type_name == "argument")
    return f"{command.name} takes only {takes or 'options'}, found more: {spare}; put a name with spaces into quotes"


def _missing(param: Any, command: str, example: str) -> str:
    if param.param_type_name == "argument":
        return f"{command} needs {param.metavar}, as in: {example}"
    return f"{command} needs {param.opts[0]}: add {_as_typed(param.opts[0], param, example)}"


def _no_number(param: Any, command: Any, words: Sequence[str]) -> str:
    kind, option = value_type(command, param)
    limits = [f"{word} {limit:.10g}" for word, limit in (("from", option.min), ("to", option.max)) if limit is not None]
    expected = " ".join(["a whole number" if kind is int else "a number", *limits])
    pairs = [(word.partition("="), behind) for word, behind in itertools.pairwise([*words, ""])]
    typed = (value if equals else behind for (name, equals, value), behind in pairs if name in param.opts)
    return f"{param.opts[0]} must be {expected}, found {next(typed, '')!r}"


def _options(command: Any) -> dict[str, Any]:
    """The parameters of a command by what is typed: options by their names, arguments in capitals."""
    pairs = ((param, param.opts if param.param_type_name == "option" else [param.metavar]) for param in command.params)
    return {name: param for param, names in pairs for name in names}


def _with_word(typed: str, table: Mapping[str, str]) -> list[str]:
    return [target for target, words in table.items() if _plain(typed) in map(_plain, words.split())]


def _near(typed: str, names: Iterable[str]) -> list[str]:
    plain = {_plain(name): name for name in names if name.startswith("--")}
    return [plain[near] for near in difflib.get_close_matches(_plain(typed), plain, n=1, cutoff=_NEAR)]


def _did_you_mean(names: Sequence[str]) -> str:
    return f"; did you mean {' or '.join(names)}?" if names else ""


def _as_typed(name: str, param: Any, example: str) -> str:
    """An option with a value: as in the example, else with the word for it."""
    found = re.search(rf"(?<!\S){re.escape(param.opts[0])} (\S+)", example)
    return f"{name} {found[1] if found else param.metavar}"


def _plain(word: str) -> str:
    return re.sub("[-_]", "", word).lower()
