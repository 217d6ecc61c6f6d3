"""What the Snakemake rules of a sweep ask: its jobs and where their outcomes lie."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kd_train.sweep.grid import Sweep
from kd_train.sweep.jobs import read_outcome
from pipeline.errors import SpecError


@dataclass(frozen=True)
class Jobs:
    """Jobs of the sweep a workflow was asked for; none, and no file read, without one.

    ``identities`` holds by name what decides a run: a changed one makes it due.
    ``attempts`` grows by one where a failed run shall be repeated, and stays so, for
    what is recorded of a run must not differ the next time.
    """

    file: str = ""
    out: str = "results/sweeps/none"
    threads: int = 1
    gpus: int = 0
    identities: dict[str, str] = field(default_factory=dict)
    attempts: dict[str, int] = field(default_factory=dict)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Jobs":
        """Of the workflow's configuration: ``sweep=FILE``, ``retry_failed=true``.

        Raises
        ------
        PipelineError
            The sweep file, or a run of it, is wrong.
        """
        if not config.get("sweep"):
            return cls()
        # Training's modules take seconds to import; other workflows do without.
        from kd_train.sweep.plan import make_plan

        path = Path(str(config["sweep"])).resolve()
        chosen = make_plan(path)
        sweep, retry = chosen.sweep, str(config.get("retry_failed", "false")).lower()
        return cls(
            file=str(path),
            out=str(sweep.out),
            threads=sweep.config.threads,
            gpus=sweep.config.gpus,
            identities={run.name: chosen.identity(run) for run in chosen.runs},
            attempts={
                run.name: _attempt(sweep, run.name, retry == "true")
                for run in chosen.runs
            },
        )

    def outcomes(self) -> list[str]:
        """Files that the jobs write.

        Raises
        ------
        SpecError
            No sweep was asked for.
        """
        if not self.file:
            raise SpecError("Name the sweep file: --config sweep=FILE.")
        return [f"{self.out}/runs/{name}/outcome.json" for name in self.identities]


def _attempt(sweep: Sweep, name: str, retry: bool) -> int:
    outcome = read_outcome(sweep, name)
    if outcome is None:
        return 1
    return outcome.attempt + (retry and outcome.state == "failed")
