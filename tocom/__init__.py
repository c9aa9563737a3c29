"""ToCom: change the token-compression degree of a timm ViT on the fly (arXiv 2408.06798).

Names are imported on first use, so that ``import tocom`` and ``tocom --help`` do not wait for torch.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "CompressedViT": "tocom.vit",
    "CompressedLM": "tocom.lm",
    "gflops": "tocom.compressed",
    "Compressor": "tocom.parts",
    "Tuning": "tocom.parts",
    "Compensator": "tocom.parts",
    "make_part": "tocom.parts",
    "load_part": "tocom.parts",
    "save_part": "tocom.parts",
    "Inflected": "tocom.degrees",
    "compress": "tocom.models",
    "import_backbone": "tocom.models",
    "load_fine_tuned": "tocom.models",
    "load_model": "tocom.models",
    "save_model": "tocom.models",
    "Server": "tocom.serving",
    "Curve": "tocom.serving",
    "load_compressed": "tocom.serving",
    "export": "tocom.exports",
    "TocomError": "tocom.errors",
    "FinetuneJob": "tocom.jobs",
    "LearnJob": "tocom.jobs",
    "AdaptJob": "tocom.jobs",
    "EvaluateJob": "tocom.jobs",
    "prepare": "tocom.data.registry",
    "pretrain": "tocom.stages.pretrain",
    "learn": "tocom.stages.learn",
    "finetune": "tocom.stages.finetune",
    "adapt": "tocom.stages.adapt",
    "evaluate": "tocom.stages.evaluate",
    "transfer": "tocom.stages.transfer",
    "throughput": "tocom.stages.throughput",
    "benchmark": "tocom.stages.benchmark",
    "read_study": "tocom.study",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'tocom' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
