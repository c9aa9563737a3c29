"""Distil ToCom once for each backbone, compressor and variant; all tasks share it."""


rule distil:
    input:
        backbone=backbone_file,
        images=lambda wildcards: fetched(
            STUDY.distil_images_for(wildcards.backbone, wildcards.variant)
        ),
    output:
        COMPENSATOR,
    log:
        f"{LOGS}/distil/{{backbone}}/{{compressor}}/{{variant}}.log",
    benchmark:
        f"{BENCHMARKS}/distil/{{backbone}}/{{compressor}}/{{variant}}.tsv"
    # What other studies keep in the same store is not this one's to make.
    wildcard_constraints:
        backbone=any_of(b.name for b in STUDY.backbones),
        compressor=any_of(STUDY.compressors),
        variant=any_of(STUDY.variants),
    # The longest job of a small study: start it first.
    priority: 10
    conda:
        "../envs/tocom.yaml"
    threads: cores("distil", lambda wildcards: STUDY.distil_for(wildcards.variant))
    resources:
        mem_mb=memory("distil"),
        runtime=minutes("distil"),
        gpu=STUDY.gpus("distil", STUDY.distil.device),
        # Slurm's plugin would ask for the threads for each GPU.
        cpus_per_task=cores(
            "distil", lambda wildcards: STUDY.distil_for(wildcards.variant)
        ),
        nodes=STUDY.resources.distil.nodes,
        # Not parameters, since how the work is done changes no result.
        start=STUDY.launcher("distil"),
        how=lambda wildcards: STUDY.distil_for(wildcards.variant).how_options(),
    params:
        degrees=f"--max-degree {STUDY.max_degree} --seed {STUDY.distil_seed}",
        images=lambda wildcards: STUDY.distil_options(
            wildcards.backbone, wildcards.variant
        ),
        settings=lambda wildcards: STUDY.distil_for(wildcards.variant).options(),
    shell:
        "{resources.start} distil {input.backbone:q} --compressor {wildcards.compressor} {params.degrees} {params.images}"
        " {params.settings} {resources.how} --output {output} > {log} 2>&1"
