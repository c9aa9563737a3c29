"""Small models with weights large enough to matter, and the merging of method.md written as loops."""

import hashlib
import http.server
import threading
import types

import huggingface_hub
import pytest
import timm
import torch
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer

from tests.small import ARCHITECTURE, KWARGS, teach
from tests.small import build as build_backbone
from tocom.data.registry import prepare
from tocom.models import save_model
from tocom.parts import Shape, make_part

torch.set_num_threads(1)  # the models are too small to share, and tests may run in parallel

#: Every kind of model that CompressedViT says it supports: name -> arguments of timm's VisionTransformer.
FAMILIES = {
    "class token": {},
    "average pooling": {"class_token": False, "global_pool": "avg"},
    "average pooling, norm before it": {"class_token": False, "global_pool": "avg", "fc_norm": False},
    "average pooling beside a class token": {"global_pool": "avg"},
    "average pooling over the prefix too": {"global_pool": "avg", "pool_include_prefix": True, "reg_tokens": 2},
    "no pooling": {"global_pool": ""},
    "class token, norm after pooling": {"fc_norm": True},
    "layer scale": {"init_values": 0.5},
    "qk norm": {"qk_norm": True},
    "attention and MLP norm": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "norm before the blocks, none at the end": {"pre_norm": True, "final_norm": False},
    "no qkv bias, no position embedding": {"qkv_bias": False, "pos_embed": "none"},
    "4 registers": {"reg_tokens": 4, "no_embed_class": True},
    "1 register, average pooling, no class token": {"reg_tokens": 1, "class_token": False, "global_pool": "avg"},
    "gated attention": {"gated": True},
    "dynamic image size": {"dynamic_img_size": True},
    "every kind of dropout": {
        "drop_rate": 0.1,
        "pos_drop_rate": 0.1,
        "proj_drop_rate": 0.1,
        "attn_drop_rate": 0.1,
        "drop_path_rate": 0.2,
    },
    "distilled": {"distilled": True},
}
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 7}


@torch.no_grad()
def randomise(model, seed=0):
    """Give a model weights at which every token matters; timm's initial ones leave the logits nearly constant."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.ndim == 1:
            parameter += 0.2 * noise
        elif parameter.ndim == 3:  # class, distillation and register tokens, position embedding
            parameter.copy_(0.7 * noise)
        else:
            parameter.copy_(1.5 * noise / parameter[0].numel() ** 0.5)
    return model


def build(gated=False, distilled=False, **overrides):
    settings = SMALL | overrides
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if distilled:
            model = timm.create_model("deit_tiny_distilled_patch16_224", **settings)
        else:
            model = VisionTransformer(**settings)
    if gated:
        dim, heads = settings["embed_dim"], settings["num_heads"]
        for block in model.blocks:
            block.attn = Attention(dim, heads, qkv_bias=True, gated=True)
    return randomise(model).double().eval()


@pytest.fixture(scope="session")
def make_vit():
    """Build a small timm ViT in float64 and eval mode: 16 patches of a 32x32 image, 3 blocks, 7 classes."""
    return build


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES.keys())
def family(request):
    """One model of every supported kind."""
    return build(**request.param)


@pytest.fixture(scope="session")
def images():
    """Two random images in float64."""
    return torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def make_compensator():
    """Build a ToCom whose update is not zero, in float64."""

    def make(depth=3, dim=24, max_degree=6, seed=0, **options):
        shape = Shape(depth, dim, 2, 17, 1)
        result = make_part("compensator", {"kind": "tocom"} | options, shape, max_degree)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            result.down.copy_(torch.randn(result.down.shape, generator=generator))
            result.up.copy_(0.1 * torch.randn(result.up.shape, generator=generator))
        return result.double().eval()

    return make


@pytest.fixture(scope="session")
def loop_merge():
    """ToMe for one image as method.md words it: tokens [N, D], a list of sizes, metric [N, C] -> tokens, sizes."""

    def merge(tokens, sizes, metric, count, prefix):
        n_tokens = len(tokens)
        count = min(count, (n_tokens - prefix) // 2)
        if count <= 0:
            return tokens, sizes
        side_a = [i for i in range(0, n_tokens, 2) if i >= prefix]
        side_b = [i for i in range(1, n_tokens, 2) if i >= prefix]
        best = {}
        for a in side_a:
            for b in side_b:
                cosine = float(metric[a] @ metric[b] / (metric[a].norm() * metric[b].norm()))
                if a not in best or cosine > best[a][0]:
                    best[a] = (cosine, b)
        merging = sorted(best, key=lambda a: best[a][0], reverse=True)[:count]
        members = {i: [i] for i in range(n_tokens)}
        for a in merging:
            members[best[a][1]] += members.pop(a)
        if not prefix:  # the public code sorts what stays only to bring the class token to the front
            side_a.sort(key=lambda a: best[a][0], reverse=True)
        order = [*range(prefix), *(a for a in side_a if a in members), *side_b]
        merged_sizes = [sum(sizes[i] for i in members[j]) for j in order]
        merged = [
            sum(sizes[i] * tokens[i] for i in members[j]) / size for j, size in zip(order, merged_sizes, strict=True)
        ]
        return torch.stack(merged), merged_sizes

    return merge


# --- a backbone, a task and a compensator small enough to train in a second -------------------------------------------


@pytest.fixture(scope="session")
def backbone(tmp_path_factory):
    path = tmp_path_factory.mktemp("backbone") / "tiny.safetensors"
    save_model(path, build_backbone(), ARCHITECTURE, KWARGS)
    return path


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "digits.safetensors"
    prepare("digits", path, {"train": 64, "val": 32, "test": 40})
    return path


@pytest.fixture(scope="session")
def compensator(backbone, tmp_path_factory):
    path = tmp_path_factory.mktemp("compensator") / "tome.safetensors"
    teach(backbone, path)
    return path


# --- the Hub of models ------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server that answers as the Hub does, with the files put into its ``files``: (revision, name) -> path."""
    commits, files, asked = {"main": "a" * 40, "b" * 40: "b" * 40}, {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer()

        def do_GET(self):
            self.answer()

        def answer(self):
            owner, repository, _, revision, name = self.path.lstrip("/").split("/")
            asked.append((self.command, f"{owner}/{repository}", revision, name))
            commit = commits.get(revision)
            content = files[commit, name].read_bytes() if (commit, name) in files else None
            self.send_response(200 if content is not None else 404)
            if commit is None:
                self.send_header("X-Error-Code", "RevisionNotFound")
            elif content is None:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("X-Repo-Commit", commit or "")
            self.send_header("ETag", '"' + hashlib.sha256(content or b"").hexdigest() + '"')
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            if self.command == "GET" and content is not None:
                self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield types.SimpleNamespace(files=files, asked=asked)
    server.shutdown()
    server.server_close()


def pytest_collection_modifyitems(items):
    """Start with what takes longest, so that no worker is left with it at the end."""

    def order(item):
        return "every_study_makes" not in item.name, "tests/workflow" not in item.path.as_posix()

    items.sort(key=order)
