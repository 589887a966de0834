"""Stored features: the same as computed ones, never stale, whole or not at all; and a preset that trains on them."""

import json
import logging
import os
import shutil
import subprocess
import sys

import pytest
import torch
from monai.data import Dataset
from monai.transforms import Compose, RandFlipd
from test_reproducible import assert_same_run

from hspsam_monai.data import SeededDataset
from hspsam_monai.errors import ConfigError, DataError, TrainingError
from hspsam_monai.inference import ImageInferer
from hspsam_monai.networks import HSPSAM, SAMSP, ConvPyramidSAM, ProxyPrompt
from hspsam_monai.networks.stored import encoded_of
from hspsam_monai.training import (
    EpisodeDataset,
    FeatureDataset,
    FillFeatures,
    StoredEpisodeDataset,
    episode_batch,
    feature_cache,
    stored_batch,
    stored_batch_with_truth,
)
from hspsam_monai.transforms import RandCamerad


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return HSPSAM("mobile_sam", 32, decoder="slim", adapt="frozen", inject=False)


@pytest.fixture(scope="module")
def cases():
    generator = torch.Generator().manual_seed(0)
    label = torch.zeros(1, 32, 32)
    label[:, 8:16, 8:16] = 1
    return [{"image": torch.rand(3, 32, 32, generator=generator), "label": label, "case": f"c{i}"} for i in range(3)]


def images(cases, seed=0, prob=0.5):
    transform = Compose([RandFlipd(["image", "label"], prob=prob, spatial_axis=0), RandCamerad(prob=0.8)])
    return SeededDataset(cases, transform, seed)


def features(cases, folder, views=2, dtype="float32", **options):
    return FeatureDataset(images(cases, **options), folder, views, dtype)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# -- the same features


def test_an_item_is_its_views_image_encoded(network, cases, tmp_path):
    stored, plain = features(cases, tmp_path), images(cases)
    assert network.train() and stored.fill(network) == 6 and network.training
    for epoch in (1, 2, 3):
        stored.set_epoch(epoch)
        plain.set_epoch(epoch % 2)
        for index in range(3):
            item, expected = stored[index], plain[index]
            with torch.no_grad():
                levels = network.eval().encode(torch.as_tensor(expected["image"])[None]).features.levels
            shown = [item["image"][f"level_{i}"].movedim(-1, 0) for i in range(len(levels))]
            assert all(torch.equal(own, level[0]) for own, level in zip(shown, levels, strict=True))
            assert torch.equal(item["label"], torch.as_tensor(expected["label"]))
            assert item["label"].dtype == torch.float32 and item["case"] == f"c{index}"
            assert item["size"].tolist() == [32, 32]


@pytest.mark.parametrize(("dtype", "error"), [("float16", 2**-11), ("bfloat16", 2**-8), ("float32", 0.0)])
def test_the_storage_error_is_that_of_the_type(network, cases, tmp_path, dtype, error):
    exact, stored = (features(cases[:1], tmp_path / kind, 1, kind) for kind in ("float32", dtype))
    for dataset in (exact, stored):
        dataset.fill(network)
    for name, value in exact[0]["image"].items():
        found = stored[0]["image"][name]
        assert found.dtype == getattr(torch, dtype)
        # Smaller numbers than the type's least normal one lose more than its relative error, and are next to nothing.
        assert ((found.float() - value).abs() <= error * value.abs() + 1e-7 * (error > 0)).all()


def test_features_of_another_network_let_none_through_whose_own_cannot_be_stored(cases, tmp_path):
    """Injected prompts leave no trace among the frozen weights: its files have the same names."""
    networks = [HSPSAM("mobile_sam", 32, decoder="slim", adapt="frozen", inject=inject) for inject in (False, True)]
    networks[1].encoder.load_state_dict(networks[0].encoder.state_dict())
    dataset = features(cases, tmp_path)
    dataset.fill(networks[0])
    again = features(cases, tmp_path)
    assert again.paths(networks[1]) == dataset.paths(networks[0])
    with pytest.raises(ConfigError, match="learned prompts join the encoder"):
        again.fill(networks[1].train())
    assert networks[1].training
    assert features(cases, tmp_path).fill(networks[0]) == 0


