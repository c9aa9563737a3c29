"""Evaluate all cells of a batch of checkpoints with one decoded task; carry gaps between tasks."""

for _index, _batch in enumerate(STUDY.batches):

    rule:
        name:
            f"evaluate_{_index}"
        input:
            data=DATA,
            compensators=compensator_files,
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
            mem_mb=memory("evaluate"),
            runtime=minutes("evaluate"),
            gpu=STUDY.gpus("evaluate", STUDY.evaluate.device),
        params:
            checkpoints=lambda wildcards, input: options(
                "checkpoint", input.checkpoints
            ),
            outputs=lambda wildcards, output: options("output", output),
            compensators=lambda wildcards, input: options(
                "compensator",
                map("{}={}".format, STUDY.variants, input.compensators),
            ),
            degrees=options("degree", STUDY.infer_degrees),
            scales=STUDY.scales_options(),
            settings=STUDY.evaluate.options(),
        shell:
            "tocom evaluate {input.data} {params.compensators} {params.checkpoints} {params.degrees} {params.scales}"
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
        mem_mb=memory("evaluate"),
        runtime=minutes("evaluate"),
        gpu=STUDY.gpus("evaluate", STUDY.evaluate.device),
    params:
        checkpoints=lambda wildcards, input: options(
            "checkpoint",
            STUDY.gap_options(placed(CHECKPOINT, input.checkpoints[0]), **wildcards),
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
