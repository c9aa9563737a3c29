"""Predictions -> cells -> statistics -> tables and figures; comparison with the committed reference."""


rule cells:
    input:
        ALL_PREDICTIONS,
    output:
        report(f"{ROOT}/cells.csv", caption="../report/cells.rst", category="Data"),
    log:
        f"{LOGS}/cells.log",
    benchmark:
        f"{BENCHMARKS}/cells.tsv"
    conda:
        "../envs/tocom.yaml"
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: 1000 * attempt,
        runtime=lambda wildcards, attempt: 10 * attempt,
    params:
        grid=f"{ROOT}/predictions --study {STUDY.study} {grid_options()}",
    shell:
        "tocom analyse cells {params.grid} --output {output} > {log} 2>&1"


rule gather_throughput:
    input:
        per_model(f"{ROOT}/throughput/{{backbone}}/{{compressor}}.csv"),
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
        mem_mb=lambda wildcards, attempt: 500 * attempt,
        runtime=lambda wildcards, attempt: 5 * attempt,
    shell:
        "tocom analyse concat {input} --output {output} > {log} 2>&1"


rule gather_transfer:
    input:
        per_model(f"{ROOT}/transfer/{{backbone}}/{{compressor}}.csv"),
    output:
        report(
            f"{ROOT}/transfer.csv", caption="../report/transfer.rst", category="Data"
        ),
    log:
        f"{LOGS}/gather_transfer.log",
    benchmark:
        f"{BENCHMARKS}/gather_transfer.tsv"
    conda:
        "../envs/tocom.yaml"
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: 500 * attempt,
        runtime=lambda wildcards, attempt: 5 * attempt,
    shell:
        "tocom analyse concat {input} --output {output} > {log} 2>&1"


rule significance:
    input:
        cells=f"{ROOT}/cells.csv",
        predictions=ALL_PREDICTIONS,
    output:
        report(
            f"{ROOT}/significance.csv",
            caption="../report/significance.rst",
            category="Data",
        ),
    log:
        f"{LOGS}/significance.log",
    benchmark:
        f"{BENCHMARKS}/significance.tsv"
    conda:
        "../envs/tocom.yaml"
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: 2000 * attempt,
        runtime=lambda wildcards, attempt: 30 * attempt,
    params:
        how=f"--predictions {ROOT}/predictions --resamples {STUDY.analysis.resamples}",
    shell:
        "tocom analyse significance {input.cells} {params.how} --output {output} > {log} 2>&1"


rule tables:
    input:
        f"{ROOT}/cells.csv",
        f"{ROOT}/significance.csv",
        f"{ROOT}/throughput.csv",
    output:
        expand(
            f"{ROOT}/tables/{{name}}.{{kind}}",
            name=STUDY.table_names,
            kind=["md", "tex"],
        ),
        *[
            report(
                f"{ROOT}/tables/{name}.html",
                caption=f"../report/tables/{name}.rst",
                category="Tables",
            )
            for name in STUDY.table_names
        ],
    log:
        f"{LOGS}/tables.log",
    benchmark:
        f"{BENCHMARKS}/tables.tsv"
    conda:
        "../envs/tocom.yaml"
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: 1000 * attempt,
        runtime=lambda wildcards, attempt: 10 * attempt,
    params:
        folders=f"{ROOT} --output {ROOT}/tables",
    shell:
        "tocom analyse tables {params.folders} > {log} 2>&1"


rule figures:
    input:
        f"{ROOT}/cells.csv",
        f"{ROOT}/significance.csv",
        [f"{ROOT}/transfer.csv"] if STUDY.gap_degrees else [],
    output:
        expand(f"{ROOT}/figures/{{name}}.pdf", name=STUDY.figure_names),
        *[
            report(
                f"{ROOT}/figures/{name}.png",
                caption=f"../report/figures/{kind}.rst",
                category="Figures",
            )
            for name, kind in STUDY.figure_kinds.items()
        ],
    log:
        f"{LOGS}/figures.log",
    benchmark:
        f"{BENCHMARKS}/figures.tsv"
    conda:
        "../envs/tocom.yaml"
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: 1000 * attempt,
        runtime=lambda wildcards, attempt: 10 * attempt,
    params:
        folders=f"{ROOT} --output {ROOT}/figures",
    shell:
        "tocom analyse figures {params.folders} > {log} 2>&1"


rule verify:
    input:
        INTERMEDIATE,
        RESULTS,
        cells=f"{ROOT}/cells.csv",
        reference=f"{ROOT}/reference/cells.csv",
    log:
        f"{LOGS}/verify.log",
    benchmark:
        f"{BENCHMARKS}/verify.tsv"
    conda:
        "../envs/tocom.yaml"
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: 500 * attempt,
        runtime=lambda wildcards, attempt: 5 * attempt,
    params:
        tolerances=f"--cell-points {STUDY.verify.cell_points} --mean-points {STUDY.verify.mean_points}"
        f" --gain-points {STUDY.verify.gain_points}",
    shell:
        "tocom analyse verify {input.cells} {input.reference} {params.tolerances} 2>&1 | tee {log}"
