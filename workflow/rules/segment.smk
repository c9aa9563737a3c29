"""The segmentation study: prepare, train, evaluate and tabulate; stands in for finetune, evaluate and aggregate."""

SEGMENT = f"{ROOT}/segmentation"
SEGMENT_DATA = f"{SEGMENT}/data.safetensors"
_RUN = f"{{backbone}}/{{compressor}}/{STUDY.segmentation.name}/train-{{train_degree}}_seed-{{seed}}"
SEGMENTER = f"{SEGMENT}/checkpoints/{_RUN}.safetensors"
SEGMENTED = f"{SEGMENT}/predictions/{_RUN}.safetensors"
# An intermediate result, to be named as input of the targets like the others.
ALL_SEGMENTED = [
    path
    for checkpoint in over(SEGMENTED, STUDY.checkpoints)
    for path in per_model(checkpoint)
]


rule segment_prepare:
    input:
        fetched("ade20k") if STUDY.segmentation.is_downloaded else [],
    output:
        SEGMENT_DATA,
    log:
        f"{LOGS}/segment/prepare.log",
    benchmark:
        f"{BENCHMARKS}/segment/prepare.tsv"
    conda:
        "../envs/tocom.yaml"
    threads: 1
    resources:
        mem_mb=memory("prepare"),
        runtime=minutes("prepare"),
    params:
        how=STUDY.segmentation.prepare_options(STUDY.data.root),
    shell:
        "tocom segment prepare {params.how} --output {output} > {log} 2>&1"


rule segment_train:
    input:
        backbone=backbone_file,
        data=SEGMENT_DATA,
    output:
        SEGMENTER,
    log:
        f"{LOGS}/segment/train/{_RUN}.log",
    benchmark:
        f"{BENCHMARKS}/segment/train/{_RUN}.tsv"
    conda:
        "../envs/tocom.yaml"
    threads: STUDY.threads("finetune", STUDY.segmentation.train)
    resources:
        mem_mb=memory("finetune"),
        runtime=minutes("finetune"),
        gpu=STUDY.gpus("finetune", STUDY.segmentation.train.device),
        # Slurm's plugin would ask for the threads for each GPU.
        cpus_per_task=STUDY.threads("finetune", STUDY.segmentation.train),
        nodes=STUDY.resources.finetune.nodes,
        # Not parameters, since how the work is done changes no result.
        start=STUDY.launcher("finetune"),
        how=STUDY.segmentation.train.how_options(),
    params:
        run="--compressor {compressor} --degree {train_degree} --seed {seed}",
        settings=STUDY.segmentation.train.options(),
    shell:
        "{resources.start} segment train {input.backbone:q} {input.data} {params.run} {params.settings} {resources.how} --output {output}"
        " > {log} 2>&1"


rule segment_evaluate:
    input:
        data=SEGMENT_DATA,
        checkpoint=SEGMENTER,
        compensator=COMPENSATOR.replace("{variant}", MAIN),
    output:
        SEGMENTED,
    log:
        f"{LOGS}/segment/evaluate/{_RUN}.log",
    benchmark:
        f"{BENCHMARKS}/segment/evaluate/{_RUN}.tsv"
    conda:
        "../envs/tocom.yaml"
    threads: STUDY.evaluate.threads
    resources:
        mem_mb=memory("evaluate"),
        runtime=minutes("evaluate"),
        gpu=STUDY.gpus("evaluate", STUDY.evaluate.device),
    params:
        degrees=options("degree", STUDY.infer_degrees),
        settings=f"--variant {STUDY.variants[0]} {STUDY.evaluate.options()}",
    shell:
        "tocom segment evaluate {input.data} --checkpoint {input.checkpoint} --compensator {input.compensator}"
        " {params.degrees} {params.settings} --output {output} > {log} 2>&1"


rule segment_table:
    input:
        ALL_SEGMENTED,
    output:
        f"{ROOT}/tables/segmentation.md",
        f"{ROOT}/tables/segmentation.tex",
        report(
            f"{ROOT}/tables/segmentation.html",
            caption="../report/tables/segmentation.rst",
            category="Tables",
        ),
        cells=report(
            f"{ROOT}/segmentation.csv",
            caption="../report/segmentation.rst",
            category="Data",
        ),
    log:
        f"{LOGS}/segment/table.log",
    benchmark:
        f"{BENCHMARKS}/segment/table.tsv"
    conda:
        "../envs/tocom.yaml"
    threads: 1
    resources:
        mem_mb=memory("analysis"),
        runtime=minutes("analysis"),
    params:
        root=lambda wildcards, input: placed(ROOT, input[0]),
        where=f"--study {STUDY.study} --task {STUDY.segmentation.name}",
        models=options("backbone", [b.name for b in STUDY.backbones])
        + " "
        + options("compressor", STUDY.compressors),
        grid=" ".join(
            [
                options("train-degree", STUDY.train_degrees),
                options("infer-degree", STUDY.infer_degrees),
                options("seed", STUDY.seeds),
            ]
        ),
        how=f"--variant {STUDY.variants[0]} --resamples {STUDY.analysis.resamples}",
    shell:
        "tocom segment table {params.root}/segmentation/predictions --tables {params.root}/tables"
        " {params.where} {params.models} {params.grid} {params.how} --output {output.cells}"
        " > {log} 2>&1"
