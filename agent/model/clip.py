"""The only import of open_clip: weights, towers split where training begins, prompts, tokenizer; the bundled tinyclip.

A tower's *frozen part* (`prefix`) ends where the first trainable layer begins: an image's patch embedding, or
tinyclip's convolutional trunk. Its output (tokens) is the same for every state of the adapters, so it is computed once
per image. Towers are never modified: adapted weights are passed in (`torch.func.functional_call`), so the untouched
model, the student and any teacher live side by side over one set of frozen weights.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from open_clip.tokenizer import get_clean_fn
from open_clip.transformer import TextTransformer, VisionTransformer, text_global_pool
from safetensors.torch import load_file
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from agent.config import Model
from exporter.preprocess import Preprocess
from exporter.text import CLEANUPS, clip_tokenizer, filled_tokenizer


class ModelError(Exception):
    """The CLIP model cannot be had or cannot be adapted; the message says what to do."""


DEPTH_SHARE = 1 / 3
"""In a plain vision transformer the tokens of earlier features are taken after this share of the blocks. Chosen on
images that no comparison uses. On tinyclip's six blocks, without what its trunk says, a discriminant of 3,000 random
features was right on 70.7, 70.7, 69.9, 70.3, 69.6 and 69.7 % of CIFAR-10 after block 1 to 6 (CIFAR-100: 58.6, 57.7,
56.8, 56.3, 56.6 and 56.2 %, TrashNet: 78.3, 79.1, 77.8, 77.3, 76.8 and 76.8 %); in a plain transformer of six blocks
that was taught tinyclip's embeddings for an epoch, on 43.4, 43.3, 42.8, 42.4, 42.2 and 42.1 % of CIFAR-10."""


def _depth(plain: bool, blocks: int) -> int:
    """Choose by structure where an image tower's earlier features are taken: amid the blocks of a plain vision
    transformer, and before them where more than one linear map of the patches comes first (a convolutional trunk)."""
    return round(DEPTH_SHARE * blocks) if plain else 0


class ImageTower(nn.Module):
    """This is open_clip's vision transformer. `prefix`: images -> tokens (frozen); `forward`: tokens -> features.

    `forward` is `project` of `pooled`: a norm that acts on each token alone is taken after a single one is chosen.
    """

    def __init__(self, visual: VisionTransformer) -> None:
        super().__init__()
        self.visual = visual
        self._norm_last = visual.attn_pool is None and (visual.final_ln_after_pool or visual.pool_type == "tok")
        self.width = int(visual.ln_post.normalized_shape[0])
        """The number of values per image before the projection."""
        self.depth = _depth(isinstance(visual.conv1, nn.Conv2d), len(visual.transformer.resblocks))
        """The block whose input tokens tell classes apart that the features merge."""

    def prefix(self, images: Tensor) -> Tensor:
        """Encode preprocessed images [B, 3, H, W] to tokens [B, tokens, width], before the first attention block."""
        return self.visual._embeds(images)

    def forward(self, tokens: Tensor) -> Tensor:
        """Encode tokens [B, tokens, width] to features [B, D], not normalised."""
        return self.project(self.pooled(tokens))

    def at_depth(self, tokens: Tensor, depth: int) -> tuple[Tensor, Tensor]:
        """Encode tokens to those that block `depth` begins with, [B, tokens, width], and to features [B, D]."""
        for block in self.visual.transformer.resblocks[:depth]:
            tokens = block(tokens)
        return tokens, self.project(self.pooled(tokens, depth))

    def pooled(self, tokens: Tensor, done: int = 0) -> Tensor:
        """Encode tokens [B, tokens, width] to one vector per image, before the last norm and the projection: [B,
        self.width]. `done` blocks have been passed before."""
        x = tokens
        for block in self.visual.transformer.resblocks[done:]:
            x = block(x)
        pooled, _ = self.visual._global_pool(x) if self._norm_last else self.visual._pool(x)
        return pooled

    def project(self, pooled: Tensor) -> Tensor:
        """Turn what `pooled` gives [B, self.width] into features [B, D], not normalised."""
        x = self.visual.ln_post(pooled) if self._norm_last else pooled
        return x if self.visual.proj is None else x @ self.visual.proj


