"""All studies of the paper in one DAG, and their overview: `snakemake --snakefile workflow/joint.smk`.

Others: `--config 'configs=[config/cifar100.yaml,config/mine.yaml]'`. Data sets, backbones and compensators that several
studies use are made once.
"""

from pathlib import Path

import yaml

NAMES = [
    *["cifar100", "fgvc", "vtab1k", "backbones", "compressors"],
    *["speedup", "ablations", "gap_transfer", "ade20k"],
]
CONFIGS = config.get("configs", [f"config/{name}.yaml" for name in NAMES])
STUDIES = []

for _path in CONFIGS:
    _config = yaml.safe_load(Path(_path).read_text())
    # Snakemake looks these two up by name, among the global variables.
    study, prefix = _config["study"], f"{_config['study']}_"
    STUDIES.append(study)

    module:
        name: study
        snakefile:
            "../Snakefile"
        config:
            _config

    use rule * from study as prefix*


# Whatever several studies can make, the first of them makes.
for _rule in ("fetch", "import_backbone", "pretrain_backbone", "distil"):
    workflow.ruleorder(*[f"{name}_{_rule}" for name in STUDIES])


rule overview:
    input:
        [getattr(rules, f"{name}_all").input for name in STUDIES],
    output:
        expand("results/overview.{kind}", kind=["md", "tex", "html"]),
    log:
        "results/overview.log",
    conda:
        "envs/tocom.yaml"
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: 2000 * attempt,
        runtime=lambda wildcards, attempt: 30 * attempt,
    params:
        configs=CONFIGS,
    shell:
        "tocom analyse overview {params.configs} --output results/overview > {log} 2>&1"


rule all:
    default_target: True
    input:
        # Named beside the overview, which may be there when they are not.
        rules.overview.input,
        rules.overview.output,
