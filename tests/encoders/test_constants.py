"""What is kept between calls must never outlive the parameters it came from."""

import copy
import pickle

import pytest
import torch
from torch import nn

from hspsam_monai.encoders import build_encoder, constants, sam_vit
from hspsam_monai.encoders.constants import CAPACITY, Constants
from hspsam_monai.networks import HSPSAM


class Counted:
    def __init__(self, *sources):
        self.sources, self.calls, self.constants = list(sources), 0, Constants()

    def compute(self):
        self.calls += 1
        return sum(source.sum() for source in self.sources)

    def get(self, key="a"):
        return self.constants.get(key, self.sources, self.compute)


@torch.no_grad()
def test_computed_once_and_again_after_every_kind_of_change():
    weight = nn.Parameter(torch.ones(3))
    counted = Counted(weight)
    assert counted.get() is counted.get()
    assert counted.calls == 1
    weight.add_(1)
    assert counted.get() == 6
    weight.copy_(torch.zeros(3))
    assert counted.get() == 0
    weight.data = torch.full((3,), 5.0)
    assert counted.get() == 15
    counted.sources = [nn.Parameter(torch.full((3,), 7.0))]
    assert counted.get() == 21
    assert counted.calls == 5


def test_an_optimizer_step_is_seen():
    weight = nn.Parameter(torch.ones(3))
    counted = Counted(weight)
    with torch.no_grad():
        assert counted.get() == 3
    weight.grad = torch.ones(3)
    torch.optim.SGD([weight], 1.0).step()
    with torch.no_grad():
        assert counted.get() == 0


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}])
def test_a_network_evaluated_between_steps_follows_any_optimizer(options):
    """Fused optimisers write without PyTorch counting it."""
    torch.manual_seed(0)
    network = HSPSAM("mobile_sam", image_size=64, decoder="slim", adapt="full", prompt_source="image").eval()
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3, **options)
    image = torch.rand(1, 3, 64, 64)
    for _ in range(2):
        with torch.no_grad():
            network(image)
        network(image).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            found, expected = network(image), copy.deepcopy(network)(image)  # copies start empty
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_writes_behind_pytorchs_back_are_seen_on_a_cpu():
    network = HSPSAM("mobile_sam", image_size=64, decoder="slim", prompt_source="static").eval()
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        network(image)
        for parameter in network.parameters():
            parameter.data.mul_(1.2)
        torch.testing.assert_close(network(image), copy.deepcopy(network)(image), rtol=1e-5, atol=1e-5)
        weight = nn.Parameter(torch.ones(3))
        counted = Counted(weight)
        assert counted.get() == 3
        weight.detach().numpy()[:] = 2
        assert counted.get() == 6
        counted.constants.forget()
        counted.get()
        assert counted.calls == 3


def test_nothing_is_kept_while_gradients_are_on():
    weight = nn.Parameter(torch.ones(3))
    counted = Counted(weight)
    counted.get().backward()
    counted.get().backward()
    assert counted.calls == 2
    assert weight.grad.tolist() == [2, 2, 2]


def test_autocast_and_precise_values_do_not_mix():
    weight = nn.Parameter(torch.randn(4, 4))
    constants = Constants()

    def product():
        return weight @ weight

    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert constants.get("a", [weight], product).dtype == torch.bfloat16
        assert constants.get("a", [weight], product).dtype == torch.float32


@torch.no_grad()
def test_parameters_made_in_inference_mode_are_never_trusted():
    with torch.inference_mode():
        weight = torch.ones(3)
    counted = Counted(weight)
    counted.get()
    counted.get()
    assert counted.calls == 2


@torch.no_grad()
def test_copies_start_empty_and_memory_is_bounded():
    counted = Counted(nn.Parameter(torch.ones(1)))
    for key in range(3 * CAPACITY):
        counted.get(key)
    assert len(counted.constants._kept) == CAPACITY
    assert not copy.deepcopy(counted.constants)._kept
    assert not pickle.loads(pickle.dumps(counted.constants))._kept


@torch.no_grad()
def test_bytes_are_bounded_too(monkeypatch):
    monkeypatch.setattr(constants, "BYTES", 1000)
    kept, weight = Constants(), nn.Parameter(torch.ones(1))
    for key in range(20):
        kept.get(key, [weight], lambda: (weight + torch.zeros(25), weight + torch.zeros(25)))  # 200 bytes
    assert len(kept._kept) == 5 and kept._bytes == 1000
    assert kept.get("large", [weight], lambda: weight + torch.zeros(1000)).shape == (1000,)
    assert len(kept._kept) == 1 and kept._bytes == 4000
    kept.forget()
    assert not kept._kept and not kept._bytes


