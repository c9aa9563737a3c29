"""Download data sets, and decode every task once; all jobs of the task share the file."""


rule fetch:
    output:
        # Snakemake would delete the mark of a complete data set before a forced run, and with it what is registered.
        update(FETCHED),
    log:
        f"{LOGS}/fetch/{{dataset}}.log",
    benchmark:
        f"{BENCHMARKS}/fetch/{{dataset}}.tsv"
    conda:
        "../envs/tocom.yaml"
    threads: 1
    resources:
        mem_mb=memory("fetch"),
        runtime=minutes("fetch"),
    params:
        root=lambda wildcards: STUDY.data.root,
    shell:
        "tocom data fetch {wildcards.dataset} --root {params.root:q} > {log} 2>&1"


rule prepare:
    input:
        lambda wildcards: (
            fetched(wildcards.task) if STUDY.task(wildcards.task).is_downloaded else []
        ),
    output:
        DATA,
    log:
        f"{LOGS}/prepare/{{task}}.log",
    benchmark:
        f"{BENCHMARKS}/prepare/{{task}}.tsv"
    conda:
        "../envs/tocom.yaml"
    threads: 1
    resources:
        mem_mb=memory("prepare"),
        runtime=minutes("prepare"),
    params:
        how=lambda wildcards: STUDY.prepare_options(wildcards.task),
    shell:
        "tocom prepare {wildcards.task} {params.how} --output {output} > {log} 2>&1"
