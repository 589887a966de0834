"""The same seed gives the same run to the last bit, also when it was interrupted."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.training.conftest import root


def same(a, b):
    """Equal to the last bit, through dictionaries and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def state(folder, name="last.pt"):
    return torch.load(folder / name, weights_only=True)


def assert_same_run(a, b):
    first, second = state(a), state(b)
    assert first.keys() == second.keys()
    for key in first:
        assert same(first[key], second[key]), key
    assert same(state(a, "model.pt"), state(b, "model.pt"))
    assert (a / "learning_curve.csv").read_bytes() == (b / "learning_curve.csv").read_bytes()


def test_same_seed_same_run_and_another_seed_another(train):
    torch.manual_seed(1)
    first = train("first", epochs=2).start()
    torch.manual_seed(2)  # what happened before must not matter
    second = train("second", epochs=2).start()
    assert first.losses == second.losses and len(first.losses) == 6
    assert_same_run(first.folder, second.folder)
    other = train("other", epochs=1, seed=1).start()
    assert not set(other.losses) & set(first.losses)


def test_another_run_keeps_its_record(train):
    def record():  # but for the log, which in one process is still the first run's
        return {path.name: path.read_bytes() for path in run.folder.iterdir() if path.suffix not in ("", ".txt")}

    run = train("first", epochs=1).start()
    before = record()
    with pytest.raises(RuntimeError) as caught:
        train("first", epochs=1, image_size=96).workflow.initialize()
    assert "earlier run" in str(root(caught.value)) and "config.json" in before
    assert before == record()


def test_the_last_epoch_is_validated_whatever_the_interval(train):
    run = train("run", epochs=3, val_interval=2, keep="last", precision="float32").start()
    last, model = state(run.folder), state(run.folder, "model.pt")["model"]
    assert all(torch.equal(model[key], value.half() if value.is_floating_point() else value)
               for key, value in last["best_network"].items())  # fmt: skip
    assert [row.get("val_mean_dice") is not None for row in last["curve"]] == [False, True, True]
    assert (train("short", epochs=1, val_interval=5).start().folder / "model.pt").is_file()


def test_a_few_masks_are_trained_on_from_weights_of_the_seed(train, bundle):
    """The task asks for the network before the run starts; its first weights are of the seed nevertheless."""
    few = {"task": "few_shot", "train_cases": 3, "draws": 2, "epochs": 1}
    weights = []
    for before, seed in ((1, 0), (2, 0), (2, 1)):
        torch.manual_seed(before)
        run = train(f"{before}-{seed}", seed=seed, **few)
        run.workflow.initialize()
        weights.append(run.get("network").state_dict())
    assert same(weights[0], weights[1]) and not same(weights[1], weights[2])


def test_interrupted_twice_and_resumed_equals_uninterrupted(train):
    """Three iterations an epoch: crashes inside epochs 2 and 3, while the average's momentum still falls."""
    straight = train("straight", epochs=3).start()
    first = train("broken", epochs=3).start(stop_at=4)
    second = train("broken", epochs=3, resume=True).start(stop_at=8)
    third = train("broken", epochs=3, resume=True).start()
    assert (first.losses[:3], second.losses[:4]) == (straight.losses[:3], straight.losses[3:7])
    assert third.losses == straight.losses[6:]
    assert_same_run(third.folder, straight.folder)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 4])
def test_workers_do_not_matter(train, workers):
    alone, helped = train("alone").start(), train("helped", num_workers=workers).start()
    assert alone.losses == helped.losses
    assert_same_run(alone.folder, helped.folder)


@pytest.mark.slow
def test_accumulating_runs_resume_as_well(train):
    options = {"epochs": 4, "accumulation_steps": 2}
    straight = train("straight", **options).start()
    train("broken", **options).start(stop_at=8)
    assert_same_run(train("broken", resume=True, **options).start().folder, straight.folder)


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(bundle, phantoms, tmp_path):
    """SIGKILL from outside at five moments of one run, started as MONAI's users start it."""

    def start(folder, resume):
        options = {
            "dataset_dir": phantoms,
            "output_dir": folder,
            "pretrained": "''",
            "image_size": 64,
            "batch_size": 2,
            "epochs": 5,
            "warmup": 50,
            "precision": "float32",
            "device": "$torch.device('cpu')",
            "resume": resume,
        }
        words = [text for key, value in options.items() for text in (f"--{key}", str(value))]
        command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", bundle / "configs" / "train.json"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [*command, *words], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def epochs_done(folder):
        curve = folder / "learning_curve.csv"  # written after last.pt, and cheap to look at
        return len(curve.read_text().splitlines()) - 1 if curve.exists() else 0

    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert start(straight, False).wait() == 0
    kills = 0
    for epoch in range(1, 6):
        process = start(broken, (broken / "last.pt").exists())
        while process.poll() is None:
            if kills < 4 and epochs_done(broken) >= epoch:
                time.sleep(0.1 * epoch)  # somewhere else in the next epoch each time
                os.kill(process.pid, signal.SIGKILL)
                kills += process.wait() == -signal.SIGKILL
            time.sleep(0.05)
        if process.returncode == 0:
            break
    assert process.returncode == 0 and kills >= 1
    assert_same_run(straight, broken)
