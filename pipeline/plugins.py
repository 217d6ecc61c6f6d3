"""Plug-ins: objects that other installed packages bring by an entry point."""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pipeline.errors import SpecError


@dataclass(frozen=True)
class PlugIns:
    """The plug-ins of one kind; names are known without an import of any of them.

    ``group`` is the entry-point group, ``noun`` the kind in error sentences, and
    ``built_in`` are the names that no plug-in can have.
    """

    group: str
    noun: str
    built_in: tuple[str, ...]

    def names(self) -> tuple[str, ...]:
        """Built-in names in their order, then those of installed plug-ins, sorted."""
        return (*self.built_in, *self.installed())

    def installed(self) -> tuple[str, ...]:
        """Names of installed plug-ins, sorted."""
        found = {point.name for point in entry_points(group=self.group)}
        return tuple(sorted(found.difference(self.built_in)))

    def check(self, name: str) -> None:
        """Refuse a name that several packages bring, or one and this package.

        Raises
        ------
        SpecError
            The name does not belong to one object alone; names the packages.
        """
        points = self._points(name)
        packages = [_package(point) for point in points]
        if name in self.built_in and points:
            raise SpecError(
                f"The package {packages[0]} brings the {self.noun} {name!r}, but this "
                "name is built in; rename the entry point or uninstall the package."
            )
        if len(points) > 1:
            raise SpecError(
                f"The {self.noun} {name!r} has {len(points)} entry points (packages: "
                f"{', '.join(sorted(set(packages)))}); rename or uninstall one of them."
            )

    def load(self, name: str) -> Any:
        """Import the object of the plug-in ``name``.

        Raises
        ------
        SpecError
            There is no such plug-in, its name is taken, or the import fails.
        """
        self.check(name)
        points = self._points(name)
        if not points:
            raise SpecError(f"There is no {self.noun} {name!r}{self.known()}.")
        try:
            return points[0].load()
        # A foreign module can fail in every way.
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise SpecError(
                f"The {self.noun} {name!r} of the package {_package(points[0])} cannot "
                f"be imported ({reason}); repair or uninstall the package."
            ) from error

    def refuse(self, name: str, reason: str) -> SpecError:
        """Return the error for a plug-in that breaks its contract."""
        owner = "".join(f" of the package {_package(p)}" for p in self._points(name))
        return SpecError(f"The {self.noun} {name!r}{owner} {reason}.")

    def known(self) -> str:
        """All names, to end an error sentence with."""
        return f" (known: {', '.join(self.names())})"

    def _points(self, name: str) -> list[EntryPoint]:
        return list(dict.fromkeys(_named(entry_points(group=self.group), name)))


def _named(points: Iterable[EntryPoint], name: str) -> Iterable[EntryPoint]:
    return (point for point in points if point.name == name)


def _package(point: EntryPoint) -> str:
    """Name of the distribution that has ``point``."""
    return "of unknown name" if point.dist is None else point.dist.name
