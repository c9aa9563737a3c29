"""Distil ToCom once for each backbone and compressor."""


rule distil:
    input:
        backbone=backbone_file,
    output:
        COMPENSATOR,
    log:
        f"{LOGS}/distil/{{backbone}}/{{compressor}}.log",
    benchmark:
        f"{BENCHMARKS}/distil/{{backbone}}/{{compressor}}.tsv"
    # The longest job of a small study: start it first.
    priority: 10
    conda:
        "../envs/tocom.yaml"
    threads: STUDY.distil.threads
    resources:
        mem_mb=lambda wildcards, attempt: 2000 * attempt,
        runtime=lambda wildcards, attempt: 60 * attempt,
        gpu=gpus(STUDY.distil),
    params:
        degrees=f"--max-degree {STUDY.max_degree} --seed {STUDY.distil_seed}",
        images=lambda wildcards: STUDY.distil_options(wildcards.backbone),
        settings=STUDY.distil.options(),
    shell:
        "tocom distil {input.backbone:q} --compressor {wildcards.compressor} {params.degrees} {params.images} {params.settings}"
        " --output {output} > {log} 2>&1"
