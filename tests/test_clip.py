"""Models: the two halves of a tower are the tower, weights come from tags and files, mistakes say what to do."""

from __future__ import annotations

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from agent.config import Model
from agent.model.clip import Clip, ImageTower, ModelError, TimmImageTower, load_clip
from tests.tiny import TEXT, VISION, tiny_clip, tiny_model, tiny_timm_clip

NAMES = ["cat", "a very long name of a thing that fills the context and more and more", "dog"]


@pytest.fixture(scope="module")
def architecture():
    """A small architecture open_clip knows by name."""
    config = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}
    for name, extra in (("gapstream-test", {}), ("gapstream-test-quickgelu", {"quick_gelu": True})):
        open_clip.factory._MODEL_CONFIGS[name] = {**config, **extra}
    yield "gapstream-test"
    for name in ("gapstream-test", "gapstream-test-quickgelu"):
        del open_clip.factory._MODEL_CONFIGS[name]


def same_weights(clip: Clip, model: torch.nn.Module) -> bool:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return torch.allclose(clip.image(clip.image.prefix(images)), model.eval().encode_image(images), atol=1e-5)


def test_prefix_and_rest_are_the_native_image_tower():
    model = tiny_model()
    images = torch.randn(3, 3, 32, 32)
    expected = model.eval().encode_image(images)
    clip = tiny_clip()
    assert torch.allclose(clip.image(clip.image.prefix(images)), expected, atol=1e-5)


def test_prefix_and_rest_are_the_timm_image_tower():
    clip = tiny_timm_clip()
    images = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        assert torch.allclose(clip.image(clip.image.prefix(images)), clip.image.visual(images), atol=1e-6)


@pytest.mark.parametrize("vision", [{}, {"pool_type": "avg"}, {"final_ln_after_pool": True, "pool_type": "avg"}])
@torch.no_grad()
def test_the_projection_of_the_pooled_tokens_is_the_tower_however_it_pools(vision):
    model = tiny_model(**vision).eval()
    tower, images = ImageTower(model.visual), torch.randn(3, 3, 32, 32)
    pooled = tower.pooled(tower.prefix(images))
    assert pooled.shape == (3, tower.width)
    assert torch.allclose(tower.project(pooled), model.encode_image(images), atol=1e-5)


@torch.no_grad()
def test_what_is_pooled_of_a_class_token_is_not_normed_yet():
    clip = tiny_clip()
    tokens = clip.prefix(torch.randn(3, 3, 32, 32))
    assert torch.equal(clip.image.pooled(tokens), clip.image.visual.transformer(tokens)[:, 0])


@pytest.mark.parametrize("pool", ["token", "avg"])
@torch.no_grad()
def test_the_projection_of_the_pooled_tokens_is_the_timm_tower_whether_it_pools_a_token_or_all(pool):
    visual = open_clip.timm_model.TimmModel(
        "test_vit", embed_dim=24, image_size=160, pool=pool, pretrained=False
    ).eval()
    tower, images = TimmImageTower(visual), torch.randn(2, 3, 160, 160)
    pooled = tower.pooled(tower.prefix(images))
    assert pooled.shape == (2, tower.width)
    assert torch.allclose(tower.project(pooled), visual(images), atol=1e-5)


def test_text_cut_at_the_longest_sentence_has_the_features_of_the_full_context():
    model = tiny_model().eval()
    clip = tiny_clip()
    for names in (NAMES, NAMES[:1]):
        ids = clip.tokenize(names)
        with torch.no_grad():
            assert torch.allclose(clip.text(ids), model.encode_text(ids), atol=1e-5)


def test_a_text_tower_without_causal_mask_reads_the_full_context():
    clip = tiny_timm_clip()
    ids = clip.tokenize(NAMES[:1])
    with torch.no_grad():
        assert not clip.text.causal
        assert not torch.allclose(clip.text(ids[:, :8]), clip.text(ids), atol=1e-3)


def test_the_bundled_model_is_complete_and_always_the_same():
    clip = load_clip(Model())
    assert clip.logit_scale == pytest.approx(16.04, abs=0.01)
    assert clip.embed_dim == 256
    assert clip.identity["sha256"] == load_clip(Model()).identity["sha256"]


