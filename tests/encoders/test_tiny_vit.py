"""TinyViT against kornia's published arrangement with the same weights; its modes, refusals and graphs."""

import pytest
import torch
from kornia.models.tiny_vit import TinyViT as KorniaTinyViT
from torch.nn import functional as F

from hspsam_monai.data import phantom
from hspsam_monai.encoders import TinyViT, build_encoder, tiny_vit
from hspsam_monai.encoders.state_files import read_state
from hspsam_monai.encoders.weights import load_encoder
from hspsam_monai.errors import ConfigError
from tests.encoders.tiny_vit_reference import DIMS, make, naive, normalised, published, relative


@pytest.fixture(scope="module")
def encoder():
    return make()


@pytest.fixture(scope="module")
def lite():
    return make(64, variant="lite_medsam")


# -- parity with kornia


@pytest.mark.parametrize(
    ("size", "batch"),
    [
        (256, 1),
        (256, 2),
        (256, 5),
        (320, 2),
        (512, 1),
        pytest.param(512, 5, marks=pytest.mark.slow),
        pytest.param(1024, 1, marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_equals_kornia(encoder, size, batch):
    image = torch.rand(batch, 3, size, size)
    expected = published(encoder, size, size)(normalised(encoder, image))
    features = encoder(image)
    assert features.embedding.shape == (batch, 256, size // 16, size // 16)
    assert relative(features.embedding, expected) <= 1e-5
    for level, said in zip(features.levels, encoder.levels, strict=True):
        assert level.shape == (batch, said.channels, size // said.stride, size // said.stride)


@torch.no_grad()
def test_equals_kornias_own_model_of_that_size(encoder):
    """Without any of the test's tricks: the model as kornia builds it for 320 pixels."""
    model = KorniaTinyViT.from_config("5m", img_size=320, mobile_sam=True)
    missing, unexpected = model.load_state_dict(encoder.state_dict(), strict=False)
    assert unexpected == [] and {key.split(".")[0] for key in missing} == {"norm_head", "head"}
    image = torch.rand(1, 3, 320, 320)
    assert relative(encoder(image).embedding, model.eval()(normalised(encoder, image))) <= 1e-5


# 224: windows fit exactly; 32: the whole map is smaller than a window; the others have edges on either side.
@pytest.mark.parametrize("shape", [(256, 384), (224, 224), (32, 32), (448, 96), (32, 480)])
@torch.no_grad()
def test_any_shape_equals_kornias_modules(encoder, shape):
    image = torch.rand(2, 3, *shape)
    expected = published(encoder, *shape)(normalised(encoder, image))
    assert relative(encoder(image).embedding, expected) <= 1e-5


@pytest.mark.parametrize("shape", [(64, 64), (96, 32), (64, 160), pytest.param((256, 256), marks=pytest.mark.slow)])
@torch.no_grad()
def test_lite_medsam_equals_kornia_with_three_changes(lite, shape):
    image = torch.rand(1, 3, *shape)
    features = lite(image)
    assert features.embedding.shape == (1, 256, shape[0] // 4, shape[1] // 4)
    assert relative(features.embedding, published(lite, *shape, lite=True)(image)) <= 1e-5
    for level, said in zip(features.levels, lite.levels, strict=True):
        assert level.shape[1:] == (said.channels, shape[0] // said.stride, shape[1] // said.stride)


@pytest.mark.data
@pytest.mark.parametrize("size", [256, 512, pytest.param(1024, marks=pytest.mark.slow)])
@torch.no_grad()
def test_official_weights_equal_kornia(shared, size):
    encoder = TinyViT(size).eval()
    report = load_encoder(encoder, shared / "weights" / "mobile_sam.pt")
    assert report.missing == () and report.unexpected == ()
    model = KorniaTinyViT.from_config("5m", img_size=size, mobile_sam=True).eval()
    state = read_state(shared / "weights" / "mobile_sam.pt")
    prefix = "image_encoder."
    model.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    frames = [torch.from_numpy(phantom(seed, (size, size))[0]).permute(2, 0, 1) / 255 for seed in (1, 2)]
    image = torch.stack(frames)
    expected = model(normalised(encoder, image))
    found = encoder(image).embedding
    assert relative(found, expected) <= 1e-5
    if size == 256:
        with torch.autocast("cpu", torch.bfloat16):
            half = encoder(image).embedding
        assert F.cosine_similarity(half.float().flatten(1), expected.flatten(1)).min() >= 0.999


@torch.no_grad()
def test_bfloat16_stays_near_and_keeps_inputs_apart(encoder):
    image = torch.rand(2, 3, 256, 256)
    expected = encoder(image).embedding
    with torch.autocast("cpu", torch.bfloat16):
        found = encoder(image).embedding.float()
    assert found.isfinite().all() and not torch.equal(found[0], found[1])
    assert F.cosine_similarity(found.flatten(1), expected.flatten(1)).min() >= 0.999


@torch.no_grad()
def test_strong_attention_biases_stay_exact(encoder):
    """Biases of +-50 on padding: the collapsed key must neither overflow nor cancel."""
    strong = make(seed=3)
    for name, parameter in strong.named_parameters():
        if name.endswith("attention_biases"):
            parameter.mul_(20)
    image = torch.rand(1, 3, 96, 160)
    expected = published(strong, 96, 160)(normalised(strong, image))
    assert relative(strong(image).embedding, expected) <= 1e-5


def test_gradients_equal_kornia():
    encoder = make(64, seed=4)
    image = torch.rand(2, 3, 64, 96)
    direction = torch.randn(2, 256, 4, 6)
    encoder.zero_grad()
    (encoder(image).embedding * direction).sum().backward()
    found = {name: p.grad.clone() for name, p in encoder.named_parameters()}
    encoder.zero_grad()
    (naive(encoder, image, [None] * 4)[1] * direction).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert relative(found[name], parameter.grad) <= 1e-4, name


# -- modes and state


@torch.no_grad()
def test_train_mode_equals_eval_mode_bit_for_bit():
    encoder = make(64)
    image = torch.rand(2, 3, 64, 64)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    quiet = encoder(image)
    loud = encoder.train()(image)
    assert torch.equal(quiet.embedding, loud.embedding)
    assert all(torch.equal(a, b) for a, b in zip(quiet.levels, loud.levels, strict=True))
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())  # no running statistics


def test_names_equal_the_published_file_without_its_classifier(encoder):
    official = KorniaTinyViT.from_config("5m", img_size=1024, mobile_sam=True).state_dict()
    state = encoder.official_state(official)
    assert {key.split(".")[0] for key in set(official) - set(state)} == {"norm_head", "head"}
    assert set(state) == set(encoder.state_dict())


def test_without_neck_no_embedding_is_computed_or_loaded():
    encoder = TinyViT(64, embedding=False).eval()
    official = KorniaTinyViT.from_config("5m", img_size=1024, mobile_sam=True).state_dict()
    encoder.load_state_dict(encoder.official_state(official))
    assert encoder(torch.rand(1, 3, 64, 64)).embedding is None
    assert not any(name.startswith("neck.") for name in encoder.state_dict())


@pytest.mark.parametrize("name", ["mobile_sam", "lite_medsam"])
def test_is_built_by_name(name):
    encoder = build_encoder(name, 64, lora_rank=1)
    assert isinstance(encoder, TinyViT)
    assert [level.prompt_dim for level in encoder.levels] == [None, *DIMS]


# -- refusals


def test_bad_inputs_are_named(encoder):
    with pytest.raises(ConfigError, match="multiple of 32"):
        TinyViT(100)
    for shape in [(1, 3, 250, 256), (1, 1, 256, 256), (3, 256, 256)]:
        with pytest.raises(ConfigError, match="multiples of 32"):
            encoder(torch.rand(*shape))
    image = torch.rand(1, 3, 32, 32)
    with pytest.raises(ConfigError, match="4 levels"):
        encoder(image, [None])
    with pytest.raises(ConfigError, match="Level 0 has no attention"):
        encoder(image, [torch.rand(2, 64), None, None, None])
    for shape in [(2, 127), (1, 2, 128)]:
        with pytest.raises(ConfigError, match=r"expected \(P, 128\)"):
            encoder(image, [None, torch.rand(*shape), None, None])


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="unknown"):
        build_encoder("tiny")


# -- graph capture


@torch.no_grad()
def test_export_gives_the_same_and_leaves_eager_alone():
    encoder = make(64, return_tokens=True)
    image = torch.rand(1, 3, 64, 96)
    prompts = [None, *(torch.randn(2, dim) for dim in DIMS)]
    tiny_vit._strips.cache_clear()  # what is first computed while tracing must not be kept for eager use
    exported = torch.export.export(encoder, (image, prompts)).module()
    eager = encoder(image, prompts)
    assert relative(exported(image, prompts).embedding, eager.embedding) <= 1e-5


@pytest.mark.slow
@torch.no_grad()
def test_compile_gives_the_same_without_graph_breaks():
    encoder = make(64, return_tokens=True)
    image = torch.rand(2, 3, 64, 96)
    prompts = [None, *(torch.randn(2, dim) for dim in DIMS)]
    eager = encoder(image, prompts)
    compiled = torch.compile(encoder, fullgraph=True, dynamic=False)(image, prompts)
    assert relative(compiled.embedding, eager.embedding) <= 1e-4
    assert all(relative(a, b) <= 1e-4 for a, b in zip(compiled.tokens[1:], eager.tokens[1:], strict=True))


@pytest.mark.slow
@torch.no_grad()
def test_every_size_is_compiled_for_itself():
    """Sizes as symbols, which torch.compile tries from the second on unless told, have no end of cases here."""
    encoder = make(64)
    compiled = torch.compile(encoder, fullgraph=True, dynamic=False, backend="eager")
    for size in ((64, 96), (96, 160), (128, 64)):
        image = torch.rand(2, 3, *size)
        assert relative(compiled(image).embedding, encoder(image).embedding) <= 1e-4


def test_gradients_repeat_to_the_last_bit_on_several_threads():
    """From 144 pixels on the attention's biases are many enough for PyTorch to add their gradients up in parallel."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    encoder, image = build_encoder("mobile_sam", image_size=160), torch.rand(1, 3, 160, 160)
    biases = [p for name, p in encoder.named_parameters() if "attention_biases" in name]
    try:
        torch.set_num_threads(4)
        found = [torch.autograd.grad(encoder(image).levels[-1].square().sum(), biases) for _ in range(5)]
    finally:
        torch.set_num_threads(threads)
    assert len(biases) == 10 and all(g.abs().sum() > 0 for g in found[0])
    assert all(torch.equal(a, b) for again in found[1:] for a, b in zip(again, found[0], strict=True))
