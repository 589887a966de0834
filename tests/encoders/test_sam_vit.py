"""SamViT against segment_anything with the same random weights, and its prompts against naive code."""

from functools import partial

import pytest
import torch
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import add_decomposed_rel_pos
from torch.nn import functional as F

from hspsam_monai.encoders import attention, sam_vit
from hspsam_monai.encoders.sam_vit import SamViT, Variant
from hspsam_monai.errors import ConfigError

SMALL = Variant(48, 6, 3, (1, 2, 4, 5))  # windowed and global blocks, head dimension 16 as odd one out


@pytest.fixture
def small(monkeypatch):
    """Builds small encoders by variant name "small"."""
    monkeypatch.setitem(sam_vit.VARIANTS, "small", SMALL)
    return partial(make, "small")


@pytest.fixture(scope="module")
def vit_b():
    return make("b", 512)


def make(variant, image_size=256, seed=0, **options):
    """An encoder with every parameter random, those that usually start at zero or one too."""
    torch.manual_seed(seed)
    encoder = SamViT(variant, image_size, **options).eval()
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "rel_pos" in name or "norm" in name or name.endswith("bias") or name == "pos_embed":
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return encoder


def official(encoder, image_size):
    """segment_anything's encoder for ``image_size`` with the weights of ``encoder``."""
    size = sam_vit.VARIANTS[encoder.variant]
    model = ImageEncoderViT(
        img_size=image_size,
        embed_dim=size.width,
        depth=size.depth,
        num_heads=size.heads,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=14,
        global_attn_indexes=size.global_blocks,
        out_chans=256,
    ).eval()
    model.load_state_dict(encoder.state_dict())
    return model


def normalised(encoder, image):
    return (image - encoder.pixel_mean) / encoder.pixel_std


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


def cosine(a, b):
    return float(F.cosine_similarity(a.float().flatten(), b.float().flatten(), dim=0))


def naive(encoder, image, prompts):
    """The official computation with prompts appended after norm1: padded windows, one plain softmax."""
    x = encoder.patch_embed(normalised(encoder, image)) + encoder.pos_embed
    levels, tokens = [], []
    for block in encoder.blocks:
        if block.window_size:
            x = block(x)  # segment_anything's own forward pass
            continue
        prompt = prompts[len(levels)]
        b, h, w, d = x.shape
        n, p, heads, attn = h * w, len(prompt), block.attn.num_heads, block.attn
        rows = torch.cat([block.norm1(x).flatten(1, 2), prompt.expand(b, -1, -1)], 1)
        q, k, v = attn.qkv(rows).view(b, n + p, 3, heads, -1).permute(2, 0, 3, 1, 4).flatten(1, 2)
        bias = add_decomposed_rel_pos(
            torch.zeros(b * heads, n, n), q[:, :n], attn.rel_pos_h, attn.rel_pos_w, (h, w), (h, w)
        )
        logits = q * attn.scale @ k.transpose(1, 2) + F.pad(bias, (0, p, 0, p))
        out = (logits.softmax(-1) @ v).view(b, heads, n + p, -1).transpose(1, 2).reshape(b, n + p, d)
        full = torch.cat([x.flatten(1, 2), prompt.expand(b, -1, -1)], 1) + attn.proj(out)
        full = full + block.mlp(block.norm2(full))
        x = full[:, :n].view(b, h, w, d)
        levels.append(x.permute(0, 3, 1, 2))
        tokens.append(full[:, n:])
    return levels, encoder.neck(x.permute(0, 3, 1, 2)), tokens


# -- parity with segment_anything


