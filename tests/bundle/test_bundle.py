"""The bundle as MONAI's own tools see it."""

import csv
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow, verify_metadata, verify_net_in_out
from monai.transforms import SaveImaged

from hspsam_monai.data import find_cases, read_mask, write_phantoms
from tests.bundle.conftest import configs

TASKS = ("polyp", "skin", "breast_ultrasound", "retinal_vessels")
NETWORKS = ("hsp_sam", "hsp_sam_mobile", "hsp_sam_lora", "hsp_sam_frozen", "conv_pyramid", "sam_sp", "sam_decoder")
SUPPORT = ("inference", "network/proxy_prompt", "support")


@pytest.mark.data
def test_metadata_follows_the_schema(bundle, shared, tmp_path):
    verify_metadata(
        meta_file=str(bundle / "configs" / "metadata.json"),
        filepath=str(shared / "reference" / "meta_schema_20240725.json"),
    )


def test_metadata_agrees_with_configuration_and_package(bundle):
    import hspsam_monai

    meta = json.loads((bundle / "configs" / "metadata.json").read_text())
    inference = json.loads((bundle / "configs" / "inference.json").read_text())
    image = meta["network_data_format"]["inputs"]["image"]
    pred = meta["network_data_format"]["outputs"]["pred"]
    assert image["spatial_shape"] == [inference["image_size"]] * 2
    assert pred["num_channels"] == len(inference["labels"])
    assert {int(k): v for k, v in pred["channel_def"].items()} == {v: k for k, v in inference["labels"].items()}
    assert meta["version"] == hspsam_monai.__version__ and meta["version"] in meta["changelog"]
    versions = {"monai": meta["monai_version"], "torch": meta["pytorch_version"], "numpy": meta["numpy_version"]}
    versions |= meta["required_packages_version"]
    pins = {line.partition(" ;")[0] for line in (bundle.parent / "constraints.txt").read_text().splitlines()}
    # Where Python's version decides between two pins, either will do.
    assert {f"{name}=={version}" for name, version in versions.items()} <= pins


def test_network_in_and_out(bundle):
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(bundle / "configs" / "metadata.json"),
        config_file=str(bundle / "configs" / "inference.json"),
        device="cpu",
    )


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (("train",), "train"),
        (("train", "evaluate"), "train"),
        (("inference",), "infer"),
        (("inference", "sam_sp"), "infer"),
        (SUPPORT, "infer"),
    ],
    ids=["train", "evaluate", "inference", "sam_sp", "support"],
)
def test_no_property_is_missing_or_wrongly_wired(bundle, names, kind, phantoms):
    override = {"dataset_dir": str(phantoms), "initialize": []}  # nothing is loaded to ask for properties
    if names == SUPPORT:
        override |= {"support_dir": str(phantoms), "image_size": 64, "labels": {"background": 0, "object": 1}}
    workflow = ConfigWorkflow(configs(bundle, *names), workflow_type=kind, **override)
    workflow.initialize()
    assert workflow.check_properties() == []


def test_post_processing_is_built_alone(bundle, monkeypatch, tmp_path):
    """As MONAI Label asks for it, wherever its server runs and without any data set."""
    monkeypatch.chdir(tmp_path)
    parser = ConfigParser()
    parser.read_config(configs(bundle, "inference"))
    found = parser.get_parsed_content("postprocessing", instantiate=True)
    assert [isinstance(step, SaveImaged) for step in found.transforms] == [False, False, True]


def test_a_copy_run_from_its_own_folder_keeps_its_model(bundle, monkeypatch, tmp_path):
    shutil.copytree(bundle / "configs", tmp_path / "copy" / "configs")
    monkeypatch.chdir(tmp_path / "copy" / "configs")
    for name in ("inference.json", "../configs/inference.json", str(tmp_path / "copy" / "configs" / "inference.json")):
        workflow = ConfigWorkflow(name, workflow_type="inference", logging_file=False, initialize=[], run=["$@model"])
        workflow.initialize()
        assert Path(workflow.run()[0]).resolve() == (tmp_path / "copy" / "models" / "model.pt").resolve()


