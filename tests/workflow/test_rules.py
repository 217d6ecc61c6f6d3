"""The Snakemake rules: each can be planned, and the linter has no new complaint."""

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.build.build import build_store
from pipeline.spec.cache_spec import load_spec
from pipeline.store.reader import FeatureStore
from tests.stores import spec_document, write_spec

pytest.importorskip("snakemake")
ROOT = Path(__file__).parents[2]
SPECS = sorted(path.stem for path in (ROOT / "cache_specs").glob("*.yaml"))

pytestmark = pytest.mark.workflow


def _snakemake(
    *arguments: str, folder: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "snakemake", *arguments]
    scripts = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{scripts}:{os.environ['PATH']}"}
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env=environment
    )


@pytest.mark.parametrize("target", [*(f"cache_{spec}" for spec in SPECS), "demo"])
def test_every_rule_can_be_planned(target: str) -> None:
    done = _snakemake("--dry-run", "--forceall", "--cores", "2", target)
    assert done.returncode == 0, done.stderr
    assert target in done.stdout + done.stderr


def test_overrides_reach_the_command() -> None:
    done = _snakemake(
        *("--dry-run", "--forceall", "--printshellcmds", "--cores", "2", "cache_demo"),
        *("--config", "set=splits.train.limit=7 store.seed=3"),
    )
    commands = done.stdout + done.stderr
    assert "--set splits.train.limit=7 --set store.seed=3" in commands


def test_names_and_changes_may_hold_blanks(project: Path) -> None:
    """B8, C: everything is quoted in the shell, and the data files are inputs."""
    spec = project / "cache_specs/tiny.yaml"
    spec.rename(spec.with_name("my spec #1.yaml"))
    data = project / "cache_specs/my data.xyz"
    data.touch()
    target = ("--dry-run", "--printshellcmds", "--cores", "1", "cache_my spec #1")
    changes = '["splits.train.path=my data.xyz", "store.seed=3"]'
    config = ("--config", f"set={changes}")
    told = _told(*target, *config, "jobs=2", folder=project)
    named = "'cache_specs/my spec #1.yaml' --out 'caches/my spec #1.zarr'"
    quoted = "--set 'splits.train.path=my data.xyz' --set store.seed=3"
    for part in (named, quoted, f"{data}"):
        assert part in told
    results = project / "results/caches"
    results.mkdir(parents=True)
    for name in ("json", "csv", "benchmark.tsv"):
        (results / f"my spec #1.{name}").touch()
    assert "Nothing to be done" in _told(*target, *config, folder=project)
    later = data.stat().st_mtime + 100
    os.utime(data, (later, later))
    told = _told(*target, *config, folder=project)
    for part in (named, quoted, f"Updated input files: {data}"):
        assert part in told


def _told(*arguments: str, folder: Path) -> str:
    done = _snakemake(*arguments, folder=folder)
    return done.stdout + done.stderr


def test_every_store_can_be_shared_by_jobs() -> None:
    targets = [f"cache_{spec}" for spec in SPECS]
    done = _snakemake(
        *("--dry-run", "--forceall", "--printshellcmds", "--cores", "2", *targets),
        *("--config", "jobs=3", "set=store.seed=3", "pass_workers=5"),
    )
    assert done.returncode == 0, done.stderr
    commands = done.stdout + done.stderr
    for spec in SPECS:
        store = f"cache_specs/{spec}.yaml --out caches/{spec}.zarr"
        assert f"kd-cache plan {store}" in commands
        assert f"kd-cache seal caches/{spec}.zarr --workers 5 " in commands
        assert f"kd-cache verify caches/{spec}.zarr --workers 5 " in commands
        (plan,) = [w for w in commands.splitlines() if f"kd-cache plan {store}" in w]
        assert "--workers 5 " in plan
        for number in (1, 2, 3):
            lines = [
                line
                for line in commands.splitlines()
                if f"kd-cache build {store}" in line and f"--part {number}/3" in line
            ]
            assert len(lines) == 1
            assert "--set store.seed=3" in lines[0]


@pytest.mark.parametrize("jobs", [1, 3])
def test_processes_of_a_job_share_its_cores(jobs: int) -> None:
    done = _snakemake(
        *("--dry-run", "--forceall", "--printshellcmds", "--cores", "8", "cache_demo"),
        *("--config", f"jobs={jobs}", "cpus=8", "workers=4", "pass_workers=16"),
    )
    assert done.returncode == 0, done.stderr
    told = (done.stdout + done.stderr).splitlines()
    builds = [w for w in told if "kd-cache build" in w]
    assert len(builds) == jobs
    assert all("--threads 2 --workers 4 " in build for build in builds)
    plans = [w for w in told if "kd-cache plan" in w]
    assert len(plans) == (jobs > 1)
    assert all("--threads 2 --workers 16 " in plan for plan in plans)


