"""The way in: `snakemake --cores all` runs the study of config/demo.yaml.

Another study: `snakemake --cores all --configfile config/NAME.yaml`.
Other targets: `verify` (compare with the committed reference), `pretrain` (make the bundled backbone again).
"""

from snakemake.exceptions import WorkflowError
from snakemake.utils import min_version

min_version("9.0")

# Given by --configfile or not at all: a study must not inherit keys, nor its folder, from the default one.
if "study" not in config and not workflow.config_settings.configfiles:

    configfile: "config/demo.yaml"


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/backbone.smk"
include: "workflow/rules/distil.smk"
include: "workflow/rules/throughput.smk"


if STUDY.segmentation:

    include: "workflow/rules/segment.smk"

else:

    include: "workflow/rules/finetune.smk"
    include: "workflow/rules/evaluate.smk"
    include: "workflow/rules/aggregate.smk"


rule all:
    default_target: True
    input:
        INTERMEDIATE,
        ALL_SEGMENTED if STUDY.segmentation else [],
        RESULTS,
