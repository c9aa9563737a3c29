"""Predictions -> cells -> comparisons -> tables and figures; comparison with the committed reference."""


rule study:
    output:
        STUDY,
    log:
        f"{ROOT}/logs/study.log",
    benchmark:
        f"{ROOT}/benchmarks/study.tsv"
    conda:
        "../envs/tocom.yaml"
    threads: 1
    resources:
        mem_mb=growing(2000),
        runtime=growing(10),
    params:
        config=lambda wildcards: PLAN.study(wildcards).as_json(),
    shell:
        "tocom study {params.config:q} --output {output} > {log} 2>&1"


rule cells:
    input:
        study=STUDY,
        predictions=lambda wildcards: PLAN.per_model(PLAN.study(wildcards), PREDICTIONS),
    output:
        report(f"{ROOT}/cells.csv", caption="../report/cells.rst", category="Data"),
    log:
        f"{ROOT}/logs/cells.log",
    benchmark:
        f"{ROOT}/benchmarks/cells.tsv"
    conda:
        "../envs/tocom.yaml"
    threads: 1
    resources:
        mem_mb=growing(2000),
        runtime=growing(30),
    params:
        folder=lambda wildcards, input: folder_of(input.study),
    shell:
        "tocom analyse cells {params.folder} --output {output} > {log} 2>&1"


rule gather_transfer:
    input:
        lambda wildcards: PLAN.per_model(PLAN.study(wildcards), TRANSFER, of="gaps"),
    output:
        report(
            f"{ROOT}/transfer.csv", caption="../report/transfer.rst", category="Data"
        ),
    log:
        f"{ROOT}/logs/gather_transfer.log",
    benchmark:
        f"{ROOT}/benchmarks/gather_transfer.tsv"
    conda:
        "../envs/tocom.yaml"
    threads: 1
    resources:
        mem_mb=growing(2000),
        runtime=growing(30),
    shell:
        "tocom analyse concat {input} --output {output} > {log} 2>&1"


rule gather_throughput:
    input:
        lambda wildcards: PLAN.per_model(PLAN.study(wildcards), THROUGHPUT, of="speed"),
    output:
        report(
            f"{ROOT}/throughput.csv",
            caption="../report/throughput.rst",
            category="Data",
        ),
    log:
        f"{ROOT}/logs/gather_throughput.log",
    benchmark:
        f"{ROOT}/benchmarks/gather_throughput.tsv"
    conda:
        "../envs/tocom.yaml"
    threads: 1
    resources:
        mem_mb=growing(2000),
        runtime=growing(30),
    shell:
        "tocom analyse concat {input} --output {output} > {log} 2>&1"


rule compare:
    input:
        study=STUDY,
        predictions=lambda wildcards: PLAN.per_model(PLAN.study(wildcards), PREDICTIONS),
    output:
        report(
            f"{ROOT}/significance.csv",
            caption="../report/significance.rst",
            category="Data",
        ),
        report(f"{ROOT}/harm.csv", caption="../report/harm.rst", category="Data"),
        report(
            f"{ROOT}/mismatch.csv", caption="../report/mismatch.rst", category="Data"
        ),
        report(
            f"{ROOT}/pairwise.csv", caption="../report/pairwise.rst", category="Data"
        ),
    log:
        f"{ROOT}/logs/compare.log",
    benchmark:
        f"{ROOT}/benchmarks/compare.tsv"
    conda:
        "../envs/tocom.yaml"
    threads: 1
    resources:
        mem_mb=growing(2000),
        runtime=growing(30),
    params:
        folder=lambda wildcards, input: folder_of(input.study),
    shell:
        "tocom analyse compare {params.folder} --output {params.folder} > {log} 2>&1"


