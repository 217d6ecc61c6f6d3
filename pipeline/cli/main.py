"""``kd-cache``: the group of commands, with the sections of its help."""

import click

from pipeline.cli.build import add_field, build, plan, seal
from pipeline.cli.options import SectionedGroup
from pipeline.cli.select import select
from pipeline.cli.store import compact, convert, hydrate, info, push, schema, verify
from pipeline.cli.teacher import check_teacher, label
from pipeline.console import HELP, version_option

_SECTIONS = {
    "Make a store": (plan, build, seal, add_field),
    "Look at a store": (info, verify, schema),
    "Convert a store": (convert, compact, hydrate, push),
    "Use a teacher": (check_teacher, label),
    "Choose what to label": (select,),
}


@click.group(cls=SectionedGroup, sections=_SECTIONS, context_settings=HELP)
@version_option
def main() -> None:
    """Cache the features of a trained teacher in a Zarr store."""