@torch.no_grad()
def test_a_write_while_a_value_is_made_is_seen_afterwards():
    kept, weight = Constants(), nn.Parameter(torch.ones(3))

    def compute():
        total = weight.sum()
        weight.add_(1)  # what another thread may do meanwhile
        return total

    assert kept.get("a", [weight], compute) == 3
    assert kept.get("a", [weight], weight.sum) == 6


@pytest.mark.parametrize("name", ["mobile_sam", "sam_vit_b"])
@torch.no_grad()
def test_a_network_that_moves_lets_its_old_memory_go(name, monkeypatch):
    monkeypatch.setitem(sam_vit.VARIANTS, "b", sam_vit.Variant(32, 4, 2, (0, 1, 2, 3)))
    network = HSPSAM(name, image_size=64, decoder="slim", lora_rank=2).eval()
    network(torch.rand(1, 3, 64, 64))
    keepers = [module for module in network.modules() if hasattr(module, "_constants")]
    assert {type(keeper).__name__ for keeper in keepers if keeper._constants._kept} >= {
        "HierarchicalPrompter", "HierarchicalDecoder", "LoRALinear", type(network.encoder).__name__,
    }  # fmt: skip
    network.double()
    assert not any(keeper._constants._kept for keeper in keepers)


@torch.no_grad()
def test_sam_vit_projects_its_prompts_once(monkeypatch):
    monkeypatch.setitem(sam_vit.VARIANTS, "b", sam_vit.Variant(32, 4, 2, (0, 1, 2, 3)))
    network, seen = HSPSAM("sam_vit_b", image_size=64, decoder="slim").eval(), []
    for block in network.encoder.blocks:
        block.attn.qkv.register_forward_hook(lambda _m, given, _out: seen.append(given[0].ndim))
    image = torch.rand(1, 3, 64, 64)
    first = network(image)
    assert torch.equal(network(image), first)
    assert seen.count(2) == 4  # prompts (P, D): one call a level, not one an image
    network.prompter.queries[0].add_(1)
    assert not torch.equal(network(image), first) and seen.count(2) == 5


@pytest.mark.parametrize("source", ["static", "image"])
def test_a_network_that_kept_constants_follows_its_weights(source):
    torch.manual_seed(0)
    image = torch.rand(1, 3, 96, 64)
    used = HSPSAM("mobile_sam", image_size=64, prompt_source=source, decoder="slim", adapt="full").eval()
    other = HSPSAM("mobile_sam", image_size=64, prompt_source=source, decoder="slim", adapt="full").eval()
    with torch.inference_mode():
        before = used(image)
        assert torch.equal(used(image), before)
        expected = other(image)
    used.load_state_dict(other.state_dict())
    with torch.inference_mode():
        assert torch.equal(used(image), expected)
        assert not torch.equal(expected, before)
    graded = used(image)  # with gradients on, nothing kept is used: the same values
    torch.testing.assert_close(graded, expected, rtol=1e-5, atol=1e-5)
    graded.square().mean().backward()


def test_an_encoder_leaves_its_input_alone_and_keeps_all_its_constants():
    encoder = build_encoder("mobile_sam", image_size=96).eval()
    image = torch.rand(2, 3, 96, 64)  # partial windows on both axes: the most constants one size makes
    before = image.clone()
    with torch.inference_mode():
        first = encoder(image).embedding
        assert torch.equal(encoder(image).embedding, first)
    assert torch.equal(image, before)
    assert len(encoder._constants._kept) < CAPACITY / 4


@pytest.mark.parametrize("rank", [0, 2])
def test_sam_vit_follows_its_weights_at_every_size(monkeypatch, rank):
    monkeypatch.setitem(sam_vit.VARIANTS, "small", sam_vit.Variant(48, 4, 3, (0, 1, 2, 3)))

    def build(seed):
        torch.manual_seed(seed)
        encoder = sam_vit.SamViT("small", image_size=64, lora_rank=rank).eval()
        for parameter in encoder.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        return encoder

    used, other = build(0), build(1)
    images = [torch.rand(1, 3, 64, 64), torch.rand(1, 3, 96, 64)]  # the second resamples positions
    with torch.inference_mode():
        before = [used(image).embedding for image in images]
        expected = [other(image).embedding for image in images]
    used.load_state_dict(other.state_dict())
    with torch.inference_mode():
        for image, old, new in zip(images, before, expected, strict=True):
            assert torch.equal(used(image).embedding, new)
            assert not torch.equal(old, new)