class TimmImageTower(nn.Module):
    """It is a timm vision transformer inside open_clip (SigLIP and others), with the same halves."""

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.visual = visual
        self._norm_last = visual.trunk.attn_pool is None and visual.trunk.global_pool == "token"
        self.width = int(visual.trunk.num_features)
        """The number of values per image before the projection."""
        self.depth = _depth(isinstance(visual.trunk.patch_embed, PatchEmbed), len(visual.trunk.blocks))
        """The block whose input tokens tell classes apart that the features merge."""

    def prefix(self, images: Tensor) -> Tensor:
        """Encode preprocessed images [B, 3, H, W] to tokens [B, tokens, width], before the first attention block."""
        trunk = self.visual.trunk
        return trunk.norm_pre(trunk.patch_drop(trunk._pos_embed(trunk.patch_embed(images))))

    def forward(self, tokens: Tensor) -> Tensor:
        """Encode tokens [B, tokens, width] to features [B, D], not normalised."""
        return self.project(self.pooled(tokens))

    def at_depth(self, tokens: Tensor, depth: int) -> tuple[Tensor, Tensor]:
        """Encode tokens to those that block `depth` begins with, [B, tokens, width], and to features [B, D]."""
        for block in self.visual.trunk.blocks[:depth]:
            tokens = block(tokens)
        return tokens, self.project(self.pooled(tokens, depth))

    def pooled(self, tokens: Tensor, done: int = 0) -> Tensor:
        """Encode tokens [B, tokens, width] to one vector per image, before the last norm (where it acts on each token
        alone) and the projection: [B, self.width]. `done` blocks have been passed before."""
        trunk = self.visual.trunk
        for block in trunk.blocks[done:]:
            tokens = block(tokens)
        return trunk.pool(tokens if self._norm_last else trunk.norm(tokens))

    def project(self, pooled: Tensor) -> Tensor:
        """Turn what `pooled` gives [B, self.width] into features [B, D], not normalised."""
        trunk = self.visual.trunk
        x = trunk.norm(pooled) if self._norm_last else pooled
        return self.visual.head(trunk.head(trunk.head_drop(trunk.fc_norm(x))))


class TextTower(nn.Module):
    """A CLIP text transformer: token ids int64 [n, L] -> features [n, D], not normalised.

    Under a causal mask what follows the end-of-text token cannot reach it, so the ids are cut at the longest sentence:
    the same features for a fraction of the work (class prompts use about 10 of 77 positions).
    """

    def __init__(self, text: Any, pool_type: str, eos_id: int | None) -> None:
        super().__init__()
        self.transformer = text.transformer
        self.token_embedding = text.token_embedding
        self.positional_embedding = text.positional_embedding
        self.ln_final = text.ln_final
        self.text_projection = text.text_projection
        self.pool_type = pool_type
        self.eos_id = eos_id
        mask = text.attn_mask
        self.causal = mask is not None and pool_type in ("argmax", "eos")
        self.attn_mask: Tensor | None
        self.register_buffer("attn_mask", mask, persistent=False)

    def ends(self, ids: Tensor) -> Tensor:
        """Find the position of each end-of-text token: ids int64 [n, L] -> int64 [n]."""
        return ids.argmax(-1) if self.pool_type == "argmax" else ids.eq(self.eos_id or 0).int().argmax(-1)

    def forward(self, ids: Tensor) -> Tensor:
        """Encode token ids int64 [n, L] to features [n, D], not normalised."""
        if self.causal and not torch.compiler.is_exporting():  # where no shape may depend on data
            ids = ids[:, : int(self.ends(ids).max()) + 1]
        length = ids.shape[1]
        x = self.token_embedding(ids) + self.positional_embedding[:length]
        mask = None if self.attn_mask is None else self.attn_mask[:length, :length]
        x = self.ln_final(self.transformer(x, attn_mask=mask))
        x = text_global_pool(x, ids, self.pool_type, eos_token_id=self.eos_id)
        if self.text_projection is None:
            return x
        return self.text_projection(x) if isinstance(self.text_projection, nn.Linear) else x @ self.text_projection


