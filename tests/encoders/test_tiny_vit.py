"""TinyViT against kornia's published arrangement with the same weights, and its prompts against naive code."""

import pytest
import torch
from kornia.models.tiny_vit import ConvBN
from kornia.models.tiny_vit import TinyViT as KorniaTinyViT
from torch import nn
from torch.nn import functional as F

from hspsam_monai.data import phantom
from hspsam_monai.encoders import TinyViT, build_encoder, tiny_vit
from hspsam_monai.encoders.lora import LoRALinear, merge_lora
from hspsam_monai.encoders.weights import load_encoder, read_state
from hspsam_monai.errors import ConfigError

DIMS = (128, 160, 320)  # of the three levels with attention


def make(image_size=256, seed=0, **options):
    """An encoder whose norms, statistics and attention biases are random too."""
    torch.manual_seed(seed)
    return randomise(TinyViT(image_size, **options))


@torch.no_grad()
def randomise(module):
    for name, parameter in module.named_parameters():
        if name.endswith("attention_biases"):
            parameter.normal_()
        elif "lora_" not in name and ("norm" in name or ".bn." in name or name.endswith("bias")):
            parameter.add_(torch.randn_like(parameter) * 0.3)
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    naive(module.train(), torch.rand(2, 3, 64, 64), [None] * 4)  # statistics that keep the signal alive ...
    for norm in norms:  # ... and are not those of the images under test
        norm.running_mean.add_(torch.randn_like(norm.running_mean) * 0.3 * norm.running_var.sqrt())
        norm.running_var.mul_(torch.rand_like(norm.running_var) + 0.5)
    return module.eval()


@pytest.fixture(scope="module")
def encoder():
    return make()


@pytest.fixture(scope="module")
def lite():
    return make(64, variant="lite_medsam")