@pytest.mark.parametrize("jobs", [1, 3])
def test_the_linter_only_asks_for_environments(jobs: int) -> None:
    """Rules run where the project is installed, see docs/decisions.md."""
    done = _snakemake("--lint", "--config", f"jobs={jobs}")
    complaints = [
        line.strip()
        for line in (done.stdout + done.stderr).splitlines()
        if line.strip().startswith("* ")
    ]
    others = [c for c in complaints if "conda environment or container" not in c]
    assert complaints
    assert others == []


def test_the_store_is_never_an_output() -> None:
    """The engine deletes outputs before it runs a rule; a store must survive that."""
    done = _snakemake("--dry-run", "--forceall", "--summary", "demo")
    outputs = [line.split("\t")[0] for line in done.stdout.splitlines()[1:] if line]
    assert "results/caches/few_labels.json" in outputs
    assert not [name for name in outputs if ".zarr" in name]


def _profile(name: str) -> str:
    if name == "slurm" and not importlib.util.find_spec(
        "snakemake_executor_plugin_slurm"
    ):
        pytest.skip("the extra `slurm` is not installed")
    return f"pipeline/profiles/{name}"


@pytest.mark.parametrize(("profile", "jobs"), [("local", 1), ("slurm", 32)])
def test_profiles_are_accepted_and_yield_to_the_command_line(
    profile: str, jobs: int
) -> None:
    arguments = ("--dry-run", "--forceall", "--profile", _profile(profile))
    done = _snakemake(*arguments, "cache_demo", "--config", "mem_mb=1234")
    assert done.returncode == 0, done.stderr
    told = done.stdout + done.stderr
    assert ("--part 32/32" in told) == (jobs == 32)
    assert "mem_mb=1234" in told
    done = _snakemake(*arguments, "cache_demo", "--config", "jobs=5")
    assert "--part 5/5" in done.stdout + done.stderr


@pytest.fixture
def project(tmp_path: Path, datasets: dict[str, Path], teacher_file: Path) -> Path:
    """A folder with the rules and one spec, `tiny`, whose store is small."""
    (tmp_path / "cache_specs").mkdir()
    for name in ("Snakefile", "pipeline"):
        (tmp_path / name).symlink_to(ROOT / name)
    document = spec_document(datasets, Path("caches/tiny.zarr"), teacher_file)
    write_spec(tmp_path / "cache_specs/tiny.yaml", document)
    return tmp_path


def test_jobs_share_a_store_and_the_report_shows_it(project: Path) -> None:
    arguments = ("--profile", "pipeline/profiles/local", "cache_tiny")
    done = _snakemake(*arguments, "--config", "jobs=2", "cpus=1", folder=project)
    assert done.returncode == 0, done.stdout + done.stderr

    store = project / "caches/tiny.zarr"
    spec = load_spec(
        project / "cache_specs/tiny.yaml", [f"store.path={project / 'alone.zarr'}"]
    )
    assert build_store(spec)
    alone = FeatureStore.open(spec.store.path)
    shared = FeatureStore.open(store)
    assert shared.fingerprint == alone.fingerprint
    # The root says where the store was made, and a digest covers the root.
    files = {f.relative_to(alone.path) for f in alone.path.rglob("*") if f.is_file()}
    for file in files - {Path("zarr.json"), Path("digests/c/0")}:
        assert (alone.path / file).read_bytes() == (store / file).read_bytes(), file

    results = project / "results/caches"
    receipt = json.loads((results / "tiny.json").read_text())
    assert receipt["complete"]
    assert receipt["fingerprint"] == alone.fingerprint
    with (results / "tiny.jobs.tsv").open() as file:
        jobs = list(csv.DictReader(file, delimiter="\t"))
    assert [job["job"] for job in jobs] == ["plan", "1-of-2", "2-of-2"]
    assert all(float(job["s"]) > 0 for job in jobs)
    # Markers of parts must not outlive the run: they would vouch for another store.
    assert not [p for p in (results / "tiny.parts").iterdir() if not p.suffix]

    page = project / "report.html"
    told = ("--config", "jobs=2", "cpus=1", "--report", str(page))
    done = _snakemake("cache_tiny", *told, folder=project)
    assert done.returncode == 0, done.stdout + done.stderr
    html = page.read_text()
    for shown in ("fields and sizes", "time and memory of the jobs", "part_tiny"):
        assert shown in html
