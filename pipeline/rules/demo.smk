# The embedded example: a plain student of 250 labels, the paper's strategies, and students
# of generated structures. `--config quick=true` makes a short form for checks.
QUICK = str(config.get("quick", "false")).lower() == "true"
# Row of the table: what it is trained on, and by which strategy.
ROWS = {
    "plain": ("train", "none"),
    "n2n": ("train", "n2n"),
    "v2v": ("train", "v2v"),
    "vanilla2": ("train", "vanilla2"),
    "copies": ("train+copies", "vanilla2"),
    "pool": ("train+pool", "vanilla2"),
}
SHOWN = ["plain", "pool"] if QUICK else list(ROWS)
STEPS = 600 if QUICK else 6000
RUNS = expand("results/demo/{row}-s0-{steps}", row=SHOWN, steps=STEPS)


rule demo_student:
    input:
        receipt="results/caches/few_labels.json",
        config="cache_specs/demo/few_labels_student.yaml",
    output:
        metrics="results/demo/{row}-s{seed}-{steps}/metrics.json",
    log:
        "results/demo/{row}-s{seed}-{steps}.log",
    benchmark:
        "results/demo/{row}-s{seed}-{steps}.benchmark.tsv"
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: 4000 * attempt,
        runtime=lambda wildcards, attempt: 60 * attempt,
    params:
        store="caches/few_labels.zarr",
        split=lambda wildcards: ROWS[wildcards.row][0],
        strategy=lambda wildcards: ROWS[wildcards.row][1],
    shell:
        "kd-train --cache {params.store} --strategy {params.strategy} "
        "--config {input.config} --seed {wildcards.seed} --steps {wildcards.steps} "
        "--set train_split={params.split} --threads {threads} "
        "--out $(dirname {output.metrics}) --resume auto > {log} 2>&1"


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