def published(encoder, height, width, lite=False):
    """kornia's encoder with the same weights, its fixed token grids set for an image of height x width."""
    model = KorniaTinyViT.from_config("5m", img_size=1024, mobile_sam=True)
    if lite:  # the three changes listed beside the weights
        model.patch_embed.seq = nn.Sequential(ConvBN(3, 32, 1, 1, 0), nn.GELU(), ConvBN(32, 64, 1, 1, 0))
    model.norm_head = model.head = nn.Identity()
    model.load_state_dict(encoder.state_dict())
    stem = 1 if lite else 4
    grid = (height // stem, width // stem)
    for stage in model.layers:
        for block in stage.blocks:
            block.input_resolution = grid
        if stage.downsample is not None:
            stage.downsample.input_resolution = grid
            stride = stage.downsample.conv2.c.stride[0]
            grid = (grid[0] // stride, grid[1] // stride)
            stage.downsample.output_resolution = grid

    def run(x):
        tokens = model.layers(model.patch_embed(x))
        return model.neck(tokens.unflatten(1, grid).permute(0, 3, 1, 2))

    model.eval()
    return run


def normalised(encoder, image):
    return (image - encoder.pixel_mean) / encoder.pixel_std


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


def naive(encoder, image, prompts):
    """kornia's modules in their published order; prompts join the last attention of a stage as keys and values."""
    x = encoder.patch_embed.seq(normalised(encoder, image))
    levels, tokens = [], []
    for stage, prompt in zip(encoder.layers, prompts, strict=True):
        attended = None
        for index, block in enumerate(stage.blocks):
            if not hasattr(block, "attn"):
                x = block(x)
                continue
            joins = prompt if index == len(stage.blocks) - 1 else None
            rows = x.permute(0, 2, 3, 1)
            if joins is not None:
                attended = naive_attended(block, rows, joins)
            x = block.local_conv((rows + naive_windows(block, rows, joins)).permute(0, 3, 1, 2))
            rows = x.permute(0, 2, 3, 1)
            x = (rows + block.mlp(rows)).permute(0, 3, 1, 2)
        levels.append(x)
        tokens.append(attended)
        if stage.downsample is not None:
            merge = stage.downsample
            x = merge.conv3(merge.conv2(merge.conv1(x)))
    return levels, encoder.neck(x), tokens


def split_heads(attention, tokens):
    """Tokens (B, N, C) -> q, k, v, each (B, heads, N, d)."""
    qkv = attention.qkv(attention.norm(tokens)).unflatten(-1, (attention.num_heads, 3, -1))
    return qkv.permute(3, 0, 2, 1, 4)


def naive_windows(block, x, prompt):
    """One padded window after the other; padding stays a key, prompts come last and carry no bias."""
    batch, height, width, _ = x.shape
    size, attention = block.window_size, block.attn
    padded = F.pad(x, (0, 0, 0, -width % size, 0, -height % size))
    out = torch.zeros_like(padded)
    bias = attention.attention_biases[:, attention.attention_bias_idxs]
    for top in range(0, padded.shape[1], size):
        for left in range(0, padded.shape[2], size):
            q, k, v = split_heads(attention, padded[:, top : top + size, left : left + size].flatten(1, 2))
            logits = q @ k.transpose(2, 3) * attention.scale + bias
            if prompt is not None:
                _, pk, pv = split_heads(attention, prompt[None])
                logits = torch.cat([logits, q @ pk.transpose(2, 3) * attention.scale], 3)
                v = torch.cat([v, pv.expand(batch, -1, -1, -1)], 2)
            mixed = attention.proj((logits.softmax(3) @ v).transpose(1, 2).flatten(2))
            out[:, top : top + size, left : left + size] = mixed.unflatten(1, (size, size))
    return out[:, :height, :width]


def naive_attended(block, x, prompt):
    """The prompts attend the whole map and each other, without positions; then the block's MLP."""
    attention = block.attn
    rows = torch.cat([x.flatten(1, 2), prompt.expand(len(x), -1, -1)], 1)
    q, k, v = split_heads(attention, rows)
    weights = (q[:, :, -len(prompt) :] @ k.transpose(2, 3) * attention.scale).softmax(3)
    out = prompt + attention.proj((weights @ v).transpose(1, 2).flatten(2))
    return out + block.mlp(out)


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


# -- prompts


@pytest.mark.parametrize("shape", [(256, 256), (64, 224), (96, 160)])
@pytest.mark.parametrize("return_tokens", [False, True])
@torch.no_grad()
def test_prompts_equal_naive_attention(shape, return_tokens):
    encoder = make(return_tokens=return_tokens)
    image = torch.rand(2, 3, *shape)
    prompts = [None, *(torch.randn(count, dim) for count, dim in zip((1, 3, 8), DIMS, strict=True))]
    levels, embedding, tokens = naive(encoder, image, prompts)
    features = encoder(image, prompts)
    for found, expected in zip(features.levels, levels, strict=True):
        assert relative(found, expected) <= 1e-5
    assert relative(features.embedding, embedding) <= 1e-5
    if return_tokens:
        assert features.tokens[0] is None
        for found, expected in zip(features.tokens[1:], tokens[1:], strict=True):
            assert relative(found, expected) <= 1e-5
    else:
        assert features.tokens == [None] * 4


@torch.no_grad()
def test_lite_medsam_prompts_equal_naive_attention():
    encoder = make(64, variant="lite_medsam", return_tokens=True)
    image = torch.rand(1, 3, 32, 64)
    prompts = [None, *(torch.randn(2, dim) for dim in DIMS)]
    _, embedding, tokens = naive(encoder, image, prompts)
    features = encoder(image, prompts)
    assert relative(features.embedding, embedding) <= 1e-5
    assert all(relative(a, b) <= 1e-5 for a, b in zip(features.tokens[1:], tokens[1:], strict=True))


@torch.no_grad()
def test_no_prompts_is_the_official_encoder_exactly(encoder):
    image = torch.rand(1, 3, 96, 96)
    without, empty = encoder(image), encoder(image, [None] * 4)
    assert torch.equal(without.embedding, empty.embedding)
    assert all(torch.equal(a, b) for a, b in zip(without.levels, empty.levels, strict=True))
    assert without.tokens == [None] * 4


@torch.no_grad()
def test_single_levels_may_go_without_prompts():
    encoder = make(64, return_tokens=True)
    tokens = encoder(torch.rand(2, 3, 64, 64), [None, None, torch.randn(5, 160), None]).tokens
    assert [None if rows is None else tuple(rows.shape) for rows in tokens] == [None, None, (2, 5, 160), None]


@pytest.mark.parametrize("return_tokens", [False, True])
def test_prompts_change_the_output_and_receive_gradients(return_tokens):
    encoder = make(64, return_tokens=return_tokens)
    image = torch.rand(1, 3, 64, 64)
    prompts = [None, *(torch.randn(2, dim, requires_grad=True) for dim in DIMS)]
    features = encoder(image, prompts)
    assert relative(features.embedding.detach(), encoder(image).embedding.detach()) > 1e-3
    features.embedding[:, ::2].sum().backward()  # the sum over all channels is constant after the layer norm
    assert all(prompt.grad.abs().max() > 1e-4 for prompt in prompts[1:])


@torch.no_grad()
def test_attended_tokens_depend_on_the_image():
    encoder = make(64, return_tokens=True)
    prompts = [None, *(torch.randn(2, dim) for dim in DIMS)]
    tokens = encoder(torch.rand(2, 3, 64, 64), prompts).tokens
    assert all(relative(rows[0], rows[1]) > 1e-3 for rows in tokens[1:])


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


# -- LoRA


@pytest.fixture
def adapted(encoder):
    """An encoder with LoRA, equal to ``encoder`` otherwise."""
    torch.manual_seed(5)
    adapted = TinyViT(256, lora_rank=4).eval()
    adapted.load_state_dict(encoder.state_dict(), strict=False)
    return adapted


@torch.no_grad()
def train(module):
    for name, parameter in module.named_parameters():
        if "lora_b" in name:
            parameter.normal_(0, 0.1)


@torch.no_grad()
def test_lora_starts_as_the_identity(encoder, adapted):
    image = torch.rand(1, 3, 96, 96)
    assert torch.equal(adapted(image).embedding, encoder(image).embedding)
    assert sum(isinstance(module, LoRALinear) for module in adapted.modules()) == 10


@torch.no_grad()
def test_lora_acts_on_q_and_v_alone(adapted):
    train(adapted)
    for module in adapted.modules():
        if isinstance(getattr(module, "qkv", None), LoRALinear):
            change = (module.qkv.merged_weight() - module.qkv.weight).abs()
            change = change.view(module.num_heads, 3, module.key_dim, -1).amax(3)  # head by head: q, k, v
            assert (change[:, 0] > 0).all() and (change[:, 2] > 0).all() and not change[:, 1].any()


@torch.no_grad()
def test_merged_lora_has_official_names_and_equal_output(encoder, adapted):
    train(adapted)
    image = torch.rand(1, 3, 96, 96)
    before = adapted(image).embedding
    assert relative(before, encoder(image).embedding) > 1e-3
    assert merge_lora(adapted) == 10
    assert set(adapted.state_dict()) == set(encoder.state_dict())
    assert relative(adapted(image).embedding, before) <= 1e-6


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
    compiled = torch.compile(encoder, fullgraph=True)(image, prompts)
    assert relative(compiled.embedding, eager.embedding) <= 1e-4
    assert all(relative(a, b) <= 1e-4 for a, b in zip(compiled.tokens[1:], eager.tokens[1:], strict=True))
