"""Distil ToCom once for each backbone, compressor and variant; all tasks share it."""


rule distil:
    input:
        backbone=backbone_file,
        images=lambda wildcards: fetched(
            STUDY.backbone(wildcards.backbone).distil_images
        ),
    output:
        COMPENSATOR,
    log:
        f"{LOGS}/distil/{{backbone}}/{{compressor}}/{{variant}}.log",
    benchmark:
        f"{BENCHMARKS}/distil/{{backbone}}/{{compressor}}/{{variant}}.tsv"
    # The longest job of a small study: start it first.
    priority: 10
    conda:
        "../envs/tocom.yaml"
    threads: STUDY.distil.threads
    resources:
        mem_mb=memory("distil"),
        runtime=minutes("distil"),
        gpu=STUDY.gpus("distil", STUDY.distil.device),
        nodes=STUDY.resources.distil.nodes,
    params:
        start=STUDY.launcher("distil"),
        degrees=f"--max-degree {STUDY.max_degree} --seed {STUDY.distil_seed}",
        images=lambda wildcards: STUDY.distil_options(wildcards.backbone),
        settings=lambda wildcards: STUDY.distil_for(wildcards.variant).options(),
    shell:
        "{params.start} distil {input.backbone:q} --compressor {wildcards.compressor} {params.degrees} {params.images}"
        " {params.settings} --output {output} > {log} 2>&1"
