"""Fine-tune every task at every train degree and seed; a job handles one batch of checkpoints."""

for _index, _batch in enumerate(STUDY.batches):

    rule:
        name:
            f"finetune_{_index}"
        input:
            backbone=backbone_file,
            data=DATA,
        output:
            over(CHECKPOINT, _batch),
        log:
            f"{LOGS}/finetune/{{backbone}}/{{compressor}}/{{task}}/batch-{_index}.log",
        benchmark:
            f"{BENCHMARKS}/finetune/{{backbone}}/{{compressor}}/{{task}}/batch-{_index}.tsv"
        conda:
            "../envs/tocom.yaml"
        threads: STUDY.finetune.threads
        resources:
            mem_mb=lambda wildcards, attempt: 2000 * attempt,
            runtime=lambda wildcards, attempt: 120 * attempt,
            gpu=gpus(STUDY.finetune),
        params:
            template=lambda wildcards: CHECKPOINT.format(
                **wildcards, train_degree="{degree}", seed="{seed}"
            ),
            runs=options("run", [f"{c.train_degree}:{c.seed}" for c in _batch]),
            settings=f"--max-degree {STUDY.max_degree} {STUDY.finetune.options()}",
        shell:
            "tocom finetune {input.backbone:q} {input.data} --compressor {wildcards.compressor}"
            " {params.runs} {params.settings} --output '{params.template}' > {log} 2>&1"
