"""Decode every task once; all jobs of the task share the file."""


rule prepare:
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
        mem_mb=lambda wildcards, attempt: 1000 * attempt,
        runtime=lambda wildcards, attempt: 10 * attempt,
    params:
        sizes=f"--train {STUDY.data.train} --val {STUDY.data.val} --test {STUDY.data.test}",
        folder=lambda wildcards: STUDY.folder_option(wildcards.task),
    shell:
        "tocom prepare {wildcards.task} {params.sizes} {params.folder} --output {output} > {log} 2>&1"
