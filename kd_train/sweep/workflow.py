"""Jobs of a sweep and their outcome files, for the Snakemake rules."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kd_train.sweep.grid import Sweep
from kd_train.sweep.jobs import read_outcome
from pipeline.errors import SpecError


@dataclass(frozen=True)
class Jobs:
    """Jobs of the sweep of a workflow, empty if no sweep is named.

    ``identities`` holds by name what decides a run; if it changes, the run is trained
    again. ``attempts`` grows by one if a failed run is repeated, and then stays, so
    that the record of a run is the same the next time.
    """

    file: str = ""
    out: str = "results/sweeps/none"
    threads: int = 1
    gpus: int = 0
    identities: dict[str, str] = field(default_factory=dict)
    attempts: dict[str, int] = field(default_factory=dict)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Jobs":
        """Read the workflow's configuration: ``sweep=FILE``, ``retry_failed=true``.

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
        """List the files that the jobs write.

        Raises
        ------
        SpecError
            The configuration names no sweep.
        """
        if not self.file:
            raise SpecError("Name the sweep file: --config sweep=FILE.")
        return [f"{self.out}/runs/{name}/outcome.json" for name in self.identities]


def _attempt(sweep: Sweep, name: str, retry: bool) -> int:
    outcome = read_outcome(sweep, name)
    if outcome is None:
        return 1
    return outcome.attempt + (retry and outcome.state == "failed")
