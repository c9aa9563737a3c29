"""Backbones that the config does not name as files: timm's, and those that are pre-trained on procedural letters."""

PRETRAINED = [b.name for b in STUDY.backbones if b.architecture]
FROM_TIMM = [b.name for b in STUDY.backbones if b.timm]


rule import_backbone:
    output:
        BACKBONE,
    log:
        f"{LOGS}/backbone/{{backbone}}.log",
    benchmark:
        f"{BENCHMARKS}/backbone/{{backbone}}.tsv"
    wildcard_constraints:
        backbone=any_of(FROM_TIMM),
    conda:
        "../envs/tocom.yaml"
    threads: 1
    resources:
        mem_mb=memory("backbone"),
        runtime=minutes("backbone"),
    params:
        model=lambda wildcards: STUDY.import_options(wildcards.backbone),
    shell:
        "tocom backbone {params.model} --output {output} > {log} 2>&1"


rule pretrain_backbone:
    output:
        BACKBONE,
    log:
        f"{LOGS}/pretrain/{{backbone}}.log",
    benchmark:
        f"{BENCHMARKS}/pretrain/{{backbone}}.tsv"
    wildcard_constraints:
        backbone=any_of(PRETRAINED),
    conda:
        "../envs/tocom.yaml"
    threads: STUDY.threads("backbone", STUDY.pretrain)
    resources:
        mem_mb=memory("backbone"),
        runtime=minutes("backbone"),
        gpu=STUDY.gpus("backbone", STUDY.pretrain.device),
        # Not parameters, since how the work is done changes no result.
        how=STUDY.pretrain.how_options(),
    params:
        model=lambda wildcards: STUDY.pretrain_options(wildcards.backbone),
        degrees=options("degree", range(STUDY.max_degree + 1)),
        settings=STUDY.pretrain.options(),
    shell:
        "tocom pretrain {params.model} {params.degrees} {params.settings} {resources.how} --output {output} > {log} 2>&1"


rule pretrain:
    input:
        expand(BACKBONE, backbone=PRETRAINED),
