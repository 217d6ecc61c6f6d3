"""Options that several commands of ``kd-cache`` have, and the sections of its help."""

from collections.abc import Mapping, Sequence
from typing import Any

import click

from pipeline.console import PATH

workers_option = click.option(
    "--workers",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Number of worker processes; 0 does the work in this process.",
)
fill_workers_option = click.option(
    "--workers",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Number of processes that fill blocks, one for each GPU; 0 fills them here.",
)
spec_argument = click.argument("spec", type=PATH)
out_option = click.option(
    "--out", help="Path of the store. Default: store.path of the spec."
)
field_option = click.option(
    "--field",
    "fields",
    multiple=True,
    help="Feature to convert; may be repeated. Default: all features.",
)


class SectionedGroup(click.Group):
    """A group of commands whose help lists the commands by sections."""

    def __init__(
        self, *args: Any, sections: Mapping[str, Sequence[click.Command]], **more: Any
    ) -> None:
        super().__init__(*args, **more)
        self.sections = sections
        for commands in sections.values():
            for command in commands:
                self.add_command(command)

    def format_commands(
        self, ctx: click.Context, formatter: click.HelpFormatter
    ) -> None:
        """Write the commands of each section in its order."""
        widest = max(map(len, self.commands))
        for title, commands in self.sections.items():
            with formatter.section(title):
                formatter.write_dl(
                    [
                        (
                            str(command.name).ljust(widest),
                            command.get_short_help_str(formatter.width - 6 - widest),
                        )
                        for command in commands
                    ]
                )
