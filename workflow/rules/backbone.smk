"""Backbones that the config does not name as files: timm's, and those that are pre-trained on letters or on text."""


rule import_backbone:
    output:
        BACKBONE,
    log:
        "{store}/logs/import/{backbone}.log",
    benchmark:
        "{store}/benchmarks/import/{backbone}.tsv"
    wildcard_constraints:
        backbone=any_of(PLAN.made("timm")),
    conda:
        "../envs/tocom.yaml"
    threads: 1
    resources:
        mem_mb=growing(3000),
        runtime=growing(60),
    params:
        job=lambda wildcards: PLAN.import_backbone(wildcards).as_json(),
    shell:
        "tocom backbone {params.job:q} --output {output} > {log} 2>&1"


rule pretrain_backbone:
    output:
        BACKBONE,
    log:
        "{store}/logs/pretrain/{backbone}.log",
    benchmark:
        "{store}/benchmarks/pretrain/{backbone}.tsv"
    wildcard_constraints:
        backbone=any_of(PLAN.made("architecture")),
    conda:
        "../envs/tocom.yaml"
    threads: lambda wildcards: PLAN.pretrain(wildcards).settings.threads
    resources:
        mem_mb=growing(3000),
        runtime=growing(120),
        gpu=gpus(PLAN.pretrain, lambda job: job.settings),
        # How the work is done changes no result; profiles say it (set-resources, set-threads).
        processes=1,
        nodes=1,
        # Slurm's plugin would ask for the threads for each GPU.
        cpus_per_task=lambda wildcards, threads: threads,
    params:
        job=lambda wildcards: PLAN.pretrain(wildcards).as_json(),
    shell:
        "tocom pretrain {params.job:q} --processes {resources.processes} --nodes {resources.nodes} --output {output} > {log} 2>&1"


rule pretrain:
    input:
        PLAN.pretrained,
