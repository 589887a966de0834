"""HSP-SAM as a whole: shapes, what is trained, what is saved, what the prompts do."""

import pytest
import torch
from torch import nn

from hspsam_monai.encoders import ENCODERS
from hspsam_monai.encoders.lora import merge_lora
from hspsam_monai.encoders.state_files import read_state, write_state
from hspsam_monai.errors import ConfigError, WeightsError
from hspsam_monai.networks import HSPSAM, SAMSP, ConvPyramidSAM, load_pretrained
from hspsam_monai.networks.pretrained import load_checkpoint


def build(encoder="mobile_sam", decoder="slim", size=64, **options):
    return HSPSAM(encoder, size, decoder=decoder, **options).eval()


@torch.no_grad()
def wake(network):
    """Give parameters that start at zero a value, so that everything behind them gets gradients."""
    for name, parameter in network.named_parameters():
        if not parameter.any() and ("lora_b" in name or "project" in name or "attention_biases" in name):
            parameter.normal_(0, 0.05)
    return network


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


def millions(parameters):
    return sum(p.numel() for p in parameters) / 1e6


# -- shapes


@pytest.mark.parametrize("encoder", ["mobile_sam", "lite_medsam", "sam_small"])
@pytest.mark.parametrize("decoder", ["paper", "slim"])
@pytest.mark.parametrize(("source", "prompts", "classes"), [("static", None, 2), ("image", 3, 4), ("none", 1, 2)])
@torch.no_grad()
def test_logits_have_the_inputs_size(encoder, decoder, source, prompts, classes):
    options = {"num_classes": classes, "prompts_per_level": prompts, "prompt_source": source}
    network = build(encoder, decoder, 32, **options)
    logits = network(torch.rand(2, 3, 32, 64))
    assert type(logits) is torch.Tensor  # one tensor in, one tensor out: what every MONAI verb expects
    assert logits.shape == (2, classes, 32, 64) and logits.dtype == torch.float32 and logits.isfinite().all()
    counts = [len(q) for q in network.prompter.encoder_prompts() if q is not None]
    with_attention = sum(level.prompt_dim is not None for level in network.encoder.levels)
    assert counts == [] if source == "none" else counts == [prompts or classes] * with_attention


@torch.no_grad()
def test_default_arguments_build_the_paper_on_vit_b():
    network = HSPSAM(image_size=64).eval()
    assert network(torch.rand(1, 3, 64, 64)).shape == (1, 2, 64, 64)


@torch.no_grad()
def test_batch_equals_single():
    network = build(prompt_source="image")
    images = torch.rand(3, 3, 64, 64)
    together = network(images)
    for index in range(3):
        assert relative(network(images[index : index + 1])[0], together[index]) <= 1e-5


# -- save and load (trap 1 of the development code: the prompts were not restored)


