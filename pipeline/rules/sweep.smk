# Students × strategies × weights × seeds on one store, one job a run:
# `snakemake --cores 8 sweep --config sweep=FILE`; the file is read only then.
# Parameters decide what is due, so a longer list of seeds trains the new ones alone;
# what does not decide a run (the file's name, the interpreter) is none.
import sys

from snakemake.exceptions import WorkflowError

from kd_train.sweep.workflow import Jobs
from pipeline.errors import PipelineError

try:
    JOBS = Jobs.of(config)
except PipelineError as error:
    raise WorkflowError(str(error)) from None


rule sweep_run:
    output:
        outcome=f"{JOBS.out}/runs/{{run}}/outcome.json",
    log:
        f"{JOBS.out}/logs/{{run}}.job.log",
    threads: JOBS.threads
    resources:
        gpu=JOBS.gpus,
    # Of jobs that were killed; a training that fails is no error of its job.
    retries: 2
    params:
        identity=lambda wildcards: JOBS.identities[wildcards.run],
        attempt=lambda wildcards: JOBS.attempts[wildcards.run],
    shell:
        "{sys.executable:q} -m kd_train.sweep run {JOBS.file:q} {wildcards.run:q} "
        "--attempt {params.attempt} > {log:q} 2>&1"


rule sweep:
    input:
        outcomes=lambda wildcards: JOBS.outcomes(),
    output:
        table=f"{JOBS.out}/report/sweep.txt",
    log:
        f"{JOBS.out}/logs/report.log",
    shell:
        "{sys.executable:q} -m kd_train.sweep report {JOBS.file:q} 2>&1 | tee {log:q}"
