"""Pre-train a backbone on procedural letters, where the config names no checkpoint."""


rule pretrain_backbone:
    output:
        f"{ROOT}/backbones/{{backbone}}.safetensors",
    log:
        f"{LOGS}/pretrain/{{backbone}}.log",
    benchmark:
        f"{BENCHMARKS}/pretrain/{{backbone}}.tsv"
    conda:
        "../envs/tocom.yaml"
    threads: STUDY.pretrain.threads
    resources:
        mem_mb=lambda wildcards, attempt: 3000 * attempt,
        runtime=lambda wildcards, attempt: 120 * attempt,
        gpu=gpus(STUDY.pretrain),
    params:
        model=lambda wildcards: STUDY.pretrain_options(wildcards.backbone),
        degrees=options("degree", range(STUDY.max_degree + 1)),
        settings=STUDY.pretrain.options(),
    shell:
        "tocom pretrain {params.model} {params.degrees} {params.settings} --output {output} > {log} 2>&1"


rule pretrain:
    input:
        [
            f"{ROOT}/backbones/{b.name}.safetensors"
            for b in STUDY.backbones
            if b.checkpoint is None
        ],