def test_a_local_safetensors_checkpoint_is_loaded(architecture, tmp_path):
    model = tiny_model(3)
    path = tmp_path / "weights.safetensors"
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    assert same_weights(load_clip(Model(name=architecture, pretrained=str(path))), model)


def test_a_local_state_dict_wrapped_by_a_training_script_is_loaded(architecture, tmp_path):
    model = tiny_model(3)
    path = tmp_path / "epoch_32.pt"
    torch.save({"epoch": 32, "state_dict": {"module." + k: v for k, v in model.state_dict().items()}}, path)
    assert same_weights(load_clip(Model(name=architecture, pretrained=str(path))), model)


def test_a_file_that_would_run_code_is_refused(architecture, tmp_path):
    class Attack:
        def __reduce__(self):
            return (print, ("executed",))

    path = tmp_path / "evil.pt"
    torch.save({"state_dict": Attack()}, path)
    with pytest.raises(ModelError, match=r"evil\.pt could not be loaded"):
        load_clip(Model(name=architecture, pretrained=str(path)))


def test_weights_of_another_architecture_are_named(architecture, tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"visual.conv1.weight": torch.zeros(8, 3, 4, 4)}, path)
    with pytest.raises(ModelError, match=r"(?s)other\.safetensors could not be loaded as gapstream-test.*model\.name"):
        load_clip(Model(name=architecture, pretrained=str(path)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "ViT-B-61"}, "model.name is 'ViT-B-61'.*did you mean.*ViT-B-16"),
        ({"name": "ViT-B-16"}, "model.pretrained is empty.*openai.*a checkpoint's path"),
        ({"name": "ViT-B-16", "pretrained": "opanai"}, "model.pretrained is 'opanai'; ViT-B-16 has the tags openai"),
        ({"name": "ViT-B-16", "pretrained": "missing.pt"}, "no such file"),
        ({"name": "RN50", "pretrained": "random"}, "image tower is a ModifiedResNet"),
    ],
)
def test_weights_that_cannot_be_had_give_one_clear_error(settings, message):
    with pytest.raises(ModelError, match=message):
        load_clip(Model(device="cpu", **settings))


def test_a_hub_that_cannot_be_reached_says_how_to_go_on_without_it(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(open_clip, "create_model", unreachable)
    with pytest.raises(ModelError, match=r"'openai' of ViT-B-16 could not be had.*no route.*copy the file here"):
        load_clip(Model(name="ViT-B-16", pretrained="openai", device="cpu"))


def test_a_cuda_device_that_is_not_there_is_said_before_anything_is_loaded():
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(ModelError, match=r"model\.device is 'cuda'"):
        load_clip(Model(device="cuda"))


def test_quick_gelu_variants_are_other_models(architecture, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({k: v.contiguous() for k, v in tiny_model(3).state_dict().items()}, path)
    plain = load_clip(Model(name=architecture, pretrained=str(path)))
    quick = load_clip(Model(name=architecture + "-quickgelu", pretrained=str(path)))
    assert not torch.allclose(plain.encode_names(NAMES), quick.encode_names(NAMES))


def test_openai_archives_get_the_quick_gelu_they_were_trained_with(architecture, tmp_path):
    # given weights in the form OpenAI publishes: a TorchScript archive
    model = tiny_model(3).eval()

    class Shell(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, child in model.named_children():
                setattr(self, name, child)
            for name, parameter in model.named_parameters(recurse=False):
                setattr(self, name, parameter)

        def forward(self, x):
            return x

    path = tmp_path / "ViT-tiny.pt"
    torch.jit.trace(Shell(), torch.zeros(1), check_trace=False).save(str(path))
    # when it is loaded under the plain architecture's name
    clip = load_clip(Model(name=architecture, pretrained=str(path)))
    # then the quick GELU is in force
    plain = tmp_path / "w.safetensors"
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, plain)
    quick = load_clip(Model(name=architecture + "-quickgelu", pretrained=str(plain)))
    assert torch.allclose(clip.encode_names(NAMES), quick.encode_names(NAMES), atol=1e-6)
