"""Download data sets, and decode every task once; all jobs of the task share the file."""


rule fetch:
    output:
        # Snakemake would delete the mark of a complete data set before a forced run, and with it what is registered.
        update(FETCHED),
    log:
        "{data}/logs/{dataset}.log",
    benchmark:
        "{data}/benchmarks/{dataset}.tsv"
    conda:
        "../envs/tocom.yaml"
    threads: 1
    resources:
        mem_mb=growing(1000),
        runtime=growing(600),
    shell:
        "tocom data fetch {wildcards.dataset} --root {wildcards.data:q} > {log:q} 2>&1"


rule prepare:
    input:
        PLAN.task_data,
    output:
        DATA,
    log:
        f"{ROOT}/logs/prepare/{{task}}.log",
    benchmark:
        f"{ROOT}/benchmarks/prepare/{{task}}.tsv"
    # A mistake in the data is found before anything long starts.
    priority: 20
    conda:
        "../envs/tocom.yaml"
    threads: 1
    resources:
        mem_mb=growing(2000),
        runtime=growing(60),
    params:
        job=lambda wildcards: PLAN.prepare(wildcards).as_json(),
    shell:
        "tocom prepare {params.job:q} --output {output} > {log} 2>&1"