def test_values_beyond_the_type_are_refused(network, cases, tmp_path):
    dataset = features(cases, tmp_path, dtype="float16")
    large = ConvPyramidSAM("mobile_sam", 32, adapt="frozen")
    with torch.no_grad():
        large.encoder.layers[0].blocks[1].conv3.bn.bias.fill_(1e6)
    with pytest.raises(ConfigError, match=r"image/level_0 holds values up to .* float32"):
        dataset.fill(large)
    assert names(tmp_path) == []


def test_episodes_of_stored_features_say_what_those_of_images_say(cases, tmp_path):
    small = {"value_width": 24, "mamba_depth": 1, "mamba_state": 2, "ffn_width": 16}
    proxy = ProxyPrompt("mobile_sam", image_size=32, **small).eval()
    stored = FeatureDataset(images(cases), tmp_path, 2, "float32", keep=("image",))
    episodes = StoredEpisodeDataset(stored, seed=3, supports=(2, 2))
    assert episodes.fill(proxy) == 6
    for epoch in range(3):
        episodes.set_epoch(epoch)
        items = [episodes[i] for i in range(3)]
        views = [images(cases), images(cases)]
        views[1].set_epoch(1)
        for item in items:
            own = int(item["case"][1])
            target = views[epoch % 2][own]
            assert torch.equal(item["label"], torch.as_tensor(target["label"]))
            supports = item["support_cases"].split("\n")
            assert item["case"] not in supports and len(set(supports)) == 2
            for name, image, mask in zip(supports, item["support_images"], item["support_masks"], strict=True):
                shown = [view[int(name[1])] for view in views]
                assert any(torch.equal(image, one["image"]) and torch.equal(mask, one["label"][0]) for one in shown)
        batch = torch.utils.data.default_collate(items)
        target, label, (pixels, masks), options = episode_batch(batch, torch.device("cpu"))
        with torch.no_grad():
            found = proxy(encoded_of(target), pixels, masks, **options)
            image = torch.stack([views[epoch % 2][i]["image"] for i in range(3)])
            expected = proxy(image, pixels, masks)
        assert label.shape == (3, 1, 32, 32) and (found - expected).abs().max() < 1e-4 * expected.abs().max()
    again = StoredEpisodeDataset(stored, seed=3, supports=(2, 2))
    again.set_epoch(2)
    assert again[1]["support_cases"] == items[1]["support_cases"]
    assert len({StoredEpisodeDataset(stored, seed=s)[0]["support_cases"] for s in range(8)}) > 1


def test_stored_episodes_need_the_pixels(cases, tmp_path):
    with pytest.raises(ConfigError, match="with its pixels"):
        StoredEpisodeDataset(FeatureDataset(images(cases), tmp_path))


def test_files_of_episodes_depend_on_every_case_that_may_support(network, cases, tmp_path):
    transform = images(cases).transform
    others = [*cases[:2], {**cases[2], "image": cases[2]["image"] / 2}]
    before, after = (
        FeatureDataset(EpisodeDataset(some, transform), tmp_path, 1, "float32").paths(network)[0]
        for some in (cases, others)
    )
    assert not set(before) & set(after)


# -- kept, and never stale


def test_a_second_run_computes_nothing(network, cases, tmp_path, monkeypatch):
    features(cases, tmp_path).fill(network)
    before = names(tmp_path)
    monkeypatch.setattr(FeatureDataset, "_encode", None)
    copies = [dict(case) for case in cases]
    again = features(copies, tmp_path)
    assert again.fill(network) == 0 and names(tmp_path) == before and len(again) == 3


