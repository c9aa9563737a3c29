"""Fine-tune every task at every train degree and seed; a job handles one batch of checkpoints."""


rule finetune:
    input:
        backbone=PLAN.backbone_file,
        data=DATA,
        learned=PLAN.compressors,
    output:
        directory(CHECKPOINTS),
    log:
        f"{ROOT}/logs/finetune/{{backbone}}/{{tuned}}/{{task}}/{{batch}}.log",
    benchmark:
        f"{ROOT}/benchmarks/finetune/{{backbone}}/{{tuned}}/{{task}}/{{batch}}.tsv"
    conda:
        "../envs/tocom.yaml"
    threads: lambda wildcards: PLAN.finetune(wildcards).training.threads
    resources:
        mem_mb=growing(2000),
        runtime=growing(120),
        gpu=gpus(PLAN.finetune, lambda job: job.training),
        # How the work is done changes no result; profiles say it (set-resources, set-threads).
        workers=0,
        processes=1,
        nodes=1,
        # Slurm's plugin would ask for the threads for each GPU.
        cpus_per_task=lambda wildcards, threads: threads,
    params:
        job=lambda wildcards: PLAN.finetune(wildcards).as_json(),
        learned=lambda wildcards, input: [f"--learned {path}" for path in input.learned],
    shell:
        "tocom finetune {params.job:q} --backbone {input.backbone:q} --data {input.data} {params.learned} --workers {resources.workers} --processes {resources.processes} --nodes {resources.nodes}"
        " --output {output} > {log} 2>&1"