def test_every_network_builds_without_file_or_network_access(bundle):
    """In a process of its own, since an audit hook stays; it sees native readers as well as Python's."""
    names = sorted(path.stem for path in (bundle / "configs" / "network").glob("*.json"))
    assert set(NETWORKS) <= set(names)
    code = (
        "import sys, torch\n"
        "from monai.bundle import ConfigParser\n"
        "import hspsam_monai.networks, hspsam_monai.encoders.tiny_vit, safetensors, safetensors.torch\n"
        "def refuse(*a, **k): raise AssertionError('a constructor must not read weights')\n"
        "torch.load = safetensors.safe_open = safetensors.torch.load_file = safetensors.torch.safe_open = refuse\n"
        "watched = []\n"
        "def hook(event, args):\n"
        "    python = event == 'open' and str(args[0]).endswith(('.py', '.pyc'))\n"
        "    if watched and event in ('open', 'socket.connect', 'socket.getaddrinfo') and not python:\n"
        "        raise AssertionError(f'a constructor must not open files or sockets: {event} {args[0]}')\n"
        "sys.addaudithook(hook)\n"
        "root, *names = sys.argv[1:]\n"
        "for name in names:\n"
        "    parser = ConfigParser()\n"
        "    parser.read_config([f'{root}/configs/train.json', f'{root}/configs/network/{name}.json'])\n"
        "    parser['image_size'] = 64\n"
        "    parser.parse()\n"
        "    if name == 'hsp_sam_large': parser['network_def']['encoder'] = 'sam_vit_b'\n"
        "    watched.append(name)\n"
        "    network = parser.get_parsed_content('network_def').eval()\n"
        "    watched.clear()\n"
        "    if name != 'proxy_prompt':  # needs supports\n"
        "        with torch.no_grad():\n"
        "            assert network(torch.rand(1, 3, 64, 64)).shape == (1, 2, 64, 64), name\n"
        "    print(name)\n"
    )
    command = [sys.executable, "-c", code, str(bundle), *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == names


@pytest.mark.parametrize("task", TASKS)
def test_a_task_is_an_overlay_of_known_keys(bundle, task):
    base = json.loads((bundle / "configs" / "train.json").read_text())
    overlay = json.loads((bundle / "configs" / "task" / f"{task}.json").read_text())
    assert set(overlay) <= set(base)
    assert overlay["labels"]["background"] == 0 and overlay["image_size"] % 32 == 0
    assert set(overlay.get("augmentation", {})) <= set(base["augmentation"])


@pytest.mark.parametrize("network", NETWORKS)
def test_a_networks_recipe_starts(bundle, network, phantoms, tmp_path):
    """Everything around the network that an overlay changes can be built: averaging, optimiser, schedule, loss."""
    override = {"dataset_dir": str(phantoms), "output_dir": str(tmp_path), "initialize": [], "image_size": 64}
    workflow = ConfigWorkflow(configs(bundle, "train", f"network/{network}"), workflow_type="train", **override)
    workflow.initialize()
    for part in ("ema_handler", "scheduler", "train::loss"):
        assert workflow.parser.get_parsed_content(part) is not None


def test_one_proxy_prompt_is_trained_on_many_tasks(bundle, tmp_path):
    from hspsam_monai.encoders.state_files import read_state

    for seed, task in enumerate(("polyp", "blob")):
        write_phantoms(tmp_path / "data" / task, 6, seed=seed, size=(64, 64), empty_fraction=0, val_fraction=0.34)
    small = {"value_width": 24, "mamba_depth": 1, "mamba_state": 2, "ffn_width": 16}
    options = {f"network_def::{key}": value for key, value in small.items()}
    options |= {"image_size": 64, "epochs": 2, "draws": 6, "batch_size": 3, "validation_supports": 1}
    options |= {"dataset_dir": str(tmp_path / "data"), "output_dir": str(tmp_path / "run"), "pretrained": None}
    files = configs(bundle, "train", "network/proxy_prompt", "task/many")
    workflow = ConfigWorkflow(files, workflow_type="train", **options)
    workflow.initialize()
    workflow.run()
    episodes = workflow.parser.get_parsed_content("train::dataset")
    for index in range(len(episodes)):
        item = episodes[index]
        task = item["case"].split("/")[0]
        assert all(name.split("/")[0] == task != item["case"] for name in item["support_cases"].split("\n"))
    assert len(list((tmp_path / "run" / "features").iterdir())) == 2 * 8 + 4
    state = read_state(tmp_path / "run" / "model.pt")
    assert not len(state["context_keys"])  # a context of mixed tasks would say nothing
    with (tmp_path / "run" / "learning_curve.csv").open() as file:
        assert [bool(row["val_mean_dice"]) for row in csv.DictReader(file)] == [True, True]


def test_large_encoders_are_trained_with_checkpointing(bundle, monkeypatch):
    """The overlay's arguments, on an encoder of ViT-L's kind that fits a test."""
    from hspsam_monai.encoders import sam_vit

    monkeypatch.setitem(sam_vit.VARIANTS, "l", sam_vit.Variant(48, 6, 3, (1, 2, 4, 5)))
    parser = ConfigParser()
    parser.read_config(configs(bundle, "train", "network/hsp_sam_large"))
    parser["image_size"] = 64
    parser.parse()
    network = parser.get_parsed_content("network_def")
    assert network.encoder.variant == "l" and network.encoder.checkpointing


def test_training_leaves_everything_needed_to_repeat_it(trained):
    for name in ("model.pt", "last.pt", "learning_curve.csv", "config.json", "network.json", "environment.json"):
        assert (trained / name).is_file(), name
    splits = json.loads((trained / "splits.json").read_text())
    assert len(splits["train"]) == 4 and len(splits["val"]) == 2
    config = json.loads((trained / "config.json").read_text())
    assert config["seed"] == 0 and config["image_size"] == 64
    state = torch.load(trained / "model.pt", weights_only=True)
    assert set(state) == {"model"}


def test_evaluate_and_inference_agree_and_survive_a_bad_file(bundle, phantoms, trained, tmp_path):
    overlay = str(trained / "network.json")
    model = str(trained / "model.pt")
    evaluate = ConfigWorkflow(
        [*configs(bundle, "train", "task/polyp"), overlay, *configs(bundle, "evaluate")], workflow_type="train",
        dataset_dir=str(phantoms), model=model, output_dir=str(tmp_path / "evaluation"),
    )  # fmt: skip
    evaluate.initialize()
    evaluate.run()
    summary = json.loads((tmp_path / "evaluation" / "summary.json").read_text())
    assert summary["n"] == 2
    page = (tmp_path / "evaluation" / "gallery.html").read_text()
    assert "<html" in page and (tmp_path / "evaluation" / "gallery.png").is_file()

    images = tmp_path / "images"
    images.mkdir()
    for case in find_cases(phantoms, "val"):
        source = Path(case["image"])
        (images / source.name).write_bytes(source.read_bytes())
    (images / "broken.jpg").write_bytes(source.read_bytes()[:300])
    inference = ConfigWorkflow(
        [*configs(bundle, "inference"), overlay], workflow_type="infer", dataset_dir=str(images), model=model,
        output_dir=str(tmp_path / "masks"),
    )  # fmt: skip
    inference.initialize()
    with pytest.raises(RuntimeError) as caught:
        inference.run()
    assert "broken" in str(caught.value.__cause__) and "1 of 3 files failed" in str(caught.value.__cause__)
    assert not (tmp_path / "masks" / "broken.png").exists()
    rows = (tmp_path / "evaluation" / "cases.csv").read_text().splitlines()
    pixels = {line.split(",")[0]: int(line.split(",")[7]) for line in rows[1:]}
    for case, count in pixels.items():
        mask = read_mask(tmp_path / "masks" / f"{case}.png", 2)
        assert int((mask == 1).sum()) == count  # both faces, the same mask


@pytest.mark.parametrize("overlays", [("network/hsp_sam_frozen",), ("network/sam_decoder", "task/few_shot")])
def test_evaluation_reads_the_images_themselves_whatever_the_training_validated_on(
    bundle, phantoms, tmp_path, overlays
):
    """Overlays whose training validates on stored features or episodes are scored on the images, mirrored too."""
    values = {"dataset_dir": str(phantoms), "output_dir": str(tmp_path), "image_size": 64, "model": "none"}
    workflow = ConfigWorkflow(configs(bundle, "train", *overlays, "evaluate"), workflow_type="train", **values)
    workflow.parser["initialize"] = ["$hspsam_monai.training.write_record(@output_dir)"]
    workflow.initialize()
    workflow.run()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["n"] == 2 and summary["meta"]["flips"] is True


def test_evaluation_looks_as_inference_does(bundle, tmp_path):
    """At the sizes of tests most scales round to one, so masks alone would not show it."""
    found = {}
    for kind, names, key in (("train", ("train", "task/polyp", "evaluate"), "validate::inferer"),
                             ("infer", ("inference", "task/polyp"), "inferer")):  # fmt: skip
        parser = ConfigParser()
        parser.read_config(configs(bundle, *names))
        found[kind] = vars(parser.get_parsed_content(key))
    keys = ("image_size", "flips", "scales", "precision")
    assert {key: found["train"][key] for key in keys} == {key: found["infer"][key] for key in keys}
    assert found["train"]["flips"] is True and len(set(found["train"]["scales"])) > 1
    for names in (("inference", "network/proxy_prompt", "support"), ("train", "network/proxy_prompt", "evaluate")):
        parser = ConfigParser()
        parser.read_config(configs(bundle, *names))
        # In a mirror image examples of a left organ show the right one.
        assert parser.get_parsed_content("flips") is False


def test_doubtful_components_are_dropped_by_evaluate_and_inference(bundle, phantoms, trained, tmp_path):
    overlay, model = str(trained / "network.json"), str(trained / "model.pt")
    assert json.loads(Path(overlay).read_text())["min_confidence"] == 0.65  # the polyp task's
    files = {
        "train": [*configs(bundle, "train", "task/polyp"), overlay, *configs(bundle, "evaluate")],
        "infer": [*configs(bundle, "inference"), overlay],
    }
    data = {"train": str(phantoms), "infer": str(phantoms / "images")}
    found = {}
    for kind, bar in itertools.product(files, (0.0, 0.999)):
        output = tmp_path / f"{kind}-{bar}"
        workflow = ConfigWorkflow(
            files[kind], workflow_type=kind, dataset_dir=data[kind], model=model, output_dir=str(output),
            min_confidence=bar, flips=False,
        )  # fmt: skip
        workflow.initialize()
        workflow.run()
        with (output / "cases.csv").open(newline="") as file:
            found[kind, bar] = {row["case"]: int(row["pred_pixels"]) for row in csv.DictReader(file)}
    assert any(found["train", 0.0].values()), "the network of this test must find something for a bar to take away"
    assert found["train", 0.0].items() <= found["infer", 0.0].items()
    assert not any(found["train", 0.999].values()) and not any(found["infer", 0.999].values())


def test_supports_prompt_through_the_bundle(bundle, tmp_path):
    from hspsam_monai.encoders.state_files import write_state

    supports = write_phantoms(tmp_path / "few", 2, seed=1, size=(80, 64), empty_fraction=0)
    override = {"support_dir": str(supports), "dataset_dir": str(supports / "images"), "image_size": 64}
    override |= {"model": str(tmp_path / "proxy.safetensors"), "output_dir": str(tmp_path / "out"), "flips": False}
    workflow = ConfigWorkflow(configs(bundle, *SUPPORT), workflow_type="infer", **override)
    network = workflow.parser.get_parsed_content("network_def")
    assert workflow.parser.get_parsed_content("labels") == {"background": 0, "object": 1}
    write_state(override["model"], network.state_dict())
    workflow.initialize()
    assert len(workflow.parser.get_parsed_content("network_def").context_keys) == 2 * 16
    workflow.run()
    rows = (tmp_path / "out" / "cases.csv").read_text().splitlines()
    assert rows[0].endswith(",similarity") and [row.split(",")[-1] for row in rows[1:]] == ["1.0", "1.0"]
    assert read_mask(tmp_path / "out" / "phantom_0000.png", 2).shape == (80, 64)


@pytest.mark.slow
def test_runs_from_another_folder_with_a_plain_command(bundle, phantoms, trained, tmp_path):
    config = [*configs(bundle, "inference"), str(trained / "network.json")]
    done = subprocess.run(
        [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(config), "--dataset_dir",
         str(phantoms / "images"), "--output_dir", "out", "--model", str(trained / "model.pt")],
        cwd=tmp_path, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list((tmp_path / "out").glob("*.png"))) == 6


@pytest.mark.slow
def test_two_processes_train_together(bundle, phantoms, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(phantoms, data)
    names = sorted(path.stem for path in (data / "images").iterdir())
    # Fewer validation cases than processes: each validates them all.
    (data / "splits.json").write_text(json.dumps({"train": names[:-1], "val": names[-1:]}))
    config = configs(bundle, "train", "multi_gpu_train")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m",
         "monai.bundle", "run", "--config_file", str(config), "--dataset_dir", str(data), "--output_dir",
         str(tmp_path / "run"), "--pretrained", "", "--image_size", "64", "--batch_size", "1", "--epochs", "1",
         "--precision", "float32"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 2  # training and validation, of one process
    curve = (tmp_path / "run" / "learning_curve.csv").read_text().splitlines()
    assert len(curve) == 2 and np.isfinite(float(curve[1].split(",")[1]))
    last = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert last["iteration"] == math.ceil((len(names) - 1) / 2)  # each process draws its share of the cases
    assert (tmp_path / "run" / "model.pt").is_file()


def test_the_shipped_model_loads_and_fits_its_configuration(bundle):
    from hspsam_monai.networks import load_checkpoint

    model = bundle / "models" / "model.pt"
    assert model.stat().st_size <= 30_000_000
    parser = ConfigParser()
    parser.read_config(configs(bundle, "inference"))
    network = parser.get_parsed_content("network_def")
    report = load_checkpoint(network, model)
    assert not report.missing and not report.unexpected


def test_the_shipped_model_outlines_polyps(bundle, tmp_path):
    data = write_phantoms(tmp_path / "data", 8, empty_fraction=0)
    workflow = ConfigWorkflow(
        configs(bundle, "inference"), workflow_type="infer", dataset_dir=str(data / "images"),
        output_dir=str(tmp_path / "masks"), flips=False,
    )  # fmt: skip
    workflow.initialize()
    workflow.run()
    workflow.finalize()
    dice = []
    for case in find_cases(data):
        truth = read_mask(case["label"], 2) > 0
        found = read_mask(tmp_path / "masks" / f"{case['case']}.png", 2) > 0
        dice.append(2 * (found & truth).sum() / (found.sum() + truth.sum()))
    assert np.mean(dice) > 0.8, dice  # each about 0.95, now and then one is missed


@torch.no_grad()
def test_the_shipped_sam_sp_outlines_polyps_and_follows_clicks(bundle, tmp_path):
    from hspsam_monai.data import read_image
    from hspsam_monai.networks import load_checkpoint
    from hspsam_monai.networks.user_prompts import user_prompts

    parser = ConfigParser()
    parser.read_config(configs(bundle, "inference", "sam_sp"))
    parser["flips"] = False
    model = Path(parser.get_parsed_content("model"))
    assert model.stat().st_size <= 30_000_000
    network, inferer = parser.get_parsed_content("network").eval(), parser.get_parsed_content("inferer")
    report = load_checkpoint(network, model)
    assert not report.missing and not report.unexpected

    def dice(found, truth):
        return 2 * (found & truth).sum() / (found.sum() + truth.sum())

    automatic, erased, restored = [], [], []
    for case in find_cases(write_phantoms(tmp_path / "data", 8, empty_fraction=0)):
        truth = read_mask(case["label"], 2) > 0
        image = torch.from_numpy(read_image(case["image"])).permute(2, 0, 1)[None]
        found = inferer(image, network).argmax(1)[0].bool().numpy()
        automatic.append(dice(found, truth))
        y, x = (int(axis.mean().round()) for axis in np.nonzero(truth))
        for label, values in ((0, erased), (1, restored)):
            marks = user_prompts(1, clicks=[(1, x, y, label)])
            values.append(dice(inferer(image, network, prompts=marks).argmax(1)[0].bool().numpy(), truth))
    assert np.mean(automatic) > 0.8, automatic
    # A click on the object finds a missed one and keeps the others; one that takes a right mask back counts as well.
    missed = [after for before, after in zip(automatic, restored, strict=True) if before < 0.1]
    assert missed and min(missed) > 0.3 and np.mean(restored) > np.mean(automatic) + 0.02, (automatic, restored)
    assert min(np.subtract(restored, automatic)) > -0.02, (automatic, restored)
    assert np.mean(erased) < np.mean(automatic) - 0.1, (automatic, erased)


def test_the_shipped_proxy_prompt_outlines_what_examples_show(bundle, tmp_path):
    model = bundle / "models" / "proxy_prompt.safetensors"
    assert model.stat().st_size <= 30_000_000
    supports = write_phantoms(tmp_path / "supports", 4, seed=1, empty_fraction=0)
    targets = write_phantoms(tmp_path / "targets", 6, seed=2, empty_fraction=0)
    workflow = ConfigWorkflow(
        configs(bundle, *SUPPORT), workflow_type="infer", support_dir=str(supports),
        dataset_dir=str(targets / "images"), output_dir=str(tmp_path / "masks"), flips=False,
    )  # fmt: skip
    workflow.initialize()
    workflow.run()
    workflow.finalize()
    shown = np.mean([read_mask(case["label"], 2) for case in find_cases(supports)], axis=0) > 0.5
    own, copied = [], []
    for case in find_cases(targets):
        truth = read_mask(case["label"], 2) > 0
        found = read_mask(tmp_path / "masks" / f"{case['case']}.png", 2) > 0
        own.append(2 * (found & truth).sum() / (found.sum() + truth.sum()))
        copied.append(2 * (shown & truth).sum() / (shown.sum() + truth.sum()))
    assert np.mean(own) > max(0.5, np.mean(copied) + 0.2), (own, copied)


# export by MONAI's own verbs, with the commands of docs/README.md


def verb(bundle: Path, name: str, target: Path, *further: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "monai.bundle", name, "--net_id", "network_def", "--key_in_ckpt", "model", "--filepath",
         str(target), "--ckpt_file", str(bundle / "models" / "model.pt"), "--meta_file",
         str(bundle / "configs" / "metadata.json"), "--config_file", *configs(bundle, "inference"), *further],
        cwd=target.parent, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def shipped(bundle: Path, size: int) -> torch.nn.Module:
    from hspsam_monai.networks import load_checkpoint

    parser = ConfigParser()
    parser.read_config(configs(bundle, "inference"))
    parser["image_size"] = size
    network = parser.get_parsed_content("network_def")
    load_checkpoint(network, bundle / "models" / "model.pt")
    return network.eval()


@pytest.mark.slow
@torch.no_grad()
def test_monais_onnx_export(bundle, tmp_path):
    from hspsam_monai.inference.export import session

    names = '{"input_names": ["image"], "output_names": ["pred"], "dynamic_axes": {"image": {0: "batch"}}}'
    verb(bundle, "onnx_export", tmp_path / "model.onnx", "--input_shape", "[2, 3, 64, 64]", "--image_size", "64",
         "--converter_kwargs", names)  # fmt: skip
    run, network = session(tmp_path / "model.onnx"), shipped(bundle, 64)
    for batch in (1, 3):
        image = torch.rand(batch, 3, 64, 64)
        found = run.run(["pred"], {"image": image.numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(found), network(image), rtol=0, atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_monais_ckpt_export_by_tracing(bundle, tmp_path):
    verb(bundle, "ckpt_export", tmp_path / "model.ts", "--use_trace", "True")
    extra = {"metadata.json": "", "inference.json": ""}
    traced, network = torch.jit.load(str(tmp_path / "model.ts"), _extra_files=extra), shipped(bundle, 320)
    for batch in (1, 3):
        image = torch.rand(batch, 3, 320, 320)
        torch.testing.assert_close(traced(image), network(image), rtol=0, atol=1e-5)
    assert json.loads(extra["inference.json"])["image_size"] == 320
    assert json.loads(extra["metadata.json"])["network_data_format"]["outputs"]["pred"]["num_channels"] == 2
