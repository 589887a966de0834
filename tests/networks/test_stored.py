"""Every network in two halves: what a frozen encoder says can be stored, and the rest goes on from there."""

import pytest
import torch

from hspsam_monai.encoders import ENCODERS, Encoded
from hspsam_monai.errors import ConfigError
from hspsam_monai.networks import HSPSAM, SAMSP, ConvPyramidSAM, ProxyPrompt
from hspsam_monai.networks.stored import features_digest, level_names, pack, require_storable, unpack

FROZEN = {
    "hsp_sam slim": lambda encoder: HSPSAM(encoder, 64, decoder="slim", adapt="frozen", inject=False),
    "hsp_sam paper": lambda encoder: HSPSAM(encoder, 64, decoder="paper", adapt="frozen", inject=False),
    "hsp_sam without prompts": lambda encoder: HSPSAM(
        encoder, 64, decoder="slim", adapt="frozen", prompt_source="none"
    ),
    "conv_pyramid": lambda encoder: ConvPyramidSAM(encoder, 64, adapt="frozen"),
    "sam_sp": lambda encoder: SAMSP(encoder, 64, adapt="frozen"),
}


@pytest.fixture
def image():
    return torch.rand(2, 3, 64, 96)


@pytest.mark.parametrize(
    ("encoder", "name"), [*(("sam_small", name) for name in FROZEN), ("mobile_sam", "hsp_sam slim")]
)
def test_the_stored_half_gives_the_same_answer_and_the_same_gradients(name, encoder, image):
    network = FROZEN[name](encoder)
    require_storable(network, image)
    names = network.stored
    with torch.no_grad():
        tensors = pack(network.encode(image).features, names)
    assert set(tensors) == set(names)
    stored = Encoded(unpack(tensors), (64, 96))
    for mode in (False, True):
        network.train(mode)
        gradients = []
        for given in (image, stored):
            network.zero_grad()
            output = network(given)
            output = output if torch.is_tensor(output) else output.logits
            output.square().mean().backward()
            gradients.append((output, {k: p.grad for k, p in network.named_parameters() if p.grad is not None}))
        (a, first), (b, second) = gradients
        assert torch.equal(a, b) and first.keys() == second.keys() and len(first) > 0
        assert all(torch.allclose(first[key], second[key], rtol=1e-4, atol=1e-8) for key in first)


def test_proxy_prompt_takes_stored_targets_and_supports():
    small = {"value_width": 24, "mamba_depth": 1, "mamba_state": 2, "ffn_width": 16}
    network = ProxyPrompt("mobile_sam", image_size=64, **small).eval()
    image, supports = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 3, 64, 64)
    masks = (torch.rand(2, 3, 64, 64) > 0.5).long()
    require_storable(network, image)
    assert network.stored == ("level_1", "level_2", "level_3", "embedding")
    assert ProxyPrompt("mobile_sam", image_size=64, readout=False, **small).stored == ("embedding",)
    expected = network(image, supports, masks)
    target, examples = (
        Encoded(unpack(pack(network.encode(x).features, network.stored)), (64, 64))
        for x in (image, supports.flatten(0, 1))
    )
    assert torch.equal(network(target, supports, masks, examples), expected)


def test_unpacking_leaves_out_what_was_not_stored():
    features = unpack({"level_2": torch.ones(1, 4, 2, 2)})
    assert [level is None for level in features.levels] == [True, True, False] and features.tokens == [None] * 3
    assert features.embedding is None
    assert Encoded(features, (32, 32)).device == torch.device("cpu")
    only = torch.zeros(1)
    assert unpack({"embedding": only}).embedding is only


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapt": "frozen"}, "learned prompts join the encoder"),
        ({"adapt": "lora", "inject": False}, "parameters of its encoder are trained"),
        ({"adapt": "full", "inject": False}, "parameters of its encoder are trained"),
    ],
)
def test_features_that_training_would_change_are_refused(options, message, image):
    with pytest.raises(ConfigError, match=message):
        require_storable(HSPSAM("sam_small", 64, decoder="slim", **options), image)


def test_a_network_without_the_two_halves_is_refused(image):
    with pytest.raises(ConfigError, match="Conv2d has no encode"):
        require_storable(torch.nn.Conv2d(3, 2, 1), image)


# -- prompts that stay out of the encoder


@torch.no_grad()
def test_without_injection_the_encoder_is_the_official_one(image):
    network = HSPSAM("mobile_sam", 64, decoder="slim", inject=False).eval()
    levels = network.encode(image).features.levels
    assert all(torch.equal(a, b) for a, b in zip(levels, network.encoder(image).levels, strict=True))
    before = network(image)
    network.prompter.queries[0].add_(1)
    assert not torch.equal(network(image), before)  # they still feed the decoder
    injected = HSPSAM("mobile_sam", 64, decoder="slim").eval()
    assert injected.state_dict().keys() == network.state_dict().keys()
    injected.load_state_dict(network.state_dict())
    assert not torch.equal(injected(image), network(image))


def test_prompts_cannot_attend_an_image_they_do_not_join():
    with pytest.raises(ConfigError, match="Set prompt_source to 'static', or inject to true"):
        HSPSAM("mobile_sam", 64, decoder="slim", prompt_source="image", inject=False)


# -- what the features depend on


def test_the_digest_follows_the_frozen_weights_alone():
    network = HSPSAM("sam_small", 64, decoder="paper", adapt="frozen", inject=False)
    first = features_digest(network)
    with torch.no_grad():
        network.encoder.neck[0].weight.add_(1)  # trained, and applied after what is stored
        network.prompter.queries[0].add_(1)
        next(network.decoder.parameters()).add_(1)
    assert features_digest(network) == first
    with torch.no_grad():
        network.encoder.blocks[-1].mlp.lin2.bias[-1] += 1e-3
    assert features_digest(network) != first
    assert features_digest(FROZEN["sam_sp"]("sam_small")) != first


def test_level_names_count_the_levels():
    assert level_names(ENCODERS["mobile_sam"](64)) == ("level_0", "level_1", "level_2", "level_3")


# -- checkpointing


@pytest.mark.parametrize("kind", [HSPSAM, SAMSP, ConvPyramidSAM])
def test_checkpointing_gives_the_same_gradients(kind, image):
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        network = kind("sam_small", 64, adapt="full", checkpointing=checkpointing).train()
        assert network.encoder.checkpointing is checkpointing
        output = network(image)
        (output if torch.is_tensor(output) else output.logits).square().mean().backward()
        found.append({k: p.grad for k, p in network.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and any(key.startswith("encoder.blocks.0.") for key in found[0])
    assert all(torch.allclose(found[0][key], found[1][key], rtol=1e-4, atol=1e-7) for key in found[0])


def test_checkpointing_saves_activations(image):
    """Fewer bytes are kept for the backward pass; counted by what autograd asks to be saved."""

    def saved(checkpointing):
        torch.manual_seed(3)
        network = HSPSAM("sam_small", 64, decoder="slim", adapt="full", checkpointing=checkpointing)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            network.encoder(image)
        return sum(kept)

    assert saved(True) < saved(False) / 2


def test_checkpointing_is_refused_where_there_is_none():
    with pytest.raises(ConfigError, match=r"mobile_sam.*no checkpointing"):
        HSPSAM("mobile_sam", 64, checkpointing=True)