@pytest.mark.parametrize("what", ["weights", "image", "label", "transform", "seed", "dtype", "order"])
def test_whatever_changes_the_features_changes_the_files(network, cases, tmp_path, what):
    base = {p for paths in features(cases, tmp_path).paths(network) for p in paths}
    used, others, options = network, [dict(case) for case in cases[:1]], {}
    if what == "weights":
        used = HSPSAM("mobile_sam", 32, decoder="slim", adapt="frozen", inject=False)
        used.load_state_dict(network.state_dict())
        with torch.no_grad():
            used.encoder.layers[2].blocks[0].attn.proj.bias[0] += 1e-3
    elif what in ("image", "label"):
        others[0][what] = others[0][what].clone()
        others[0][what][0, 0, 0] += 0.5
    elif what == "order":
        others = cases[1:2]
    else:
        options = {"transform": {"prob": 0.6}, "seed": {"seed": 1}, "dtype": {"dtype": "float16"}}[what]
    changed = {p for paths in features(others, tmp_path, **options).paths(used) for p in paths}
    assert len(changed) == 2 and not changed & base


@pytest.mark.parametrize("package", ["hspsam_monai", "monai", "torch"])
def test_another_version_of_what_computes_them_has_files_of_its_own(network, cases, tmp_path, monkeypatch, package):
    (before,) = features(cases[:1], tmp_path, 1).paths(network)
    monkeypatch.setattr(f"{package}.__version__", "0.0.0")
    (after,) = features(cases[:1], tmp_path, 1).paths(network)
    assert not set(before) & set(after)


def test_more_views_keep_the_first_ones(network, cases, tmp_path):
    two, three = (features(cases, tmp_path, views).paths(network) for views in (2, 3))
    assert three[:2] == two and len({p for paths in three for p in paths}) == 9


def test_interrupted_filling_goes_on_where_it_stopped(network, cases, tmp_path, monkeypatch):
    straight = features(cases, tmp_path / "straight")
    straight.fill(network)
    broken, write, count = features(cases, tmp_path / "broken"), feature_cache.write_item, []

    def interrupt(*arguments):
        if len(count) == 4:
            raise KeyboardInterrupt
        count.append(arguments)
        return write(*arguments)

    monkeypatch.setattr(feature_cache, "write_item", interrupt)
    with pytest.raises(KeyboardInterrupt):
        broken.fill(network)
    assert len(names(tmp_path / "broken")) == 4
    with pytest.raises(ConfigError, match="FillFeatures"):
        broken[0]
    monkeypatch.setattr(feature_cache, "write_item", write)
    assert features(cases, tmp_path / "broken").fill(network) == 2
    for path in (tmp_path / "straight").iterdir():
        assert (tmp_path / "broken" / path.name).read_bytes() == path.read_bytes()


