# One rule per spec. The store is a parameter, never an output: the engine deletes
# outputs before a rule runs, while the store must survive to be continued.
from pathlib import Path

for spec in sorted(Path("cache_specs").glob("*.yaml")):

    rule:
        name:
            f"cache_{spec.stem}"
        input:
            spec=str(spec),
        output:
            receipt=f"results/caches/{spec.stem}.json",
        log:
            f"results/caches/{spec.stem}.log",
        benchmark:
            f"results/caches/{spec.stem}.benchmark.tsv"
        threads: 2
        params:
            store=f"caches/{spec.stem}.zarr",
            overrides=[f"--set {change}" for change in config.get("set", "").split()],
        shell:
            "kd-cache build {input.spec} --out {params.store} --threads {threads} "
            "--receipt {output.receipt} {params.overrides} 2>&1 | tee {log}"
