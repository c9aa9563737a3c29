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
        threads: cores("finetune", lambda wildcards: STUDY.finetune_for(wildcards.task))
        resources:
            mem_mb=memory("finetune"),
            runtime=minutes("finetune"),
            gpu=STUDY.gpus("finetune", STUDY.finetune.device),
            # Slurm's plugin would ask for the threads for each GPU.
            cpus_per_task=cores(
                "finetune", lambda wildcards: STUDY.finetune_for(wildcards.task)
            ),
            nodes=STUDY.resources.finetune.nodes,
            # Not parameters, since how the work is done changes no result.
            start=STUDY.launcher("finetune"),
            how=lambda wildcards: STUDY.finetune_for(wildcards.task).how_options(),
        params:
            template=lambda wildcards, output: placed(
                CHECKPOINT.format(**wildcards, train_degree="{degree}", seed="{seed}"),
                output[0],
            ),
            runs=options("at", [f"{c.train_degree}:{c.seed}" for c in _batch]),
            degrees=f"--max-degree {STUDY.max_degree}",
            settings=lambda wildcards: STUDY.finetune_for(wildcards.task).options(),
            fine_tuned=lambda wildcards: STUDY.fine_tuned_option(wildcards.task),
        shell:
            "{resources.start} finetune {input.backbone:q} {input.data} --compressor {wildcards.compressor}"
            " {params.runs} {params.degrees} {params.fine_tuned} {params.settings} {resources.how} --output '{params.template}'"
            " > {log} 2>&1"
