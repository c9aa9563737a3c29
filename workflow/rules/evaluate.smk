"""Evaluate all cells of a batch of checkpoints with one decoded task; carry gaps between tasks; measure speed."""


rule evaluate:
    input:
        data=DATA,
        checkpoints=CHECKPOINTS,
        compensators=lambda wildcards: [
            file for _, file in PLAN.compensators(wildcards)
        ],
        adapted=lambda wildcards: [
            folder for _, folder in PLAN.adapted(wildcards, ADAPTED)
        ],
    output:
        PREDICTIONS,
    log:
        f"{ROOT}/logs/evaluate/{{backbone}}/{{tuned}}/{{task}}/{{batch}}.log",
    benchmark:
        f"{ROOT}/benchmarks/evaluate/{{backbone}}/{{tuned}}/{{task}}/{{batch}}.tsv"
    # Before the shorter jobs that also wait for checkpoints, which then fill the cores at the end.
    priority: 5
    conda:
        "../envs/tocom.yaml"
    threads: lambda wildcards: PLAN.evaluate(wildcards).settings.threads
    resources:
        mem_mb=growing(2000),
        runtime=growing(60),
        gpu=gpus(PLAN.evaluate, lambda job: job.settings),
    params:
        job=lambda wildcards: PLAN.evaluate(wildcards).as_json(),
        compensators=lambda wildcards, input: named(
            "--compensator",
            [method for method, _ in PLAN.compensators(wildcards)],
            input.compensators,
        ),
        adapted=lambda wildcards, input: named(
            "--compensator",
            [method for method, _ in PLAN.adapted(wildcards, ADAPTED)],
            input.adapted,
        ),
    shell:
        "tocom evaluate {params.job:q} --checkpoint {input.checkpoints} --data {input.data} {params.compensators} {params.adapted}"
        " --output {output} > {log} 2>&1"


rule transfer:
    input:
        data=lambda wildcards: [
            data for data, _ in PLAN.gap_files(wildcards, DATA, CHECKPOINTS)
        ],
        checkpoints=lambda wildcards: [
            folder for _, folder in PLAN.gap_files(wildcards, DATA, CHECKPOINTS)
        ],
    output:
        TRANSFER,
    log:
        f"{ROOT}/logs/transfer/{{backbone}}/{{tuned}}.log",
    benchmark:
        f"{ROOT}/benchmarks/transfer/{{backbone}}/{{tuned}}.tsv"
    conda:
        "../envs/tocom.yaml"
    threads: lambda wildcards: PLAN.transfer(wildcards).settings.threads
    resources:
        mem_mb=growing(2000),
        runtime=growing(60),
        gpu=gpus(PLAN.transfer, lambda job: job.settings),
    params:
        job=lambda wildcards: PLAN.transfer(wildcards).as_json(),
        data=lambda wildcards, input: named(
            "--data", PLAN.gap_tasks(wildcards), input.data
        ),
        checkpoints=lambda wildcards, input: named(
            "--checkpoints", PLAN.gap_tasks(wildcards), input.checkpoints
        ),
    shell:
        "tocom transfer {params.job:q} {params.data} {params.checkpoints} --output {output} > {log} 2>&1"


rule throughput:
    input:
        backbone=PLAN.backbone_file,
        compensators=lambda wildcards: [
            file for _, file in PLAN.timed_compensators(wildcards)
        ],
        learned=PLAN.timed_compressor,
    output:
        THROUGHPUT,
    log:
        f"{ROOT}/logs/throughput/{{backbone}}/{{tuned}}.log",
    benchmark:
        f"{ROOT}/benchmarks/throughput/{{backbone}}/{{tuned}}.tsv"
    # Alone on the machine, so that other jobs do not disturb the clock.
    conda:
        "../envs/tocom.yaml"
    threads: ALL_CORES
    resources:
        mem_mb=growing(2000),
        runtime=growing(30),
        gpu=gpus(PLAN.throughput, lambda job: job.settings),
    params:
        job=lambda wildcards: PLAN.throughput(wildcards).as_json(),
        compensators=lambda wildcards, input: named(
            "--compensator",
            [method for method, _ in PLAN.timed_compensators(wildcards)],
            input.compensators,
        ),
        learned=lambda wildcards, input: [f"--learned {path}" for path in input.learned],
    shell:
        "tocom throughput {params.job:q} --backbone {input.backbone:q} {params.compensators} {params.learned}"
        " --output {output} > {log} 2>&1"
