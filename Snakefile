"""The way in: `snakemake --cores all` runs the study of config/demo.yaml.

Another study: `snakemake --cores all --configfile config/NAME.yaml`. Several as one DAG: a config that lists them, such
as `--configfile config/studies.yaml`. Other targets: `verify` (compare with the committed reference), `overview` (one
table over several studies), `pretrain` (make the bundled backbone again).
"""

from snakemake.utils import min_version

min_version("9.0")

# Given by --configfile or not at all: a study must not inherit keys, nor its folder, from the default one.
if not {"study", "configs"} & set(config) and not workflow.config_settings.configfiles:

    configfile: "config/demo.yaml"


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/backbone.smk"
include: "workflow/rules/learn.smk"
include: "workflow/rules/finetune.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/analyse.smk"


rule all:
    default_target: True
    input:
        [files for name in PLAN.studies for files in (made_by(name), results_of(name))],
