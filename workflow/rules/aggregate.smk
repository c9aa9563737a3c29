"""Predictions -> cells -> statistics -> tables and figures; comparison with the committed reference."""

# The table in the paper's form has a rule of its own.
BASIC_TABLES = [name for name in STUDY.table_names if name != "paper"]


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
        mem_mb=memory("analysis"),
        runtime=minutes("analysis"),
    params:
        predictions=lambda wildcards, input: placed(f"{ROOT}/predictions", input[0]),
        grid=f"--study {STUDY.study} {grid_options()}",
    shell:
        "tocom analyse cells {params.predictions} {params.grid} --output {output} > {log} 2>&1"


rule gather_transfer:
    input:
        TRANSFER,
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
        mem_mb=memory("analysis"),
        runtime=minutes("analysis"),
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
        mem_mb=memory("analysis"),
        runtime=minutes("analysis"),
    params:
        predictions=lambda wildcards, input: placed(f"{ROOT}/predictions", input.cells),
        how=f"--resamples {STUDY.analysis.resamples} {STUDY.group_options()}",
    shell:
        "tocom analyse significance {input.cells} --predictions {params.predictions} {params.how} --output {output} > {log} 2>&1"


rule tables:
    input:
        f"{ROOT}/cells.csv",
        f"{ROOT}/significance.csv",
        f"{ROOT}/throughput.csv",
    output:
        expand(
            f"{ROOT}/tables/{{name}}.{{kind}}",
            name=BASIC_TABLES,
            kind=["md", "tex"],
        ),
        *[
            report(
                f"{ROOT}/tables/{name}.html",
                caption=f"../report/tables/{name}.rst",
                category="Tables",
            )
            for name in BASIC_TABLES
        ],
    log:
        f"{LOGS}/tables.log",
    benchmark:
        f"{BENCHMARKS}/tables.tsv"
    conda:
        "../envs/tocom.yaml"
    threads: 1
    resources:
        mem_mb=memory("analysis"),
        runtime=minutes("analysis"),
    params:
        root=lambda wildcards, input: placed(ROOT, input[0]),
        how=f"--main {STUDY.variants[0]} {STUDY.group_options()}",
    shell:
        "tocom analyse tables {params.root} --output {params.root}/tables {params.how} > {log} 2>&1"


rule paper_table:
    input:
        f"{ROOT}/cells.csv",
        f"{ROOT}/significance.csv",
        f"{ROOT}/throughput.csv",
        [f"{ROOT}/transfer.csv"] if STUDY.gap_degrees else [],
        compensators=[path for _, path in ALL_COMPENSATORS],
    output:
        f"{ROOT}/tables/paper.md",
        f"{ROOT}/tables/paper.tex",
        report(
            f"{ROOT}/tables/paper.html",
            caption="../report/tables/paper.rst",
            category="Tables",
        ),
    log:
        f"{LOGS}/paper_table.log",
    benchmark:
        f"{BENCHMARKS}/paper_table.tsv"
    conda:
        "../envs/tocom.yaml"
    threads: 1
    resources:
        mem_mb=memory("analysis"),
        runtime=minutes("analysis"),
    params:
        root=lambda wildcards, input: placed(ROOT, input[0]),
        config=STUDY.as_json(),
        compensators=lambda wildcards, input: options(
            "compensator",
            map(
                "{}={}".format,
                [name for name, _ in ALL_COMPENSATORS],
                input.compensators,
            ),
        ),
    shell:
        "tocom analyse paper-table {params.root} --output {params.root}/tables --config {params.config:q} {params.compensators} > {log} 2>&1"


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
        mem_mb=memory("analysis"),
        runtime=minutes("analysis"),
    params:
        root=lambda wildcards, input: placed(ROOT, input[0]),
        how=f"--main {STUDY.variants[0]} {STUDY.group_options()}",
    shell:
        "tocom analyse figures {params.root} --output {params.root}/figures {params.how} > {log} 2>&1"


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
        mem_mb=memory("analysis"),
        runtime=minutes("analysis"),
    params:
        tolerances=f"--cell-points {STUDY.verify.cell_points} --mean-points {STUDY.verify.mean_points}"
        f" --gain-points {STUDY.verify.gain_points}",
    shell:
        "tocom analyse verify {input.cells} {input.reference} {params.tolerances} 2>&1 | tee {log}"
