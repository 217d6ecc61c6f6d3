# Stage one: `snakemake --cores 8 cache_X` for every cache_specs/X.yaml.
# On a cluster the same with a profile: docs/scaling.md.
# Both stages on the embedded example: `snakemake --cores 2 demo`.
# Many students on one store: `snakemake --cores 8 sweep --config sweep=FILE`.
from snakemake.utils import min_version

min_version("9.0")


report: "pipeline/rules/captions/workflow.rst"


rule all:
    default_target: True
    input:
        "results/demo/report/report.html",


include: "pipeline/rules/cache.smk"
include: "pipeline/rules/demo.smk"
include: "pipeline/rules/sweep.smk"