class Clip:
    """It is the untouched model: both towers (frozen, eval mode), tokenizer, prompt, preprocessing and identity."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        preprocess: Preprocess,
        settings: Model,
        device: torch.device,
    ) -> None:
        model.eval().requires_grad_(False)
        digest = _weights_hash(model)
        if settings.name == "tinyclip":
            _fold_batch_norms(model.visual.conv1)
            model.visual.conv1.to(memory_format=torch.channels_last)
        self.logit_scale = float(model.logit_scale.exp())
        """The multiplier of cosines, already exponentiated (100 in OpenAI's models)."""
        self.image: Any = _image_tower(model).to(device)
        self.text = _text_tower(model).to(device)
        self.preprocess = preprocess
        self.prompt = settings.prompt
        self.device = device
        self._tokenizer = tokenizer
        self._autocast = _autocast_dtype(settings.precision, device)
        self.identity: dict[str, str] = {
            "name": settings.name,
            "pretrained": settings.pretrained if settings.name != "tinyclip" else "bundled",
            "sha256": digest,
            "prompt": settings.prompt,
        }
        """Says which weights and prompt these are; a learner can only be continued under the same."""
        self.embed_dim = int(self.encode_names(["thing"]).shape[1])

    def tokenize(self, names: Sequence[str], prompt: str = "") -> Tensor:
        """Put class names into `prompt` (empty: the configured one) and cut them into tokens: int64 [n, L] on the
        device."""
        return self._tokenizer([(prompt or self.prompt).format(name) for name in names]).to(self.device)

    @property
    def vocabulary(self) -> tuple[int, int, int]:
        """The tokenizer's size of the plain vocabulary, start id and end id: ids below the first are ordinary tokens.

        Raises ModelError when the tokenizer is not CLIP's own.
        """
        if not isinstance(self._tokenizer, open_clip.SimpleTokenizer):
            raise ModelError(
                f"this method writes sentences in CLIP's own vocabulary, but {self.identity['name']} has a "
                f"{type(self._tokenizer).__name__}. Choose another method.name or model.name"
            )
        start, end = self._tokenizer.sot_token_id, self._tokenizer.eot_token_id
        return min(start, end), start, end

    @functools.cached_property
    def tokenizer(self) -> tuple[str, str]:
        """The tokenizer as data: JSON of the library `tokenizers`, and the name of what is done to a text before it
        (exporter.text.CLEANUPS). Raises ModelError when it cannot be written so."""
        tokenizer = self._tokenizer
        cleaned_by = getattr(tokenizer, "clean_fn", None)
        clean = next((name for name in CLEANUPS if get_clean_fn(name) is cleaned_by), "")
        context = tokenizer.context_length
        if isinstance(tokenizer, open_clip.SimpleTokenizer) and clean and tokenizer.reduction_fn is None:
            start, end = (tokenizer.decoder[token] for token in (tokenizer.sot_token_id, tokenizer.eot_token_id))
            merges = list(tokenizer.bpe_ranks)
            return clip_tokenizer(merges, tokenizer.encoder, start, end, context, whole=not self.text.causal), clean
        fast = getattr(getattr(tokenizer, "tokenizer", None), "backend_tokenizer", None)
        if fast is not None and clean:
            return filled_tokenizer(fast.to_str(), context, tokenizer.tokenizer.pad_token_id), clean
        raise ModelError(f"the tokenizer of {self.identity['name']}, a {type(tokenizer).__name__}, cannot be released")

    @torch.no_grad()
    def encode_names(self, names: Sequence[str]) -> Tensor:
        """Encode class names by the untouched text tower: float32 [n, D], L2-normalised."""
        with self.autocast():
            return F.normalize(self.text(self.tokenize(names)).float(), dim=-1)

    @torch.no_grad()
    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Encode tokens [B, tokens, width] by the untouched image tower: float32 [B, D], L2-normalised."""
        with self.autocast():
            return F.normalize(self.image(tokens.to(self.device)).float(), dim=-1)

    @torch.no_grad()
    def prefix(self, images: Tensor) -> Tensor:
        """Encode images float32 [B, 3, H, W] to tokens [B, tokens, width] on the device, in the precision training
        reads."""
        with self.autocast():
            return self.image.prefix(images.to(self.device, non_blocking=True))

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Give the context of mixed precision, where it is configured; a context that does nothing in fp32."""
        if self._autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self._autocast)


