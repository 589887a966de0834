"""Proxy Prompt: the network, and contexts that are stored, saved, refused."""

import copy
import json
import math

import pytest
import torch
from monai.bundle import ConfigParser
from torch.nn import functional as F

from hspsam_monai.encoders.state_files import write_state
from hspsam_monai.errors import ConfigError, DataError, WeightsError
from hspsam_monai.networks import SAMSP, ProxyPrompt, load_checkpoint, load_pretrained
from hspsam_monai.networks.contextual_selection import unit_cells
from hspsam_monai.networks.linear_readout import ReadoutFit, read_out, readout_levels
from hspsam_monai.networks.proxy_prompt import CONTEXT, FAR
from hspsam_monai.training import DiceCE

SMALL = {"image_size": 64, "value_width": 16, "mamba_depth": 1, "mamba_state": 2, "ffn_width": 32}


def build(**options):
    torch.manual_seed(0)
    return ProxyPrompt("mobile_sam", **{**SMALL, **options})


def supports(count, classes=2, size=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(count, size, size, dtype=torch.long)
    for index in range(classes - 1):
        masks[:, 8 + 16 * index : 20 + 16 * index, 10:40] = index + 1
    return torch.rand(count, 3, size, size, generator=generator), masks


@pytest.fixture(scope="module")
def network():
    return build().eval()


# -- the network


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("classes", [2, 4])
def test_a_stored_context_equals_supports_passed_each_time(count, classes):
    network = build(num_classes=classes).eval()
    images, masks = supports(count, classes)
    x = torch.rand(2, 3, 64, 96)
    passed = network(x, images.expand(2, -1, -1, -1, -1), masks.expand(2, -1, -1, -1))
    network.set_context(images, masks)
    stored = network(x)
    assert isinstance(stored, torch.Tensor) and stored.shape == (2, classes, 64, 96) and stored.dtype == torch.float32
    assert not stored[:, 0].any() and torch.allclose(stored, passed, atol=1e-4, rtol=1e-5)
    other = build(num_classes=classes).eval()
    other.set_context(images.flip(0), masks.flip(0))
    assert torch.allclose(other(x), stored, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_objects_do_not_mix():
    network = build(num_classes=3).eval()
    images, masks = supports(2, 3)
    x = torch.rand(1, 3, 64, 64)
    both = network(x, images[None], masks[None])
    swapped = network(x, images[None], ((3 - masks) % 3)[None])
    assert torch.allclose(both[:, 1], swapped[:, 2], atol=1e-5) and not torch.allclose(both[:, 1], both[:, 2])


def test_only_the_generator_learns():
    network = build(num_classes=3, dropout=0.1).train()
    images, masks = supports(2, 3)
    image = torch.rand(2, 3, 64, 64)
    logits = network(image, images.expand(2, -1, -1, -1, -1), masks.expand(2, -1, -1, -1))
    DiceCE()(logits, masks[:, None]).backward()
    frozen = [n for n, p in network.named_parameters() if p.grad is None]
    assert all(n.startswith(("encoder.", "sam.")) for n in frozen)
    for name, p in network.named_parameters():
        trained = name.startswith(("csm.", "ccm.", "dense.", "prior."))
        assert p.requires_grad == trained
        assert not trained or p.grad.abs().sum() > 0, name


@torch.no_grad()
def test_the_prior_is_the_supports_mask_in_the_cells_most_alike():
    network = build(top_k=1, readout=False).eval()
    images, _ = supports(2)
    masks = torch.zeros(2, 64, 64, dtype=torch.long)
    masks[0, 16:48, 32:] = 1  # whole cells of 16 pixels
    masks[1, :16] = 1
    network.set_context(images, masks)
    network.prior.gate.zero_()
    network.prior.refine[-1].weight.zero_()
    for image, mask in zip(images, masks, strict=True):
        logit = network(image[None])[0, 1]
        centers = logit.unflatten(0, (4, 16)).unflatten(2, (4, 16))[:, 7:9, :, 7:9] > 0
        assert torch.equal(centers, (mask[8::16, 8::16] == 1)[:, None, :, None].expand_as(centers))


@torch.no_grad()
def test_dense_prompt_and_prior_can_be_left_out():
    x = torch.rand(1, 3, 64, 64)
    images, masks = supports(1)
    parts = {}
    for dense in (False, True):
        for prior in (False, True):
            network = build(dense=dense, prior=prior, readout=False).eval()
            network.set_context(images, masks)
            names = {name.partition(".")[0] for name, _ in network.named_parameters()}
            assert ("dense" in names, "prior" in names) == (dense, prior)
            parts[dense, prior] = network(x)
    assert not any(torch.allclose(parts[False, False], other) for key, other in parts.items() if any(key))


@torch.no_grad()
def test_the_readout_is_added_to_a_part_of_what_the_generator_says():
    images, masks = supports(3)
    x = torch.rand(1, 3, 64, 64)
    plain, network = build(readout=False).eval(), build().eval()
    for each in (plain, network):
        each.set_context(images, masks)
    fit = ReadoutFit()
    for image, mask in zip(images, masks, strict=True):
        fit.add(readout_levels(network.encoder, network.encode(image[None]).features), mask[None])
    said = read_out(readout_levels(network.encoder, network.encode(x).features), fit.solve()[None])
    said = F.interpolate(F.interpolate(said, (16, 16), mode="bilinear"), (64, 64), mode="bilinear")
    assert torch.allclose(network(x)[:, 1:], said + 0.25 * plain(x)[:, 1:], atol=1e-4)


@torch.no_grad()
def test_supports_of_any_size_are_brought_to_the_networks():
    network = build().eval()
    images, masks = supports(1, size=128)
    network.set_context([images[0], supports(1)[0][0]], [masks[0][None], supports(1)[1][0].float()])
    assert network.context_keys.shape == (2 * 16, 256)
    assert network(torch.rand(1, 3, 64, 64)).isfinite().all()


@torch.no_grad()
def test_many_supports_are_thinned_to_a_fixed_cost():
    network = build().eval()
    network.set_context(*supports(5), max_cells=30)
    assert network.context_keys.shape == (30, 256) and network.context_values.shape == (30, 257)
    first = network.context_keys.clone()
    network.set_context(*supports(5), max_cells=30)
    assert torch.equal(first, network.context_keys)
    # The reference is taken from what is kept: the supports themselves are as close as they are to each other.
    assert (network.similarity(supports(5)[0]) == 1).all()
    network.set_context(*supports(5), max_cells=2)
    assert network.context_values[:, -1].max() > 0  # one of the object at least
    assert network.context_reference.isfinite() and network(torch.rand(1, 3, 64, 64)).isfinite().all()


@torch.no_grad()
def test_similarity_is_calibrated_by_the_supports(network):
    images, masks = supports(4)
    network.set_context(images, masks)
    near = network.similarity(images)
    assert near.shape == (4,) and torch.equal(near, torch.ones(4))
    network.set_context(images[:1], masks[:1])
    assert network.similarity(images[:1]) == 1
    assert network.context_reference == pytest.approx(0.12)  # one cannot say how far apart images of its task are
    network.context_reference.fill_(1e-3)
    assert (network.similarity(torch.zeros(1, 3, 64, 64)) < FAR).all()
    one = 1 - (unit_cells(network.encoder(images[1:2]).embedding)[0] @ network.context_keys.T).amax(1).mean()
    assert torch.allclose(network.similarity(images[1:2]), 1e-3 / one)
    network.clear_context()


@torch.no_grad()
def test_a_moving_average_may_have_a_context_of_its_own():
    from ignite.engine import Engine

    from hspsam_monai.training import MovingAverage

    network = build().eval()
    average = MovingAverage(network, momentum=0.5)
    engine = Engine(lambda _engine, _batch: None)
    average.attach(engine)
    average.ema_model.set_context(*supports(2))
    engine.run([0, 1])
    assert not len(average.ema_model.context_keys)  # of weights that are no longer
    average.ema_model.set_context(*supports(2))
    network.set_context(*supports(2))
    x = torch.rand(1, 3, 64, 64)
    assert torch.allclose(average.ema_model.eval()(x), network(x), atol=1e-5)


# -- files


@torch.no_grad()
@pytest.mark.parametrize("half", [False, True])
def test_a_context_is_saved_with_the_network(tmp_path, half):
    network = build().eval()
    network.set_context(*supports(3))
    state = network.state_dict()
    if half:
        state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    path = write_state(tmp_path / "model.pt", {"model": state})
    x = torch.rand(1, 3, 64, 64)
    tolerance = 0.05 if half else 0
    torch.manual_seed(1)
    fresh = ProxyPrompt("mobile_sam", **SMALL).eval()
    load_checkpoint(fresh, path)
    assert fresh.context_keys.dtype == torch.float32
    assert torch.allclose(fresh(x), network(x), atol=tolerance, rtol=0)
    # A training that starts from it has another task, perhaps other classes.
    for classes in (2, 3):
        started = ProxyPrompt("mobile_sam", num_classes=classes, **SMALL)
        load_pretrained(started, path)
        assert not len(started.context_keys)
        assert torch.equal(started.csm.log_sharpness, fresh.csm.log_sharpness)
    plain = build().eval()
    plain.load_state_dict(state)
    assert torch.allclose(plain(x), network(x), atol=tolerance, rtol=0)
    plain.load_state_dict(build().state_dict())  # a file without context
    assert not len(plain.context_keys)
    assert torch.equal(copy.deepcopy(network)(x), network(x))


def test_a_network_built_in_inference_mode_checks_its_context_each_time():
    with torch.inference_mode():
        network = build().eval()
        network.set_context(*supports(2))
        assert network(torch.rand(1, 3, 64, 64)).isfinite().all()
        network.csm.patch.weight.mul_(1.5)  # leaves no version behind
        with pytest.raises(ConfigError, match="made by other weights"):
            network(torch.rand(1, 3, 64, 64))


@torch.no_grad()
def test_a_context_alone_is_switched_and_refused_by_other_weights(tmp_path):
    network = build().eval()
    network.set_context(*supports(2))
    x = torch.rand(1, 3, 64, 64)
    first = network(x)
    for name in ("task.pt", "task.safetensors"):
        path = network.save_context(tmp_path / name)
        network.set_context(*supports(3, seed=5))
        assert not torch.equal(network(x), first)
        network.load_context(path)
        assert torch.equal(network(x), first)
    other = build().eval()
    other.set_context(*supports(1))
    before = other(x)
    for part in (other.encoder.patch_embed.seq[0].c.weight, other.csm.patch.weight):
        kept = part.clone()
        part.mul_(1.5)
        with pytest.raises(WeightsError, match=r"task.pt was made by other weights .*mobile_sam.* set_context"):
            other.load_context(tmp_path / "task.pt")
        with pytest.raises(ConfigError, match="stored context was made by other weights"):
            other(x)
        part.copy_(kept)
    assert torch.equal(other(x), before)  # a refused context leaves the old one
    with pytest.raises(WeightsError, match=r"257 numbers for each support cell; expected .* \(2\): 514"):
        build(num_classes=3).load_context(tmp_path / "task.pt")
    write_state(tmp_path / "no.pt", {"a": torch.zeros(1)})
    with pytest.raises(WeightsError, match="lacks context_keys"):
        network.load_context(tmp_path / "no.pt")


@torch.no_grad()
def test_files_from_before_the_readout(tmp_path, caplog):
    network = build().eval()
    without = {name: value for name, value in network.state_dict().items() if name != "context_rules"}
    load_checkpoint(build(), write_state(tmp_path / "weights.pt", {"model": without}))
    plain = build(readout=False).eval()
    plain.set_context(*supports(2))
    path = plain.save_context(tmp_path / "context.pt")
    with pytest.raises(WeightsError, match=r"lacks context_rules; .* with the linear readout. Make the context again"):
        network.load_context(path)
    state = {name: value for name, value in plain.state_dict().items() if name != "context_rules"}
    older = build()
    load_checkpoint(older, write_state(tmp_path / "model.pt", {"model": state}))
    assert "made before ProxyPrompt had its linear readout" in caplog.text and not len(older.context_keys)
    other = {**network.state_dict(), **plain.state_dict(), "context_rules": torch.zeros(3, 865)}
    with pytest.raises(WeightsError, match=r"rules of shape \(3, 865\); expected \(1, 865\). Make"):
        build().load_state_dict(other)
    # A network without readout takes either, and says the same.
    x = torch.rand(1, 3, 64, 64)
    expected = plain(x)
    network.set_context(*supports(2))
    for source in (path, network.save_context(tmp_path / "rules.pt")):
        other = build(readout=False).eval()
        other.load_context(source)
        assert torch.equal(other(x), expected)


def test_checkpoints_of_every_network_are_told_from_sams_files(tmp_path):
    for network in (build(), SAMSP("mobile_sam", image_size=64)):
        path = write_state(tmp_path / "model.pt", {"model": network.state_dict()})
        report = load_pretrained(network, path)
        assert len(report.loaded) == len(network.state_dict())
    official = {f"image_encoder.{k}": v for k, v in network.encoder.state_dict().items() if "lora_" not in k}
    official |= network.sam.state_dict()
    report = load_pretrained(build(), write_state(tmp_path / "sam.pt", official))
    assert not report.missing and len(report.ignored) == len(network.sam.state_dict())


# -- refusals


def test_without_context_or_with_half_a_support(network):
    assert not any(getattr(network, name).numel() for name in CONTEXT)
    x = torch.rand(1, 3, 64, 64)
    with pytest.raises(ConfigError, match=r"call set_context\(images, masks\) once.*or pass support_images"):
        network(x)
    images, masks = supports(2)
    with pytest.raises(ConfigError, match="pass both or neither"):
        network(x, images[None])
    with pytest.raises(ConfigError, match=r"masks \(1, 2, 64, 32\)"):
        network(x, images[None], masks[None, ..., :32])
    with pytest.raises(ConfigError, match="for 2 images, and 1 images"):
        network(x, images.expand(2, -1, -1, -1, -1), masks.expand(2, -1, -1, -1))


def faulty(name):
    images, masks = supports(2)
    return {
        "none": (images[:0], masks[:0]),
        "numbers": (images, masks[:1]),
        "grey": (images[:, :1], masks),
        "size": (images, masks[..., :32]),
        "bytes": (images * 255, masks),
        "nan": (images * math.nan, masks),
        "labels": (images, masks * 7),
        "empty": (images, masks * torch.tensor([1, 0])[:, None, None]),
    }[name]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("none", ConfigError, "0 support images and 0 masks"),
        ("numbers", ConfigError, "2 support images and 1 masks"),
        ("grey", ConfigError, r"Support 1 .*\(1, 64, 64\).*three channels"),
        ("size", ConfigError, r"mask of \(64, 32\)"),
        ("bytes", DataError, r"expected \[0, 1\]. Divide"),
        ("nan", DataError, "Support image 1 has values"),
        ("labels", DataError, r"Support mask 1 has the values \[7\]; expected classes 0..1"),
        ("empty", DataError, "Support mask 2 shows no object"),
    ],
)
def test_faulty_supports_are_named(network, name, error, message):
    with pytest.raises(error, match=message):
        network.set_context(*faulty(name))
    assert not len(network.context_keys)


