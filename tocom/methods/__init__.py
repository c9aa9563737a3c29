"""The registry of parts: one file a part; the only place that lists them by name.

What is named in a config is imported, nothing else. A class of yours needs no entry here: name it as
``mypackage.module:MyClass``.
"""

from __future__ import annotations

#: Role -> name of a part -> where its class is.
PARTS: dict[str, dict[str, str]] = {
    "compressor": {
        "tome": "tocom.methods.tome:ToMe",
        "evit": "tocom.methods.evit:EViT",
        "tome_mlp": "tocom.methods.tome_mlp:ToMeMLP",
        "pitome": "tocom.methods.pitome:PiToMe",
        "tofu": "tocom.methods.tofu:ToFu",
        "diffrate": "tocom.methods.diffrate:DiffRate",
        "pyra": "tocom.methods.pyra:PYRA",
        "sparse_tuning": "tocom.methods.sparse_tuning:SparseTuning",
        "topk": "tocom.methods.topk:TopK",
        "quantise": "tocom.methods.quantise:Quantise",
        "lorc": "tocom.methods.lorc:LoRC",
        "condense": "tocom.methods.condense:Condense",
        "beacon": "tocom.methods.beacon:Beacon",
    },
    "tuning": {
        "full": "tocom.methods.full:Full",
        "head": "tocom.methods.head:Head",
        "lora": "tocom.methods.lora:LoRA",
        "adaptformer": "tocom.methods.adaptformer:AdaptFormer",
        "none": "tocom.methods.as_it_is:AsItIs",
    },
    "compensator": {
        "tocom": "tocom.methods.tocom:ToCom",
        "widecom": "tocom.methods.widecom:WideCom",
        "tocom_lm": "tocom.methods.tocom_lm:ToComLM",
    },
}
#: The part of each role that is meant where none is named.
DEFAULTS = {"compressor": "tome", "tuning": "full", "compensator": "tocom"}
#: What models read -> the compensator that work is measured with.
COMPENSATORS = {"images": DEFAULTS["compensator"], "text": "tocom_lm"}
#: Roles of the parts of a method that may be learned on a backbone.
ROLES = ("compressor", "compensator")
