"""Packages of plug-ins as pip would install them, without pip."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]


def install(
    folder: Path, package: str, modules: Mapping[str, str], entry_points: str
) -> Path:
    """``folder`` with the modules and the metadata of ``package`` added to it."""
    info = folder / f"{package.replace('-', '_')}-0.1.dist-info"
    info.mkdir(parents=True)
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.1\n"
    )
    (info / "entry_points.txt").write_text(entry_points)
    return folder


def run_with(
    packages: Path | None, program: str, *arguments: object
) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, such as ``kd_train.cli.train:main``."""
    module, _, function = program.partition(":")
    paths = [str(ROOT), *([] if packages is None else [str(packages)])]
    return subprocess.run(
        [
            sys.executable,
            "-c",
            f"from {module} import {function}; {function}()",
            *map(str, arguments),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
