"""Measure speed and memory, each model alone on its machine."""


rule throughput:
    input:
        backbone=backbone_file,
        compensator=COMPENSATOR.replace("{variant}", MAIN),
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
        mem_mb=memory("throughput"),
        runtime=minutes("throughput"),
        gpu=STUDY.gpus("throughput", STUDY.throughput.device),
    params:
        degrees=options("degree", sorted({0, *STUDY.infer_degrees})),
        settings=STUDY.throughput_options(),
        columns=lambda wildcards: options(
            "column", [f"study={STUDY.study}", f"backbone={wildcards.backbone}"]
        ),
    shell:
        "tocom throughput {input.backbone:q} --compressor {wildcards.compressor} --compensator {input.compensator}"
        " {params.degrees} {params.columns} {params.settings} --output {output} > {log} 2>&1"


rule gather_throughput:
    input:
        THROUGHPUT,
    output:
        report(
            f"{ROOT}/throughput.csv",
            caption="../report/throughput.rst",
            category="Data",
        ),
    log:
        f"{LOGS}/gather_throughput.log",
    benchmark:
        f"{BENCHMARKS}/gather_throughput.tsv"
    conda:
        "../envs/tocom.yaml"
    threads: 1
    resources:
        mem_mb=memory("analysis"),
        runtime=minutes("analysis"),
    shell:
        "tocom analyse concat {input} --output {output} > {log} 2>&1"
