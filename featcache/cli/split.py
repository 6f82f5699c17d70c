"""``split``: train, val and test, by a table or in folders. In: what was typed. Out: counts on stdout."""

from pathlib import Path
from typing import Annotated

import typer

from featcache.cli import options
from featcache.cli.console import note, show_result, show_steps


@options.reads_source
def split(
    source: Annotated[
        Path,
        typer.Argument(readable=False, help="Images: folders, archives or a table, as for extract; or a cache file."),
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="The table: a .csv, a source for extract.")
    ] = None,
    copy_to: Annotated[
        Path | None, typer.Option(metavar="FOLDER", readable=False, help="Copy the images to SPLIT/CLASS/ in it.")
    ] = None,
    link_to: Annotated[
        Path | None, typer.Option(metavar="FOLDER", readable=False, help="The same with hard links: no space taken.")
    ] = None,
    val: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Of all images: 0.1. Default: no val but what there is.")
    ] = None,
    test: Annotated[float | None, typer.Option(metavar="SHARE", help="Likewise.")] = None,
    groups: Annotated[
        str, typer.Option(help="What stays on one side: exact copies, near copies (of a cache), none.")
    ] = "exact",
    group_column: Annotated[
        str | None, typer.Option(help="Of a table: images with the same text in it stay on one side (patient, place).")
    ] = None,
    group_table: Annotated[
        Path | None,
        typer.Option(metavar="FILE", readable=False, help="The table that has this column. Default: SOURCE."),
    ] = None,
    reassign: Annotated[
        bool, typer.Option("--reassign", help="Deal all images anew, whatever splits they have.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Another one deals otherwise.")] = 0,
    pictures: Annotated[
        Path | None,
        typer.Option(
            "--source",
            metavar="FOLDER",
            readable=False,
            help="Of a cache: the folder of its images. Default: looked for near.",
        ),
    ] = None,
    reading: options.Reading = options.AS_FOUND,
    device: options.Device = "auto",
    workers: options.Readers = "auto",
    as_json: options.Json = False,
) -> None:
    """Deal images out to train, val and test, stratified, copies on one side.

    What has a split keeps it, by the source or by an earlier table at -o.
    """
    from featcache.curation.split import split as run
    from featcache.errors import UsageError

    if output is None and copy_to is None and link_to is None:
        raise UsageError("say what to write: a table, as -o manifest.csv, or folders, as --copy-to FOLDER")
    images = reading.of(source)
    with show_steps() as progress:
        made = run(
            images,
            output,
            val=val,
            test=test,
            groups=groups,  # type: ignore[arg-type]
            group_column=group_column,
            group_table=group_table,
            seed=seed,
            reassign=reassign,
            pictures=pictures,
            copy_to=copy_to,
            link_to=link_to,
            device=device,
            workers=options.count(workers, "workers"),
            progress=progress,
        )
    show_result(made.lines(), made.to_json(), as_json=as_json)
    note(f"  next: {made.next}")


COMMANDS: options.Commands = {
    split: "featcache split photos/ --val 0.1 --test 0.2 -o manifest.csv  ·  "
    "featcache split list.csv --test 0.2 --group-column patient -o manifest.csv  ·  "
    "featcache split features.h5 --test 0.2 --groups near -o manifest.csv",
}