rule costs:
    input:
        study=STUDY,
        data=lambda wildcards: [
            DATA.format(study=wildcards.study, task=task)
            for task in PLAN.study(wildcards).task_names
        ],
        learned=lambda wildcards: PLAN.all_learned(wildcards),
        curves=lambda wildcards: [
            str(Path(file).with_suffix(".csv")) for file in PLAN.all_learned(wildcards)
        ],
        checkpoints=lambda wildcards: PLAN.per_model(PLAN.study(wildcards), CHECKPOINTS),
        adapted=lambda wildcards: PLAN.per_model(
            PLAN.study(wildcards), ADAPTED, of="adapted"
        ),
    output:
        report(f"{ROOT}/costs.csv", caption="../report/costs.rst", category="Data"),
    log:
        f"{ROOT}/logs/costs.log",
    benchmark:
        f"{ROOT}/benchmarks/costs.tsv"
    conda:
        "../envs/tocom.yaml"
    threads: 1
    resources:
        mem_mb=growing(2000),
        runtime=growing(30),
    params:
        folder=lambda wildcards, input: folder_of(input.study),
    shell:
        "tocom analyse costs {params.folder} --output {output} > {log} 2>&1"


rule tables:
    input:
        unpack(analysed),
        costs=f"{ROOT}/costs.csv",
    output:
        expand(
            f"{ROOT}/tables/{{name}}.{{kind}}",
            name=TABLES,
            kind=["md", "tex"],
            allow_missing=True,
        ),
        *[
            report(
                f"{ROOT}/tables/{name}.html",
                caption=f"../report/tables/{name}.rst",
                category="Tables",
            )
            for name in TABLES
        ],
    log:
        f"{ROOT}/logs/tables.log",
    benchmark:
        f"{ROOT}/benchmarks/tables.tsv"
    conda:
        "../envs/tocom.yaml"
    threads: 1
    resources:
        mem_mb=growing(2000),
        runtime=growing(30),
    params:
        folder=lambda wildcards, input: folder_of(input.study),
    shell:
        "tocom analyse tables {params.folder} --output {params.folder}/tables > {log} 2>&1"


rule paper_table:
    input:
        unpack(analysed),
        learned=lambda wildcards: PLAN.all_learned(wildcards),
    output:
        f"{ROOT}/tables/paper.md",
        f"{ROOT}/tables/paper.tex",
        report(
            f"{ROOT}/tables/paper.html",
            caption="../report/tables/paper.rst",
            category="Tables",
        ),
    log:
        f"{ROOT}/logs/paper_table.log",
    benchmark:
        f"{ROOT}/benchmarks/paper_table.tsv"
    conda:
        "../envs/tocom.yaml"
    threads: 1
    resources:
        mem_mb=growing(2000),
        runtime=growing(30),
    params:
        folder=lambda wildcards, input: folder_of(input.study),
    shell:
        "tocom analyse paper {params.folder} --output {params.folder}/tables > {log} 2>&1"


rule figures:
    input:
        unpack(analysed),
    output:
        report(
            directory(f"{ROOT}/figures"),
            patterns=["{name}.png"],
            caption="../report/figures.rst",
            category="Figures",
        ),
    log:
        f"{ROOT}/logs/figures.log",
    benchmark:
        f"{ROOT}/benchmarks/figures.tsv"
    conda:
        "../envs/tocom.yaml"
    threads: 1
    resources:
        mem_mb=growing(2000),
        runtime=growing(30),
    params:
        folder=lambda wildcards, input: folder_of(input.study),
    shell:
        "tocom analyse figures {params.folder} --output {params.folder}/figures > {log} 2>&1"


rule verify:
    input:
        [path for name in PLAN.studies for path in made_by(name) + results_of(name)],
        reference=expand(f"{ROOT}/reference/cells.csv", study=PLAN.studies),
    log:
        "results/verify.log",
    conda:
        "../envs/tocom.yaml"
    threads: 1
    resources:
        mem_mb=growing(2000),
        runtime=growing(30),
    params:
        folders=expand(ROOT, study=PLAN.studies),
    shell:
        "tocom analyse verify {params.folders} 2>&1 | tee {log}"


rule overview:
    input:
        [path for name in PLAN.studies for path in made_by(name) + results_of(name)],
    output:
        expand("results/overview.{kind}", kind=["md", "tex", "html"]),
    log:
        "results/overview.log",
    conda:
        "../envs/tocom.yaml"
    threads: 1
    resources:
        mem_mb=growing(2000),
        runtime=growing(30),
    params:
        folders=expand(ROOT, study=PLAN.studies),
    shell:
        "tocom analyse overview {params.folders} --output results/overview > {log} 2>&1"