def test_rounding_of_resampled_white_is_no_fault():
    network, (images, masks) = build().eval(), supports(2)
    white = images.clone()
    white[0] = 1.0
    network.set_context(white, masks)
    expected = network.context_values
    white[0] += 2**-20  # what bilinear weights that do not sum to 1 exactly make of it
    assert white.max() > 1
    network.set_context(white, masks)
    assert torch.equal(network.context_values, expected)


def test_a_class_that_no_support_shows():
    with pytest.raises(DataError, match="No support shows class 2"):
        build(num_classes=3).set_context(*supports(2))


@pytest.mark.parametrize(
    "options", [{"num_classes": 1}, {"dropout": 1.0}, {"top_k": 0}, {"heads": 7}, {"mamba_depth": 0}]
)
def test_arguments_out_of_range(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        build(**options)


# -- the bundle's overlays


@pytest.mark.parametrize(("name", "kind"), [("proxy_prompt", ProxyPrompt), ("sam_sp", SAMSP)])
def test_overlays_build(bundle, name, kind):
    configs = bundle / "configs"
    parser = ConfigParser()
    parser.read_config([str(configs / "train.json"), str(configs / "network" / f"{name}.json")])
    parser["image_size"] = 64
    assert isinstance(parser.get_parsed_content("network_def"), kind)
    if name == "sam_sp":
        assert type(parser.get_parsed_content("train::loss")).__name__ == "SelfDistillation"
        *others, last = parser["train::handlers"]
        assert last["handler"] == "@train::loss"
        assert others == json.loads((configs / "train.json").read_text())["train"]["handlers"]
    else:
        assert parser["train::trainer"]["prepare_batch"].endswith("episode_batch")


def test_an_object_of_few_pixels_is_not_lost_between_samples():
    network = ProxyPrompt("mobile_sam", 64, mamba_depth=1, value_width=16).eval()
    mask = torch.zeros(1024, 1024, dtype=torch.bool)
    mask[500:506, 300:306] = True
    network.set_context([torch.rand(3, 1024, 1024)], [mask])
    share = network.context_values[:, -1].reshape(4, 4)
    assert share.argmax() == 1 * 4 + 1 and 0 < share.max() < 0.1  # cell (1, 1), in one or few of its 256 pixels
    with pytest.raises(ConfigError, match="max_cells is 1; expected 2 or more"):
        network.set_context([torch.rand(3, 64, 64)], [torch.ones(64, 64)], max_cells=1)


def test_a_repeated_support_changes_no_similarity(network):
    torch.manual_seed(0)
    image, mask, target = torch.rand(3, 64, 64), torch.ones(64, 64), torch.rand(1, 3, 64, 64)
    found = []
    for count in (1, 2, 3):
        network.set_context([image] * count, [mask] * count)
        found.append(float(network.similarity(target)))
    assert found[1] == pytest.approx(found[0], abs=1e-4) and found[2] == pytest.approx(found[0], abs=1e-4)
