"""A language model that trains in a second, with weights large enough that its logits depend on all it has read."""

import torch

from tocom.models import create

KWARGS = {
    "vocab_size": 257,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


@torch.no_grad()
def shake(model, seed=0):
    """Give a model large random weights; return it in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.copy_(1 + 0.2 * noise if parameter.ndim == 1 else 1.5 * noise / parameter.shape[-1] ** 0.5)
    return model.eval()


def build_lm(seed=0, **overrides):
    """Build the small language model, in float64."""
    return shake(create("llama", KWARGS | overrides), seed).double()


def tokens(batch=2, length=40, vocab=257, seed=1):
    """Return random tokens [B, T]."""
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))
