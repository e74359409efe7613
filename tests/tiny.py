"""Small random CLIPs with real towers, and tasks of tokens, for tests that must be fast."""

from __future__ import annotations

from collections.abc import Sequence

import open_clip
import torch
from torch import Tensor

from agent.config import Model
from agent.methods.base import TaskData
from agent.model.clip import Clip
from exporter.preprocess import Preprocess

VISION = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
TIMM = {
    "timm_model_name": "test_vit",
    "timm_model_pretrained": False,
    "timm_pool": "map",
    "timm_proj": "none",
    "image_size": 160,
}


def tiny_model(seed: int = 0, **vision: object) -> open_clip.model.CLIP:
    """open_clip's own towers (`nn.MultiheadAttention`)."""
    torch.manual_seed(seed)
    model = open_clip.model.CLIP(embed_dim=24, vision_cfg={**VISION, **vision}, text_cfg=dict(TEXT))
    for parameter in model.visual.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def tiny_clip(seed: int = 0, device: str = "cpu", precision: str = "fp32") -> Clip:
    return _clip(tiny_model(seed), 32, device, precision)


def tiny_timm_clip(seed: int = 0, device: str = "cpu", precision: str = "fp32") -> Clip:
    """A timm image tower (fused `qkv`, attention pooling) and a separate text tower, as SigLIP has."""
    torch.manual_seed(seed)
    text = {**TEXT, "no_causal_mask": True, "pool_type": "last", "proj_bias": True}
    model = open_clip.model.CustomTextCLIP(embed_dim=64, vision_cfg=dict(TIMM), text_cfg=text, init_logit_bias=-10.0)
    return _clip(model, 160, device, precision)


def _clip(model: torch.nn.Module, size: int, device: str, precision: str) -> Clip:
    preprocess = Preprocess(size, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    tokenizer = open_clip.SimpleTokenizer(context_length=TEXT["context_length"])
    settings = Model.model_validate(
        {"name": "ViT-B-32", "pretrained": "random", "device": device, "precision": precision}
    )
    return Clip(model, tokenizer, preprocess, settings, torch.device(device))


class PlainTokens:
    owners = None

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __len__(self) -> int:
        return len(self.tensor)

    def batch(self, index: Tensor) -> Tensor:
        return self.tensor[index]


def tiny_task(
    clip: Clip, number: int, classes: Sequence[str], per_class: int = 12, seed: int = 0, size: int = 32
) -> TaskData:
    """Images of each class around one random picture: there is something to learn."""
    pictures, labels = [], []
    for k, name in enumerate(classes):
        generator = torch.Generator().manual_seed(sum(name.encode()) + seed)
        centre = torch.randn(1, 3, size, size, generator=generator)
        pictures.append(centre + 0.3 * torch.randn(per_class, 3, size, size, generator=generator))
        labels += [k] * per_class
    return TaskData(number, tuple(classes), torch.tensor(labels), PlainTokens(clip.prefix(torch.cat(pictures))))


def silent(progress: object) -> None:
    """A report nobody reads."""