@pytest.mark.parametrize("size", [256, 512])
@torch.no_grad()
def test_vit_b_equals_segment_anything(vit_b, size):
    encoder = vit_b if size == 512 else make("b", 256)
    image = torch.rand(1, 3, size, size)
    expected = official(encoder, size)(normalised(encoder, image))
    features = encoder(image)
    assert features.embedding.shape == (1, 256, size // 16, size // 16)
    assert [tuple(level.shape) for level in features.levels] == [(1, 768, size // 16, size // 16)] * 4
    assert relative(features.embedding, expected) <= 1e-5
    assert relative(encoder.neck(features.levels[-1]), expected) <= 1e-5
    if size == 256:  # bfloat16 is slow on most CPUs
        with torch.autocast("cpu", torch.bfloat16):
            assert cosine(encoder(image).embedding, expected) >= 0.999


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["b", "l"])
@torch.no_grad()
def test_full_size_equals_segment_anything(variant):
    encoder = make(variant, 1024)
    image = torch.rand(1, 3, 1024, 1024)
    expected = official(encoder, 1024)(normalised(encoder, image))
    assert relative(encoder(image).embedding, expected) <= 1e-5


# 224 is exactly one window, 192 smaller than one, 448 four without padding, the others have edges.
@pytest.mark.parametrize("size", [32, 192, 224, 256, 448, 480])
@pytest.mark.parametrize("way", ["fold", "mask", "heads"])
@torch.no_grad()
def test_all_ways_equal_segment_anything_at_every_kind_of_grid(small, monkeypatch, size, way):
    monkeypatch.setattr(attention, "choose", lambda *_: way)
    encoder = small(size)
    image = torch.rand(2, 3, size, size)
    expected = official(encoder, size)(normalised(encoder, image))
    assert relative(encoder(image).embedding, expected) <= 1e-5


@pytest.mark.parametrize("shape", [(256, 512), (480, 96), (32, 672)])
@torch.no_grad()
def test_other_sizes_equal_segment_anything_with_embeddings_resampled_by_hand(small, shape):
    encoder = small(256)
    grid = (shape[0] // 16, shape[1] // 16)
    model = official(encoder, 256)
    resized = F.interpolate(encoder.pos_embed.permute(0, 3, 1, 2), grid, mode="bicubic", align_corners=False)
    model.pos_embed = torch.nn.Parameter(resized.permute(0, 2, 3, 1))  # rel_pos it resamples itself
    image = torch.rand(1, 3, *shape)
    expected = model(normalised(encoder, image))
    features = encoder(image)
    assert features.embedding.shape == (1, 256, *grid)
    assert relative(features.embedding, expected) <= 1e-5


@pytest.mark.parametrize("batch", [2, 5])
@torch.no_grad()
def test_batch_equals_single(small, batch):
    encoder = small(256)
    images = torch.rand(batch, 3, 256, 256)
    prompts = [torch.randn(2, 48) for _ in range(4)]
    together = encoder(images, prompts)
    for index in range(batch):
        alone = encoder(images[index : index + 1], prompts)
        assert relative(together.embedding[index], alone.embedding[0]) <= 1e-5


@torch.no_grad()
def test_strong_relative_positions_stay_exact(small):
    """Logits of +-100 on padding: the collapsed key must neither overflow nor cancel."""
    encoder = small(256)
    for name, parameter in encoder.named_parameters():
        if "rel_pos" in name:
            parameter.mul_(60)
    image = torch.rand(1, 3, 256, 256)
    expected = official(encoder, 256)(normalised(encoder, image))
    assert relative(encoder(image).embedding, expected) <= 1e-4  # softmax near argmax amplifies rounding


@torch.no_grad()
def test_half_precision_keeps_inputs_apart(small):
    encoder = small(256).to(torch.bfloat16)
    a, b = (encoder(torch.rand(1, 3, 256, 256).bfloat16()).embedding for _ in range(2))
    assert a.isfinite().all() and not torch.equal(a, b)


@torch.no_grad()
def test_a_large_grid_goes_head_by_head_in_parts(small, monkeypatch):
    encoder = small(512)
    image = torch.rand(2, 3, 512, 512)
    monkeypatch.setattr(attention, "choose", lambda *_: "mask")
    whole = encoder(image).embedding
    monkeypatch.undo()
    assert attention.choose("cpu", (32, 32)) == "heads"
    monkeypatch.setattr(attention, "_BIAS", 1024 * 300)  # 1024 tokens in 4 parts, the last one shorter
    assert relative(encoder(image).embedding, whole) <= 1e-5


def test_the_loop_over_heads_is_only_for_inference(small):
    with torch.no_grad():
        assert attention.choose("cpu", (32, 32)) == "heads"
        ways = []
        torch.jit.trace(
            lambda x: ways.append(attention.choose("cpu", (32, 32))) or x + 1, torch.zeros(1), check_trace=False
        )
        assert set(ways) == {"fold"}
    assert attention.choose("cpu", (32, 32)) == "fold"
    encoder = small(512)
    encoder.requires_grad_(False)
    prompts = [torch.randn(2, 48, requires_grad=True) for _ in range(4)]  # keys want a gradient, the bias does not
    encoder(torch.rand(1, 3, 512, 512), prompts).embedding[:, ::2].sum().backward()
    assert all(prompt.grad.abs().max() > 0 for prompt in prompts)


# -- gradients


@pytest.mark.parametrize("way", ["fold", "mask"])
def test_gradients_equal_segment_anything(small, monkeypatch, way):
    monkeypatch.setattr(attention, "choose", lambda *_: way)
    encoder = small(256)
    model = official(encoder, 256)
    image = torch.rand(1, 3, 256, 256)
    direction = torch.randn(1, 256, 16, 16)
    (encoder(image).embedding * direction).sum().backward()
    (model(normalised(encoder, image)) * direction).sum().backward()
    expected = dict(model.named_parameters())
    for name, parameter in encoder.named_parameters():
        assert relative(parameter.grad, expected[name].grad) <= 1e-4, name


def test_checkpointing_changes_nothing(small):
    results = []
    for checkpointing in (False, True):
        encoder = small(256, checkpointing=checkpointing).train()
        prompts = [torch.ones(2, 48, requires_grad=True) for _ in range(4)]
        embedding = encoder(torch.full((1, 3, 256, 256), 0.5), prompts).embedding
        embedding[:, ::2].sum().backward()
        results.append((embedding.detach(), encoder.blocks[0].attn.qkv.weight.grad, prompts[0].grad))
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


# -- prompts


@pytest.mark.parametrize("way", ["fold", "mask", "heads"])
@pytest.mark.parametrize("return_tokens", [False, True])
@torch.no_grad()
def test_prompts_equal_naive_attention(small, monkeypatch, way, return_tokens):
    monkeypatch.setattr(attention, "choose", lambda *_: way)
    encoder = small(256, return_tokens=return_tokens)
    image = torch.rand(2, 3, 256, 256)
    prompts = [torch.randn(count, 48) for count in (1, 2, 3, 8)]
    levels, embedding, tokens = naive(encoder, image, prompts)
    features = encoder(image, prompts)
    for found, expected in zip(features.levels, levels, strict=True):
        assert relative(found, expected) <= 1e-5
    assert relative(features.embedding, embedding) <= 1e-5
    if return_tokens:
        for found, expected in zip(features.tokens, tokens, strict=True):
            assert relative(found, expected) <= 1e-5
    else:
        assert features.tokens == [None] * 4


def test_prompts_change_the_output_and_receive_gradients(small):
    encoder = small(256)
    image = torch.rand(1, 3, 256, 256)
    prompts = [torch.randn(2, 48, requires_grad=True) for _ in range(4)]
    embedding = encoder(image, prompts).embedding
    assert relative(embedding.detach(), encoder(image).embedding.detach()) > 1e-3
    embedding[:, ::2].sum().backward()  # the sum over all channels is constant after LayerNorm
    assert all(prompt.grad.abs().max() > 1e-3 for prompt in prompts)


@torch.no_grad()
def test_single_levels_may_go_without_prompts(small):
    encoder = small(256, return_tokens=True)
    features = encoder(torch.rand(1, 3, 256, 256), [None, torch.randn(2, 48), None, torch.randn(1, 48)])
    assert [None if rows is None else tuple(rows.shape) for rows in features.tokens] == [
        None,
        (1, 2, 48),
        None,
        (1, 1, 48),
    ]


# -- construction and state


def test_names_equal_the_official_file(vit_b):
    assert list(vit_b.state_dict()) != []
    assert set(vit_b.state_dict()) == set(official(vit_b, 512).state_dict())


@torch.no_grad()
def test_official_state_resamples_to_the_nominal_size(small):
    state = small(1024).state_dict()
    encoder = small(512)
    adapted = encoder.official_state(state)
    encoder.load_state_dict(adapted)
    by_hand = F.interpolate(state["pos_embed"].permute(0, 3, 1, 2), (32, 32), mode="bicubic", align_corners=False)
    assert torch.equal(adapted["pos_embed"], by_hand.permute(0, 2, 3, 1))
    rel_pos = state["blocks.1.attn.rel_pos_h"]
    by_hand = F.interpolate(rel_pos.t()[None], 63, mode="linear")[0].t()
    assert torch.equal(adapted["blocks.1.attn.rel_pos_h"], by_hand)
    assert adapted["blocks.0.attn.rel_pos_h"] is state["blocks.0.attn.rel_pos_h"]
    # Loaded for 512, or loaded for 1024 and run at 512: the same.
    big = small(1024)
    image = torch.rand(1, 3, 512, 512)
    assert relative(encoder(image).embedding, big(image).embedding) <= 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [({"variant": "x"}, "variant"), ({"image_size": 100}, "image_size"), ({"lora_rank": -1}, "lora_rank")],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        SamViT(**options)


def test_bad_inputs_are_named(small):
    encoder = small(256)
    with pytest.raises(ConfigError, match="multiples of 32"):
        encoder(torch.rand(1, 3, 250, 256))
    with pytest.raises(ConfigError, match="4 levels"):
        encoder(torch.rand(1, 3, 256, 256), [None])
    with pytest.raises(ConfigError, match=r"expected \(P, 48\)"):
        encoder(torch.rand(1, 3, 256, 256), [torch.rand(2, 47), None, None, None])


# -- the mathematics


@pytest.mark.parametrize(("h", "w"), [(3, 14), (14, 5), (1, 13), (9, 9)])
def test_padding_logit_is_the_sum_over_the_padded_set(h, w):
    rel_h, rel_w = torch.randn(2, 7, 14, dtype=torch.float64) * 30
    every = rel_h[:, :, None] + rel_w[:, None, :]
    every[:, :h, :w] = -torch.inf
    expected = every.flatten(1).logsumexp(1, keepdim=True)
    torch.testing.assert_close(attention.padding_logit(rel_h, rel_w, h, w).double(), expected, rtol=1e-5, atol=1e-5)


def test_relative_table_is_the_difference_of_positions():
    rel_pos = torch.randn(9, 4)
    table = attention.relative_table(rel_pos, 5)
    for query in range(5):
        for key in range(5):
            assert torch.equal(table[query, :, key], rel_pos[query - key + 4])


@torch.no_grad()
def test_export_gives_the_same_and_leaves_eager_alone(small):
    encoder = small(256)
    image = torch.rand(1, 3, 256, 256)
    before = encoder(image).embedding
    exported = torch.export.export(encoder, (image,)).module()
    assert relative(exported(image).embedding, before) <= 1e-5
    assert torch.equal(encoder(image).embedding, before)


@pytest.mark.slow
@torch.no_grad()
def test_one_graph_with_prompts_and_padded_windows(small):
    encoder = small(256, return_tokens=True)
    image, prompts = torch.rand(1, 3, 256, 320), [torch.rand(2, 48)] * 4
    expected = encoder(image, prompts)
    found = torch.compile(encoder, fullgraph=True, dynamic=False, backend="aot_eager")(image, prompts)
    assert relative(found.embedding, expected.embedding) <= 1e-5
    assert all(relative(a, b) <= 1e-5 for a, b in zip(found.tokens, expected.tokens, strict=True))