def load_clip(settings: Model) -> Clip:
    """Build the configured model. Raises ModelError when it cannot be had or has no transformer towers."""
    device = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if settings.device == "auto" else settings.device
    )
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"model.device is {settings.device!r} but torch sees no CUDA device; use `auto` or `cpu`")
    if settings.name == "tinyclip":
        model, preprocess = _tinyclip()
        tokenizer: Any = open_clip.SimpleTokenizer(context_length=model.context_length)
    else:
        model, preprocess = _open_clip(settings)
        tokenizer = open_clip.get_tokenizer(settings.name)
    return Clip(model, tokenizer, preprocess, settings, device)


def _tinyclip() -> tuple[nn.Module, Preprocess]:
    assets = resources.files("agent") / "assets"
    config = json.loads((assets / "tinyclip.json").read_text())
    model = open_clip.model.CLIP(**config["model_cfg"])
    stem = timm.create_model(config["stem"]["timm_model"], pretrained=False)
    trunk = nn.Sequential(*(getattr(stem, name) for name in config["stem"]["modules"]))
    projection = nn.Conv2d(config["stem"]["channels"], config["model_cfg"]["vision_cfg"]["width"], 1, bias=False)
    model.visual.conv1 = nn.Sequential()
    model.visual.conv1.add_module("trunk", trunk)
    model.visual.conv1.add_module("proj", projection)
    with resources.as_file(assets / "tinyclip.safetensors") as path:
        state = {k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()}
    model.load_state_dict(state)
    return model, _preprocess(config["preprocess_cfg"])


def _fold_batch_norms(module: nn.Module) -> None:
    """Fold every frozen batch norm into the convolution before it, keeping timm's activation: a third less time."""
    previous = None
    for name, child in list(module.named_children()):
        _fold_batch_norms(child)
        if isinstance(child, nn.BatchNorm2d) and isinstance(previous, tuple):
            setattr(module, previous[0], fuse_conv_bn_eval(previous[1], child))
            setattr(module, name, getattr(child, "act", nn.Identity()))
        previous = (name, child) if isinstance(child, nn.Conv2d) else None


def _open_clip(settings: Model) -> tuple[nn.Module, Preprocess]:
    name, pretrained = settings.name, settings.pretrained
    known = open_clip.list_models()
    if name not in known:
        close = difflib.get_close_matches(name, known, 5) or known[:5]
        raise ModelError(f"model.name is {name!r}, which open_clip does not know; did you mean {', '.join(close)}?")
    if not pretrained:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none is published"
        raise ModelError(
            f"model.pretrained is empty, but {name} needs weights: a tag ({tags}), a checkpoint's path, or `random`"
        )
    local = Path(pretrained).expanduser()
    options: dict[str, Any] = {"precision": "fp32", "device": "cpu"}
    if pretrained == "random":
        torch.manual_seed(0)  # random weights are for benchmarks, which must repeat
        model = _random(name, options)
    elif local.suffix or local.exists():
        if not local.is_file():
            raise ModelError(
                f"model.pretrained is {pretrained!r}: no such file; give the path of a .safetensors, .pt or .bin file"
            )
        model = _from_file(name, local, options)
    else:
        tags = open_clip.list_pretrained_tags_by_model(name)
        if pretrained not in tags:
            raise ModelError(
                f"model.pretrained is {pretrained!r}; {name} has the tags {', '.join(tags) or '(none)'}, or give the "
                "path of a local checkpoint"
            )
        try:
            model = open_clip.create_model(name, pretrained=pretrained, **options)
        except Exception as error:  # hub, network, disk and checkpoint errors share no base class
            raise ModelError(
                f"the weights {pretrained!r} of {name} could not be had ({type(error).__name__}: {error}). Fetch them "
                "on a machine with network access, copy the file here and set model.pretrained to its path"
            ) from error
    return model, _preprocess(open_clip.get_model_preprocess_cfg(model))