@pytest.mark.parametrize(
    ("encoder", "decoder", "adapt"), [("mobile_sam", "slim", "full"), ("sam_small", "paper", "lora")]
)
@pytest.mark.parametrize("source", ["static", "image"])
@torch.no_grad()
def test_saved_and_loaded_prompts_and_logits_are_bit_equal(tmp_path, encoder, decoder, adapt, source):
    options = {"adapt": adapt, "prompt_source": source, "prompts_per_level": 2}
    first = wake(build(encoder, decoder, **options))
    write_state(tmp_path / "model.pt", {"model": first.state_dict()})
    torch.manual_seed(1)
    second = build(encoder, decoder, **options)
    image = torch.rand(1, 3, 64, 64)
    assert not torch.equal(second(image), first(image))
    load_checkpoint(second, tmp_path / "model.pt")
    for mine, theirs in zip(first.prompter.parameters(), second.prompter.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(second(image), first(image))


@torch.no_grad()
def test_another_networks_file_is_refused(tmp_path):
    write_state(tmp_path / "model.pt", {"model": build(prompts_per_level=2).state_dict()})
    with pytest.raises(WeightsError, match=r"lacks|does not fit"):
        load_checkpoint(build(prompts_per_level=3), tmp_path / "model.pt")


@torch.no_grad()
def test_merged_lora_gives_the_same_logits():
    network = wake(build("sam_small", "paper", adapt="lora"))
    image = torch.rand(1, 3, 64, 64)
    before = network(image)
    merge_lora(network)
    assert relative(network(image), before) <= 1e-5
    assert not any("lora_" in key for key in network.state_dict())


# -- what is trained


@pytest.mark.parametrize("encoder", ["mobile_sam", "sam_small"])
@pytest.mark.parametrize("decoder", ["paper", "slim"])
@pytest.mark.parametrize(("adapt", "source"), [("lora", "static"), ("full", "image"), ("frozen", "none")])
def test_every_trained_parameter_receives_a_gradient(encoder, decoder, adapt, source):
    network = wake(build(encoder, decoder, adapt=adapt, prompt_source=source))
    network(torch.rand(2, 3, 64, 64)).square().mean().backward()
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.any(), name
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize("encoder", ["mobile_sam", "sam_small"])
def test_lora_mode_freezes_the_rest_of_the_encoder(encoder):
    network = build(encoder, "paper", adapt="lora")
    trained = {name for name, p in network.encoder.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name or name.startswith("neck.") for name in trained)
    assert any(name.startswith("neck.") for name in trained)  # the paper fine-tunes SAM's neck for the deepest level
    assert all(p.requires_grad for p in network.decoder.parameters())
    assert all(p.requires_grad for p in network.prompter.parameters())


def test_full_trains_everything_and_frozen_nothing_of_the_encoder():
    assert all(p.requires_grad for p in build(adapt="full").parameters())
    assert not any(p.requires_grad for p in build(adapt="frozen").encoder.parameters())


@pytest.mark.parametrize(
    # millions, reference/methods.md: LoRA, Q -> A, transformers, head; without the level-4 neck, which is SAM's own
    ("encoder", "lora", "answers", "necks"),
    [("sam_vit_b", 1.18, 1.23, 3 * 0.788), ("sam_vit_h", 5.24, 2.68, 3 * 0.919)],
)
def test_trained_parameters_are_as_many_as_the_papers(encoder, lora, answers, necks):
    with torch.device("meta"):
        network = HSPSAM(encoder)
    decoder = network.decoder
    assert millions(p for n, p in network.encoder.named_parameters() if "lora_" in n) == pytest.approx(lora, abs=0.01)
    assert millions(network.prompter.answers.parameters()) == pytest.approx(answers, abs=0.02)
    assert millions(decoder.transformers.parameters()) == pytest.approx(13.17, abs=0.02)
    assert millions(decoder.necks.parameters()) == pytest.approx(necks, abs=0.01)
    head = [*decoder.upscale.parameters(), *decoder.hyper.parameters()]
    assert millions(head) == pytest.approx(0.35, abs=0.02)
    total = millions(p for p in network.parameters() if p.requires_grad)
    assert total == pytest.approx({"sam_vit_b": 19.1, "sam_vit_h": 25.1}[encoder], abs=0.2)


# -- modes


@torch.no_grad()
def test_dropout_is_the_only_difference_between_the_modes():
    image = torch.rand(1, 3, 64, 64)
    for encoder, decoder in (("mobile_sam", "slim"), ("sam_small", "paper")):
        network = build(encoder, decoder)
        quiet = network.eval()(image)
        assert torch.equal(network.train()(image), quiet)
        network.dropout = 0.5
        assert torch.equal(network.eval()(image), quiet)
        first, second = network.train()(image), network.train()(image)
        assert not torch.equal(first, quiet) and not torch.equal(first, second)


# -- what the prompts do


@pytest.mark.parametrize(("encoder", "decoder"), [("mobile_sam", "slim"), ("sam_small", "paper")])
@pytest.mark.parametrize("source", ["static", "image"])
@torch.no_grad()
def test_every_prompt_counts(encoder, decoder, source):
    network = build(encoder, decoder, prompt_source=source)
    image = torch.rand(1, 3, 64, 64)
    logits = network(image)
    for part in (*network.prompter.queries, *(answer.separate[0][-1].bias for answer in network.prompter.answers)):
        kept = part.clone()
        part.add_(torch.randn_like(part))
        assert not torch.equal(network(image), logits)
        part.copy_(kept)
    assert torch.equal(network(image), logits)


@torch.no_grad()
def test_prompts_act_in_the_encoder_and_in_the_decoder():
    network = build("sam_small", "paper")
    image = torch.rand(1, 3, 64, 64)
    logits = network(image)
    features = network.encoder(image, network.prompter.encoder_prompts())
    answers = network.prompter(features.tokens)

    def decode(features, answers):
        return network.decoder([*features.levels[:-1], features.embedding], answers, (64, 64))

    assert torch.equal(decode(features, answers), logits)
    assert not torch.equal(decode(network.encoder(image), answers), logits)
    assert not torch.equal(decode(features, [None] * 4), logits)


# -- SAM's weights


@pytest.mark.data
@pytest.mark.parametrize(("decoder", "keys"), [("paper", 2), ("slim", 1)])
@torch.no_grad()
def test_mobile_sams_weights_reach_encoder_and_decoder(shared, decoder, keys):
    path = shared / "weights" / "mobile_sam.pt"
    network = build(decoder=decoder, adapt="lora")
    fresh = {key: value.clone() for key, value in network.state_dict().items()}
    report = load_pretrained(network, path)
    assert report.unexpected == () and all("lora_" in key for key in report.missing)
    state = read_state(path)
    assert torch.equal(
        network.encoder.layers[3].blocks[1].attn.qkv.weight, state["image_encoder.layers.3.blocks.1.attn.qkv.weight"]
    )
    gaussian = state["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"]
    positions = network.decoder.positions.positional_encoding_gaussian_matrix
    assert torch.equal(positions, gaussian[:, : positions.shape[1]])
    no_mask = state["prompt_encoder.no_mask_embed.weight"].flatten()
    assert torch.equal(network.decoder.no_mask, no_mask if decoder == "paper" else torch.zeros(128))
    assert len(network.load_sam(state)) == keys
    changed = {key for key, value in network.state_dict().items() if not torch.equal(value, fresh[key])}
    own = {key for key in changed if not key.startswith("encoder.")}
    assert own == {"decoder.positions.positional_encoding_gaussian_matrix", "decoder.no_mask"} - (
        set() if decoder == "paper" else {"decoder.no_mask"}
    )
    assert network(torch.rand(1, 3, 64, 64)).isfinite().all()


@torch.no_grad()
def test_load_sam_copies_the_position_encoding():
    gaussian = torch.randn(2, 128)
    state = {
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": gaussian,
        "prompt_encoder.no_mask_embed.weight": torch.randn(1, 256),
    }
    network = build("sam_small", "paper")
    assert len(network.load_sam(state)) == 2
    assert torch.equal(network.decoder.positions.positional_encoding_gaussian_matrix, gaussian)
    assert torch.equal(network.decoder.no_mask, state["prompt_encoder.no_mask_embed.weight"][0])
    assert network.load_sam({}) == []


def test_no_weights_is_a_warning_and_a_checkpoint_loads_whole(tmp_path, caplog):
    assert load_pretrained(build(), "") is None and "random" in caplog.text
    for network in (build(), ConvPyramidSAM(image_size=64)):
        path = write_state(tmp_path / "model.pt", {"model": network.state_dict()})
        report = load_pretrained(network, path)
        assert len(report.loaded) == len(network.state_dict())


def test_a_later_start_gives_its_encoder_alone(tmp_path, caplog):
    """SAM-SP from a trained HSP-SAM: SAM's decoder of the one, the encoder of the other."""
    torch.manual_seed(1)
    trained = write_state(tmp_path / "hsp.pt", {"model": HSPSAM("mobile_sam", 64, adapt="full").state_dict()})
    whole = write_state(tmp_path / "sp.pt", {"model": SAMSP("mobile_sam", 64, adapt="full").state_dict()})
    network = SAMSP("mobile_sam", 64, adapt="lora")
    report = load_pretrained(network, [str(whole), trained])
    state, start = read_state(trained), read_state(whole)
    found = network.state_dict()
    encoder = [key for key in found if key.startswith("encoder.") and "lora_" not in key]
    assert all(torch.equal(found[key], state[key]) for key in encoder)
    assert all(torch.equal(found[key], start[key]) for key in found if not key.startswith("encoder."))
    assert not all(torch.equal(state[key], start[key]) for key in encoder)
    assert len(report.loaded) == len(encoder) and any(key.startswith("decoder.") for key in report.ignored)
    assert all(not found[key].any() for key in found if "lora_b" in key)  # an update of other weights
    slim = HSPSAM("mobile_sam", 64, adapt="full", decoder="slim")
    assert not any(key.startswith("encoder.neck.") for key in slim.state_dict())  # it has no use for it
    report = load_pretrained(network, [whole, write_state(tmp_path / "slim.pt", {"model": slim.state_dict()})])
    found, state = network.state_dict(), slim.state_dict()
    necks = [key for key in found if key.startswith("encoder.neck.")]
    assert all(torch.equal(found[key], start[key]) for key in necks)
    assert all(torch.equal(found[key], state[key]) for key in encoder if key not in necks)
    assert {"encoder." + key for key in report.missing if "lora_" not in key} == set(necks)
    assert not load_pretrained(slim, [None, whole]).missing  # the other way round: a neck for which there is no use
    assert torch.equal(slim.state_dict()[encoder[0]], start[encoder[0]])
    caplog.clear()
    load_pretrained(network, ["", trained])
    assert "random" in caplog.text and load_pretrained(network, ["", ""]) is None
    with pytest.raises(WeightsError, match=r"does not fit|lacks|does not know"):
        load_pretrained(SAMSP("sam_small", 64), [None, trained])


@pytest.mark.parametrize(("adapt", "expected"), [("lora", "rank 8"), ("full", "one without LoRA")])
def test_lora_of_another_rank_is_told(tmp_path, adapt, expected):
    path = write_state(tmp_path / "hsp.pt", {"model": build(adapt="lora", lora_rank=4).state_dict()})
    load_pretrained(SAMSP("mobile_sam", 64, adapt="lora", lora_rank=4), [None, path])
    with pytest.raises(WeightsError, match=f"rank 4; expected {expected}.*lora_rank=4"):
        load_pretrained(SAMSP("mobile_sam", 64, adapt=adapt, lora_rank=8), [None, path])


@pytest.mark.data
def test_a_later_start_may_be_an_official_file(shared):
    path = shared / "weights" / "mobile_sam.pt"
    network = build(adapt="full")
    load_pretrained(network, ["", path])
    key = "layers.3.blocks.1.attn.qkv.weight"
    assert torch.equal(network.encoder.state_dict()[key], read_state(path)["image_encoder." + key])


# -- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "num_classes is 1"),
        ({"in_channels": 1}, "in_channels is 1"),
        ({"dropout": 1.0}, "dropout is 1"),
        ({"prompt_source": "click"}, "prompt source"),
        ({"prompts_per_level": 0}, "prompts per level is 0"),
        ({"decoder": "thick"}, "decoder style"),
        ({"adapt": "some"}, "adapt is"),
        ({"size": 100}, "multiple of 32"),
        ({"encoder": "resnet"}, "unknown"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        build(**options)


# -- precision and graph capture


@pytest.mark.parametrize(("encoder", "decoder"), [("mobile_sam", "slim"), ("sam_small", "paper")])
@torch.no_grad()
def test_bfloat16_stays_near(encoder, decoder):
    network = build(encoder, decoder, 128)
    image = torch.rand(1, 3, 128, 128)
    expected = network(image)
    with torch.autocast("cpu", torch.bfloat16):
        found = network(image)
    assert found.dtype == torch.float32 and found.isfinite().all()
    assert nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0) >= 0.99


CAPTURED = [
    ("mobile_sam", "slim", "image"),
    ("mobile_sam", "paper", "static"),
    ("mobile_sam", "slim", "none"),
    ("sam_small", "paper", "image"),
    ("sam_small", "slim", "static"),
    ("sam_small", "paper", "none"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("encoder", "decoder", "source"), CAPTURED)
@torch.no_grad()
def test_export_keeps_the_batch_free(encoder, decoder, source):
    network = wake(build(encoder, decoder, prompt_source=source, prompts_per_level=2))
    free = ({0: torch.export.Dim("batch", min=1)},)
    exported = torch.export.export(network, (torch.rand(2, 3, 64, 96),), dynamic_shapes=free).module()
    for batch in (1, 3):
        image = torch.rand(batch, 3, 64, 96)
        assert relative(exported(image), network(image)) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["slim", "paper"])
@torch.no_grad()
def test_compile_gives_the_same_without_graph_breaks(decoder):
    network = build(decoder=decoder, prompt_source="image", prompts_per_level=2)
    image = torch.rand(1, 3, 64, 64)
    compiled = torch.compile(network, fullgraph=True, dynamic=False)
    assert relative(compiled(image), network(image)) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("encoder", "decoder", "source"), CAPTURED)
def test_one_graph_forward_and_backward(encoder, decoder, source):
    """Every source and decoder is one graph, in training too; the code generator itself is tried above."""
    network = wake(build(encoder, decoder, prompt_source=source, prompts_per_level=2))
    image = torch.rand(1, 3, 64, 64)
    compiled = torch.compile(network, fullgraph=True, dynamic=False, backend="aot_eager")
    found, expected = compiled(image), network(image)
    assert relative(found, expected) <= 1e-5
    watched = network.decoder.mask_tokens
    (a,), (b,) = (torch.autograd.grad(y.square().mean(), watched) for y in (found, expected))
    assert b.any() and relative(a, b) <= 1e-4


def test_every_encoder_name_is_tried_above():
    assert set(ENCODERS) == {"mobile_sam", "lite_medsam", "sam_small", "sam_vit_b", "sam_vit_l", "sam_vit_h"}
