# The embedded example: cache, plain and distilled students of one seed, comparison.
# `--config quick=true` makes a short form for checks.
QUICK = str(config.get("quick", "false")).lower() == "true"
STRATEGIES = (
    ["none", "v2v+vanilla2"] if QUICK else ["none", "n2n", "vanilla2", "v2v+vanilla2"]
)
# At 1500 steps most of the gap to the teacher is short training.
STEPS = 600 if QUICK else 6000
RUNS = expand("results/demo/{strategy}-s0-{steps}", strategy=STRATEGIES, steps=STEPS)


rule demo_student:
    input:
        receipt="results/caches/demo.json",
        config="cache_specs/demo/student.yaml",
    output:
        metrics="results/demo/{strategy}-s{seed}-{steps}/metrics.json",
    log:
        "results/demo/{strategy}-s{seed}-{steps}.log",
    benchmark:
        "results/demo/{strategy}-s{seed}-{steps}.benchmark.tsv"
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: 4000 * attempt,
        runtime=lambda wildcards, attempt: 60 * attempt,
    params:
        store="caches/demo.zarr",
        student="painn-small-demo",
    shell:
        "kd-train --cache {params.store} --strategy {wildcards.strategy} "
        "--student {params.student} --config {input.config} --seed {wildcards.seed} "
        "--steps {wildcards.steps} --threads {threads} --out $(dirname {output.metrics}) "
        "--resume auto > {log} 2>&1"


rule demo:
    input:
        expand("{run}/metrics.json", run=RUNS),
    output:
        report=report(
            "results/demo/report/report.html",
            caption="captions/page.rst",
            category="Students",
            labels={"what": "page"},
        ),
        table=report(
            "results/demo/report/table.csv",
            caption="captions/table.rst",
            category="Students",
            labels={"what": "errors and gap closed"},
        ),
        curves=report(
            "results/demo/report/curves.png",
            caption="captions/curves.rst",
            category="Students",
            labels={"what": "learning curves"},
        ),
        parity=report(
            "results/demo/report/parity.png",
            caption="captions/parity.rst",
            category="Students",
            labels={"what": "parity"},
        ),
    log:
        "results/demo/report.log",
    benchmark:
        "results/demo/report.benchmark.tsv"
    params:
        runs=RUNS,
    shell:
        "kd-report {params.runs} --out $(dirname {output.report}) 2>&1 | tee {log}"
