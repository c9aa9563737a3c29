"""Evaluate all cells of a batch of checkpoints with one decoded task; carry gaps between tasks; measure speed."""

for _index, _batch in enumerate(STUDY.batches):

    rule:
        name:
            f"evaluate_{_index}"
        input:
            data=DATA,
            compensator=COMPENSATOR,
            checkpoints=over(CHECKPOINT, _batch),
        output:
            over(PREDICTIONS, _batch),
        log:
            f"{LOGS}/evaluate/{{backbone}}/{{compressor}}/{{task}}/batch-{_index}.log",
        benchmark:
            f"{BENCHMARKS}/evaluate/{{backbone}}/{{compressor}}/{{task}}/batch-{_index}.tsv"
        # Before the shorter jobs that also wait for checkpoints, which then fill the cores at the end.
        priority: 5
        conda:
            "../envs/tocom.yaml"
        threads: STUDY.evaluate.threads
        resources:
            mem_mb=lambda wildcards, attempt: 2000 * attempt,
            runtime=lambda wildcards, attempt: 60 * attempt,
            gpu=gpus(STUDY.evaluate),
        params:
            checkpoints=lambda wildcards, input: options(
                "checkpoint", input.checkpoints
            ),
            outputs=lambda wildcards, output: options("output", output),
            degrees=options("degree", STUDY.infer_degrees),
            settings=STUDY.evaluate.options(),
        shell:
            "tocom evaluate {input.data} --compensator {input.compensator} {params.checkpoints} {params.degrees}"
            " {params.settings} {params.outputs} > {log} 2>&1"


rule transfer:
    input:
        data=expand(DATA, task=STUDY.task_names),
        checkpoints=gap_checkpoints,
    output:
        f"{ROOT}/transfer/{{backbone}}/{{compressor}}.csv",
    log:
        f"{LOGS}/transfer/{{backbone}}/{{compressor}}.log",
    benchmark:
        f"{BENCHMARKS}/transfer/{{backbone}}/{{compressor}}.tsv"
    conda:
        "../envs/tocom.yaml"
    threads: STUDY.evaluate.threads
    resources:
        mem_mb=lambda wildcards, attempt: 2000 * attempt,
        runtime=lambda wildcards, attempt: 60 * attempt,
        gpu=gpus(STUDY.evaluate),
    params:
        checkpoints=lambda wildcards: options(
            "checkpoint", STUDY.gap_options(CHECKPOINT, **wildcards)
        ),
        settings=STUDY.evaluate.options(),
        columns=lambda wildcards: options(
            "column",
            [
                f"study={STUDY.study}",
                f"backbone={wildcards.backbone}",
                f"compressor={wildcards.compressor}",
            ],
        ),
    shell:
        "tocom transfer {input.data} {params.checkpoints} {params.columns} {params.settings} --output {output} > {log} 2>&1"


rule throughput:
    input:
        backbone=backbone_file,
        compensator=COMPENSATOR,
    output:
        f"{ROOT}/throughput/{{backbone}}/{{compressor}}.csv",
    log:
        f"{LOGS}/throughput/{{backbone}}/{{compressor}}.log",
    benchmark:
        f"{BENCHMARKS}/throughput/{{backbone}}/{{compressor}}.tsv"
    conda:
        "../envs/tocom.yaml"
    # Alone on the machine, so that other jobs do not disturb the clock.
    threads: ALL_CORES
    resources:
        mem_mb=lambda wildcards, attempt: 2000 * attempt,
        runtime=lambda wildcards, attempt: 30 * attempt,
        gpu=gpus(STUDY.throughput),
    params:
        degrees=options("degree", sorted({0, *STUDY.infer_degrees})),
        settings=STUDY.throughput.options(),
        columns=lambda wildcards: options(
            "column", [f"study={STUDY.study}", f"backbone={wildcards.backbone}"]
        ),
    shell:
        "tocom throughput {input.backbone:q} --compressor {wildcards.compressor} --compensator {input.compensator}"
        " {params.degrees} {params.columns} {params.settings} --output {output} > {log} 2>&1"