def test_processes_that_see_different_gaps_leave_none(network, cases, tmp_path, monkeypatch):
    """Another run that shares the folder may write between their looks."""
    shared = features(cases, tmp_path / "shared")
    files = [path for paths in shared.paths(network) for path in paths]
    features(cases, tmp_path / "alone").fill(network)
    monkeypatch.setattr(feature_cache.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(feature_cache.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(feature_cache.dist, "barrier", lambda: None)
    for rank in (0, 1):
        monkeypatch.setattr(feature_cache.dist, "get_rank", lambda rank=rank: rank)
        seen = features(cases, tmp_path / "shared")
        if rank:  # what is there now was not there when this process looked, but for another run's first file
            gaps = [(view, index) for view in range(2) for index in range(3)][1:]
            monkeypatch.setattr(seen, "_missing", lambda _, gaps=gaps: gaps)
        assert seen.fill(network) == 3
    assert all(path.is_file() for path in files)
    assert names(tmp_path / "shared") == names(tmp_path / "alone")


def test_damaged_files_are_made_anew(network, cases, tmp_path, caplog):
    features(cases, tmp_path).fill(network)
    whole = {path: path.read_bytes() for path in sorted(tmp_path.iterdir())}
    cut, flipped, empty, *_ = whole
    cut.write_bytes(whole[cut][:-100])
    flipped.write_bytes(whole[flipped][:-9] + bytes([whole[flipped][-9] ^ 1]) + whole[flipped][-8:])
    empty.write_bytes(b"")
    again = features(cases, tmp_path)
    assert again.fill(network) == 3
    assert {path: path.read_bytes() for path in sorted(tmp_path.iterdir())} == whole
    assert all(path.name in caplog.text for path in (cut, flipped, empty))
    cut.unlink()
    with pytest.raises(DataError, match=r"Go on with --resume"):
        [again[i] for again.view in (0, 1) for i in range(3)]


def test_too_little_room_is_told_before_it_is_used(network, cases, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(TrainingError, match=r"1 kB free, and the features need .*feature_views, now 2"):
        features(cases, tmp_path).fill(network)
    assert len(names(tmp_path)) == 1


def test_a_folder_that_cannot_be_written_is_named(network, cases, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="feature_cache=FOLDER"):
        features(cases, tmp_path / "file" / "features").fill(network)


def test_what_is_coming_is_told(network, cases, tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("hspsam_monai.training.feature_cache._EVERY", 0.0)
    features(cases, tmp_path).fill(network)
    assert "0 of 6 are there" in caplog.text and "Features 6/6" in caplog.text and "left" in caplog.text
    assert "Stored features looked through: 6/6" in caplog.text
    size = sum(path.stat().st_size for path in tmp_path.iterdir()) * 5 / 6
    assert f"They will take {size / 1e6:.0f} MB more" in caplog.text or f"{size / 1e3:.0f} kB more" in caplog.text


@pytest.mark.parametrize(("options", "message"), [({"views": 0}, "views is 0"), ({"dtype": "int8"}, "expected one of")])
def test_arguments_out_of_range_are_refused(cases, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        features(cases, tmp_path, **options)


def test_the_batch_says_at_which_size_to_answer(network, cases, tmp_path):
    dataset = FeatureDataset(Dataset([{**cases[0], "label": torch.ones(1, 50, 40)}]), tmp_path, 1)
    FillFeatures(network, [dataset])(None)
    item = dataset[0]
    batch = {
        "image": {name: value[None] for name, value in item["image"].items()},
        "label": item["label"][None],
        "size": item["size"][None],
    }
    inputs, label = stored_batch(batch, torch.device("cpu"))
    encoded = encoded_of(inputs)
    assert encoded.size == (32, 32) and encoded.original == (50, 40) and label.shape == (1, 1, 50, 40)
    assert {level.dtype for level in encoded.features.levels} == {torch.float32}
    for level in encoded.features.levels:  # no step of training has to turn them
        assert level.is_contiguous(memory_format=torch.channels_last)


def test_corrections_are_trained_on_stored_features(tmp_path, cases):
    """As SupervisedTrainer does it: the batch's keyword arguments go through the inferer to the network."""
    torch.manual_seed(0)
    network = SAMSP("mobile_sam", 32, adapt="frozen", corrections=2).train()
    dataset = FeatureDataset(Dataset(cases), tmp_path, 1)
    FillFeatures(network, [dataset])(None)
    batch = {
        "image": {name: value[None] for name, value in dataset[0]["image"].items()},
        **{key: dataset[0][key][None] for key in ("label", "size")},
    }
    inputs, label, args, kwargs = stored_batch_with_truth(batch, "cpu")
    assert torch.equal(label, cases[0]["label"][None]) and kwargs["truth"] is label
    assert len(ImageInferer()(inputs, network, *args, **kwargs).corrected) == 2
    with pytest.raises(ConfigError, match="stored_batch_with_truth"):
        ImageInferer()(inputs, network)


# -- the preset, through MONAI's workflow


FROZEN = "hsp_sam_frozen"


def test_the_first_epoch_equals_that_of_the_same_network_without_storing(train, bundle):
    """And so does the first validation, at original resolution: 64 x 80 pixels, from features of 64 x 64."""
    overlay = json.loads((bundle / "configs" / "network" / f"{FROZEN}.json").read_text())
    stored = train("stored", FROZEN, epochs=1, feature_dtype="float32").start()
    plain = train("plain", epochs=1, network_def=overlay["network_def"]).start()
    assert stored.losses == pytest.approx(plain.losses, abs=1e-6) and len(plain.losses) == 3
    curves = [(run.folder / "learning_curve.csv").read_text().splitlines() for run in (stored, plain)]
    (header, first), (_, second) = curves
    assert "val_mean_dice" in header
    assert [float(v) for v in first.split(",")] == pytest.approx([float(v) for v in second.split(",")], abs=1e-5)


@pytest.mark.slow
def test_half_precision_features_change_the_loss_by_little(train):
    exact, half = (train(kind, FROZEN, epochs=1, feature_dtype=kind).start() for kind in ("float32", "float16"))
    assert half.losses == pytest.approx(exact.losses, rel=1e-3) and half.losses != exact.losses


@pytest.mark.slow
def test_the_preset_resumes_exactly_from_the_same_files(train):
    """Five epochs of four views, broken in the second and the last; the files are made once for both runs."""
    straight = train("straight", FROZEN, epochs=5).start()
    shared = {"epochs": 5, "feature_cache": str(straight.folder / "features")}
    files = {path: path.stat().st_mtime_ns for path in (straight.folder / "features").iterdir()}
    assert len(files) == 6 * 4 + 2
    first = train("broken", FROZEN, **shared).start(stop_at=4)
    second = train("broken", FROZEN, resume=True, **shared).start(stop_at=13)
    third = train("broken", FROZEN, resume=True, **shared).start()
    assert first.losses == straight.losses[:4] and second.losses[:9] == straight.losses[3:12]
    assert third.losses == straight.losses[12:]
    assert_same_run(third.folder, straight.folder)
    assert {path: path.stat().st_mtime_ns for path in (straight.folder / "features").iterdir()} == files


@pytest.mark.slow
def test_resuming_without_weights_takes_those_of_the_run(train):
    """On resume the weight file may be gone; features must be those of the checkpoint, not of random values."""
    run = train("run", FROZEN, epochs=1, seed=1).start()
    before = sorted((run.folder / "features").iterdir())

    def disturb(resumed):
        torch.nn.init.normal_(next(resumed.get("network").encoder.parameters()))

    again = train("run", FROZEN, epochs=2, seed=1, resume=True).start(before=disturb)
    assert sorted((run.folder / "features").iterdir()) == before and len(again.losses) == 3


@pytest.mark.slow
def test_workers_do_not_matter_to_stored_features(train):
    alone = train("alone", FROZEN).start()
    helped = train("helped", FROZEN, num_workers=2).start()
    assert alone.losses == helped.losses
    assert_same_run(alone.folder, helped.folder)
    first, second = ({p.name: p.read_bytes() for p in (r.folder / "features").iterdir()} for r in (alone, helped))
    assert first == second


@pytest.mark.slow
def test_two_processes_share_the_work(bundle, phantoms, tmp_path):
    config = [str(bundle / "configs" / f"{n}.json") for n in ("train", f"network/{FROZEN}", "multi_gpu_train")]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m",
         "monai.bundle", "run", "--config_file", str(config), "--dataset_dir", str(phantoms), "--output_dir",
         str(tmp_path / "run"), "--pretrained", "", "--image_size", "64", "--batch_size", "1", "--epochs", "1",
         "--precision", "float32"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((tmp_path / "run" / "features").iterdir())) == 6 * 4 + 2
    assert (tmp_path / "run" / "model.pt").is_file()
