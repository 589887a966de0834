"""TinyViT by other means: kornia's published arrangement, and naive attention with prompts; for its tests."""

import torch
from kornia.models.tiny_vit import ConvBN
from kornia.models.tiny_vit import TinyViT as KorniaTinyViT
from torch import nn
from torch.nn import functional as F

from hspsam_monai.encoders import TinyViT

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
