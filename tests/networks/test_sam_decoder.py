"""SAM's decoder in batches equals segment_anything's, one image and one object at a time."""

import pytest
import torch
from segment_anything.modeling import PromptEncoder

from hspsam_monai.errors import ConfigError
from hspsam_monai.networks.sam_decoder import ABSENT, Prompts, SAMDecoder

GRID, SIZE = (8, 6), (128, 96)


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(0)
    module = SAMDecoder().eval()
    for parameter in module.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return module


def original(decoder, embedding, points=None, boxes=None, masks=None, multimask=False):
    """segment_anything's own forward passes for one image (1, 256, h, w) and one object."""
    encoder = PromptEncoder(256, GRID, SIZE, 16)
    encoder.load_state_dict(decoder.prompt_encoder.state_dict())
    sparse, dense = encoder(points, boxes, masks)
    return decoder.mask_decoder(embedding, encoder.get_dense_pe(), sparse, dense, multimask)


def close(a, b):
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("multimask", [False, True])
def test_without_prompt(decoder, multimask):
    embedding = torch.randn(3, 256, *GRID)
    masks, iou = decoder(embedding, multimask=multimask)
    for i in range(3):
        expected, quality = original(decoder, embedding[i : i + 1], multimask=multimask)
        close(masks[i], expected)
        close(iou[i], quality)


@torch.no_grad()
def test_ragged_prompts_equal_looping(decoder):
    torch.manual_seed(1)
    b, n, p = 3, 2, 3
    embedding = torch.randn(b, 256, *GRID)
    points = torch.rand(b, n, p, 2) * 90
    labels = torch.tensor([[[1, 0, ABSENT], [ABSENT] * 3], [[1, 1, 0], [0, ABSENT, ABSENT]], [[ABSENT] * 3, [1, 0, 1]]])
    boxes = torch.rand(b, n, 4) * 90
    has_box = torch.tensor([[True, False], [False, True], [False, True]])
    logits = torch.randn(b, n, 4 * GRID[0], 4 * GRID[1])
    has_mask = torch.tensor([[False, True], [True, False], [False, True]])
    masks, iou = decoder(embedding, Prompts(points, labels, boxes, has_box, logits, has_mask))
    for i in range(b):
        for j in range(n):
            present = labels[i, j] != ABSENT
            expected, quality = original(
                decoder,
                embedding[i : i + 1],
                (points[i, j, present][None], labels[i, j, present][None]) if present.any() else None,
                boxes[i, j][None] if has_box[i, j] else None,
                logits[i, j][None, None] if has_mask[i, j] else None,
            )
            close(masks[i, j], expected[0])
            close(iou[i, j], quality[0])


def test_gradients_reach_prompts_and_embedding(decoder):
    embedding = torch.randn(2, 256, *GRID, requires_grad=True)
    logits = torch.randn(2, 1, 16, 12, requires_grad=True)
    masks, _ = decoder(embedding, Prompts(masks=logits))
    masks.square().mean().backward()
    assert embedding.grad.abs().sum() > 0 and logits.grad.abs().sum() > 0


def test_disagreeing_prompts_are_refused(decoder):
    with pytest.raises(ConfigError, match="disagree"):
        Prompts(boxes=torch.zeros(2, 1, 4), masks=torch.zeros(1, 1, 8, 8)).shape()
    with pytest.raises(ConfigError, match="labels"):
        Prompts(points=torch.zeros(1, 1, 1, 2)).shape()
    for name in ("has_box", "has_mask"):
        with pytest.raises(ConfigError, match=f"{name} tells which"):
            Prompts(**{name: torch.ones(1, 1).bool()}).shape()
    with pytest.raises(ConfigError, match=r"torch\.bool; expected logits"):
        Prompts(masks=torch.ones(1, 1, 8, 8).bool()).shape()
    with pytest.raises(ConfigError, match="3 images"):
        decoder(torch.randn(2, 256, *GRID), Prompts(boxes=torch.zeros(3, 1, 4)))
