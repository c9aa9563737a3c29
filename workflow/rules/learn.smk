"""Learn the parts of methods that are learned, for each backbone once with each seed."""


rule learn:
    input:
        PLAN.learning_data,
        backbone=PLAN.backbone_file,
        learned=PLAN.learned_before,
    output:
        part=LEARNED,
        curve=LEARNED.replace(".safetensors", ".csv"),
    log:
        "{store}/logs/learn/{backbone}/{part}.log",
    benchmark:
        "{store}/benchmarks/learn/{backbone}/{part}.tsv"
    # The longest job of a small study: start it first.
    priority: 10
    conda:
        "../envs/tocom.yaml"
    threads: lambda wildcards: PLAN.learn(wildcards).settings.threads
    resources:
        mem_mb=growing(2000),
        runtime=growing(60),
        gpu=gpus(PLAN.learn, lambda job: job.settings),
        # How the work is done changes no result; profiles say it (set-resources, set-threads).
        workers=0,
        processes=1,
        nodes=1,
        # Slurm's plugin would ask for the threads for each GPU.
        cpus_per_task=lambda wildcards, threads: threads,
    params:
        job=lambda wildcards: PLAN.learn(wildcards).as_json(),
        learned=lambda wildcards, input: [f"--learned {path}" for path in input.learned],
    shell:
        "tocom learn {params.job:q} --backbone {input.backbone:q} {params.learned} --workers {resources.workers} --processes {resources.processes} --nodes {resources.nodes}"
        " --output {output.part} > {log} 2>&1"


rule adapt:
    input:
        data=DATA,
        checkpoints=lambda wildcards: PLAN.adapted_to(wildcards, CHECKPOINTS),
        learned=PLAN.adapted_from,
    output:
        directory(ADAPTED),
    log:
        f"{ROOT}/logs/adapt/{{backbone}}/{{method}}/{{task}}/{{batch}}.log",
    benchmark:
        f"{ROOT}/benchmarks/adapt/{{backbone}}/{{method}}/{{task}}/{{batch}}.tsv"
    priority: 5
    conda:
        "../envs/tocom.yaml"
    threads: lambda wildcards: PLAN.adapt(wildcards).settings.threads
    resources:
        mem_mb=growing(2000),
        runtime=growing(60),
        gpu=gpus(PLAN.adapt, lambda job: job.settings),
        workers=0,
        processes=1,
        nodes=1,
        cpus_per_task=lambda wildcards, threads: threads,
    params:
        job=lambda wildcards: PLAN.adapt(wildcards).as_json(),
        learned=lambda wildcards, input: [f"--learned {path}" for path in input.learned],
    shell:
        "tocom adapt {params.job:q} --checkpoint {input.checkpoints} --data {input.data} {params.learned} --workers {resources.workers} --processes {resources.processes} --nodes {resources.nodes}"
        " --output {output} > {log} 2>&1"
