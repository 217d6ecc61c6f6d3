# Students × strategies × weights × seeds on one store, one job a run:
# `snakemake --cores 8 sweep --config sweep=FILE`; the file is read only then.
# Parameters decide what is due, so a longer list of seeds trains the new ones alone. The
# file's name decides nothing, so it is none of them and goes through the environment.
import os

from snakemake.exceptions import WorkflowError

from kd_train.sweep.gpus import visible_gpus
from kd_train.sweep.workflow import Jobs
from pipeline.errors import PipelineError

try:
    JOBS = Jobs.from_config(config)
except PipelineError as error:
    raise WorkflowError(str(error)) from None
os.environ["KD_SWEEP"] = JOBS.file
# Snakemake does not limit a resource that nobody gave an amount of. On a cluster each
# job asks for its own, and a limit would be one for all of them.
if JOBS.gpus and workflow.local_exec and "gpu" not in workflow.global_resources:
    workflow.register_resource("gpu", max(1, len(visible_gpus())))


envvars:
    "KD_SWEEP",


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
        'python -m kd_train.sweep run "$KD_SWEEP" {wildcards.run:q} '
        "--attempt {params.attempt} > {log:q} 2>&1"


rule sweep:
    input:
        outcomes=lambda wildcards: JOBS.outcomes(),
    output:
        table=f"{JOBS.out}/report/sweep.txt",
    log:
        f"{JOBS.out}/logs/report.log",
    shell:
        'python -m kd_train.sweep report "$KD_SWEEP" 2>&1 | tee {log:q}'
