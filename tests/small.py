"""A backbone and a recipe that train in a second, for tests of the stages and the command line."""

from tocom.settings import FinetuneSettings

ARCHITECTURE = "vit_tiny_patch16_224"
KWARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 41}
QUICK = FinetuneSettings(epochs=2, batch_size=16, lr=2e-3, device="cpu")
