"""The segmentation study through the DAG, on generated scenes."""

import pandas as pd

from tests.workflow.test_workflow import ROOT, snakemake, workplace
from tocom.config import read_study

SCENES = ROOT / "tests" / "configs" / "scenes.yaml"


def test_a_segmentation_study_makes_its_table(tmp_path):
    folder, study = workplace(tmp_path), read_study(SCENES)
    result = snakemake(folder, "--configfile", SCENES)
    assert result.returncode == 0, result.stdout + result.stderr
    root = folder / "results" / study.study
    cells = pd.read_csv(root / "segmentation.csv", keep_default_na=False)
    assert len(cells) == len(study.seeds) * len(study.train_degrees) * len(study.infer_degrees) * 2  # with, without
    assert cells.miou.between(0, 100).all()
    assert (cells.miou_low <= cells.miou).all()
    assert (cells.miou <= cells.miou_high).all()
    text = (root / "tables" / "segmentation.md").read_text()
    assert text.startswith("### ")
    assert "not run" not in text
    assert "\\toprule" in (root / "tables" / "segmentation.tex").read_text()
    speed = pd.read_csv(root / "throughput.csv")
    assert set(speed.infer_degree) == {0, *study.infer_degrees}
