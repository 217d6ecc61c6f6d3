# A target cache_X per spec. The store is a parameter, never an output: the engine
# deletes outputs before a rule runs, while the store must survive to be continued.
#
# --config jobs=1 (default): one job plans, fills and seals.
# --config jobs=N: plan_X, then N jobs part_X that may run anywhere and in any order,
# then cache_X seals. A job that was killed is run again and goes on where it was.
from functools import partial
from pathlib import Path

from snakemake.exceptions import WorkflowError

from pipeline.errors import PipelineError
from pipeline.cli.workflow import data_files, spec_changes

JOBS = int(config.get("jobs", 1))
GPUS = int(config.get("gpus", 1))
CPUS = int(config.get("cpus", 2))
try:
    CHANGES = spec_changes(config)
except PipelineError as error:
    raise WorkflowError(str(error)) from None
SET = [word for change in CHANGES for word in ("--set", change)]
# Of processes within one job, for machines with several devices.
WORKERS = int(config.get("workers", 0))
# Of the jobs that read all data, before and after the others: planning and sealing.
PASSES = int(config.get("pass_workers", 0))
# All of these are resources, not parameters: another number of processes is no reason
# to make a finished store again.


def memory(wildcards, attempt):
    """MB; more in every attempt, as too little is one reason to be killed."""
    return int(config.get("mem_mb", 16000)) * attempt


def minutes(wildcards, attempt):
    """A job that ran out of time goes on, but an ever longer one ends for sure."""
    return int(config.get("runtime", 240)) * attempt


def data_of(wildcards, spec):
    """Files that the store of a spec is made of: changed ones make it due."""
    return data_files(spec, CHANGES)


def threads_each(wildcards, threads):
    """Of each process, which share the cores of their job."""
    return max(1, min(threads, CPUS) // max(1, WORKERS))


for spec in sorted(Path("cache_specs").glob("*.yaml")):
    name = spec.stem
    folder = f"results/caches/{name}"

    if JOBS == 1:

        rule:
            name:
                f"cache_{name}"
            input:
                spec=str(spec),
                data=partial(data_of, spec=spec),
            output:
                receipt=f"{folder}.json",
                fields=report(
                    f"{folder}.csv",
                    caption="captions/fields.rst",
                    category="Stores",
                    labels={"store": name, "what": "fields and sizes"},
                ),
            log:
                f"{folder}.log",
            benchmark:
                f"{folder}.benchmark.tsv"
            threads: CPUS
            resources:
                gpu=GPUS,
                mem_mb=memory,
                runtime=minutes,
                processes=WORKERS,
                threads_each=threads_each,
            params:
                store=f"caches/{name}.zarr",
                overrides=SET,
            shell:
                "(kd-cache build {input.spec:q} --out {params.store:q} "
                "--threads {resources.threads_each} --workers {resources.processes} "
                "--done-file {output.receipt:q} {params.overrides:q} && "
                "kd-cache info {params.store:q} --csv > {output.fields:q}) 2>&1 | tee {log:q}"

    else:

        rule:
            name:
                f"plan_{name}"
            input:
                spec=str(spec),
                data=partial(data_of, spec=spec),
            output:
                done=temp(touch(f"{folder}.parts/planned-{JOBS}")),
            log:
                f"{folder}.parts/plan.log",
            benchmark:
                f"{folder}.parts/plan.benchmark.tsv"
            threads: max(CPUS, PASSES)
            resources:
                gpu=GPUS,
                mem_mb=memory,
                runtime=minutes,
                processes=PASSES,
                threads_each=threads_each,
            params:
                store=f"caches/{name}.zarr",
                overrides=SET,
            shell:
                "kd-cache plan {input.spec:q} --out {params.store:q} "
                "--threads {resources.threads_each} --workers {resources.processes} "
                "{params.overrides:q} > {log:q} 2>&1"

        rule:
            name:
                f"part_{name}"
            input:
                spec=str(spec),
                plan=f"{folder}.parts/planned-{JOBS}",
            output:
                done=temp(touch(f"{folder}.parts/{{part}}-of-{JOBS}")),
            wildcard_constraints:
                part=r"\d+",
            log:
                f"{folder}.parts/{{part}}-of-{JOBS}.log",
            benchmark:
                f"{folder}.parts/{{part}}-of-{JOBS}.benchmark.tsv"
            threads: CPUS
            resources:
                gpu=GPUS,
                mem_mb=memory,
                runtime=minutes,
                processes=WORKERS,
                threads_each=threads_each,
            params:
                store=f"caches/{name}.zarr",
                overrides=SET,
                jobs=JOBS,
            shell:
                "kd-cache build {input.spec:q} --out {params.store:q} "
                "--threads {resources.threads_each} --workers {resources.processes} "
                "--part {wildcards.part}/{params.jobs} "
                "{params.overrides:q} > {log:q} 2>&1"

        rule:
            name:
                f"cache_{name}"
            input:
                parts=expand(
                    f"{folder}.parts/{{part}}-of-{JOBS}", part=range(1, JOBS + 1)
                ),
                data=partial(data_of, spec=spec),
            output:
                receipt=f"{folder}.json",
                fields=report(
                    f"{folder}.csv",
                    caption="captions/fields.rst",
                    category="Stores",
                    labels={"store": name, "what": "fields and sizes"},
                ),
                jobs=report(
                    f"{folder}.jobs.tsv",
                    caption="captions/jobs.rst",
                    category="Stores",
                    labels={"store": name, "what": "time and memory of the jobs"},
                ),
            log:
                f"{folder}.log",
            benchmark:
                f"{folder}.benchmark.tsv"
            threads: max(CPUS, PASSES)
            resources:
                mem_mb=memory,
                runtime=minutes,
                processes=PASSES,
            params:
                store=f"caches/{name}.zarr",
                benchmarks=expand(
                    f"{folder}.parts/{{job}}.benchmark.tsv",
                    job=["plan", *(f"{n}-of-{JOBS}" for n in range(1, JOBS + 1))],
                ),
            shell:
                "(kd-cache seal {params.store:q} --workers {resources.processes} && "
                "kd-cache verify {params.store:q} --workers {resources.processes} && "
                "kd-cache info {params.store:q} --json > {output.receipt:q} && "
                "kd-cache info {params.store:q} --csv > {output.fields:q} && "
                "awk 'NR == 1 {{print \"job\\t\" $0}} FNR == 2 "
                '{{sub(".*/", "", FILENAME); sub("\\\\.benchmark.*", "", FILENAME); '
                "print FILENAME \"\\t\" $0}}' {params.benchmarks:q} > {output.jobs:q}"
                ") 2>&1 | tee {log:q}"