def _random(name: str, options: Mapping[str, Any]) -> nn.Module:
    logging.disable(logging.WARNING)  # open_clip warns that there are no weights, which is what is asked for
    try:
        return open_clip.create_model(name, pretrained=None, **options)
    finally:
        logging.disable(logging.NOTSET)


def _from_file(name: str, path: Path, options: Mapping[str, Any]) -> nn.Module:
    """Load safetensors, a plain state dict (unpickled with weights_only) or OpenAI's TorchScript archive."""
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
                state = state.get("state_dict", state)
            except RuntimeError:  # a TorchScript archive, the form OpenAI published: only its tensors are read
                state = torch.jit.load(path, map_location="cpu").state_dict()
                # OpenAI's weights were trained with the quick GELU; the plain architecture would silently score worse
                options = {**options, "force_quick_gelu": True}
        state = {k.removeprefix("module."): v.float() if v.is_floating_point() else v for k, v in state.items()}
        for key in ("input_resolution", "context_length", "vocab_size"):
            state.pop(key, None)
        model = _random(name, options)
        if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
            state = open_clip.model.convert_to_custom_text_state_dict(state)
        model.load_state_dict(state)
    except ModelError:
        raise
    except Exception as error:  # unreadable file, other architecture: torch and safetensors share no base class
        text = str(error)
        raise ModelError(
            f"{path} could not be loaded as {name}: {type(error).__name__}: {text[:600]}"
            f"{' ...' if len(text) > 600 else ''}. Check that model.name is the architecture of this checkpoint"
        ) from error
    return model


def _image_tower(model: Any) -> nn.Module:
    visual = model.visual
    if isinstance(visual, VisionTransformer):
        return ImageTower(visual)
    trunk = getattr(visual, "trunk", None)
    if isinstance(trunk, TimmVisionTransformer):
        return TimmImageTower(visual)
    kind = type(trunk if trunk is not None else visual).__name__
    raise ModelError(
        f"the image tower is a {kind}; gapstream adapts vision transformers (open_clip's own or timm's). "
        "Choose another model.name"
    )


def _text_tower(model: Any) -> nn.Module:
    text = getattr(model, "text", None)
    if text is None:
        return TextTower(model, model.text_pool_type, model.text_eos_id)
    if isinstance(text, TextTransformer) and text.cls_emb is None and not text.use_pad_mask:
        return TextTower(text, text.pool_type, text.eos_id)
    raise ModelError(
        f"the text tower is a {type(text).__name__} with extra tokens or masks; gapstream adapts plain CLIP text "
        "transformers. Choose another model.name"
    )


def _preprocess(config: Mapping[str, Any]) -> Preprocess:
    size = config["size"]
    if isinstance(size, (list, tuple)):
        if size[0] != size[1]:
            raise ModelError(
                f"the model reads images of {size[0]} x {size[1]}; gapstream needs square ones. Choose another one"
            )
        size = size[0]
    return Preprocess(
        size=int(size),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config.get("interpolation", "bicubic"),
        resize_mode=config.get("resize_mode", "shortest"),
    )


def _autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if precision == "bf16" or (precision == "auto" and native) else None


def _weights_hash(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
