"""Handlers on MONAI's real trainer with a network of one layer."""

import logging

import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader
from monai.engines import SupervisedTrainer
from torch import nn

from hspsam_monai.data import SeededDataset, SeededSampler
from hspsam_monai.errors import TrainingError
from hspsam_monai.training import EpochSeeds, FiniteGuard, Progress, log_file
from hspsam_monai.training.handlers import clock


def cases(count=4):
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "image": torch.rand(1, 4, 4, generator=generator),
            "label": torch.rand(1, 4, 4, generator=generator),
            "case": f"case_{i}",
        }
        for i in range(count)
    ]


def trainer(data, handlers=(), network=None, batch=1, epochs=1, lr=0.1, loss=None, sampler=None, **options):
    network = network or nn.Conv2d(1, 1, 3, padding=1)
    return SupervisedTrainer(
        device="cpu",
        max_epochs=epochs,
        train_data_loader=DataLoader(data, batch_size=batch, sampler=sampler),
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=lr),
        loss_function=loss or nn.MSELoss(),
        train_handlers=list(handlers),
        decollate=False,
        **options,
    )


# -- finite guard


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["image", "label"])
def test_a_loss_that_is_not_finite_stops_with_the_cases(value, key):
    data = cases()
    data[2][key][0, 1, 1] = value
    network = nn.Conv2d(1, 1, 3, padding=1)
    weights = []
    engine = trainer(data, [FiniteGuard(network)], network)
    engine.add_event_handler(
        Events.ITERATION_STARTED(event_filter=lambda _, i: i == 3), lambda _: weights.append(network.weight.clone())
    )
    with pytest.raises(TrainingError, match=r"loss became (nan|inf) at epoch 1, iteration 3.*case_2"):
        engine.run()
    assert torch.equal(network.weight, weights[0]) and network.weight.isfinite().all()


def test_a_gradient_that_is_not_finite_stops_too():
    network = nn.Conv2d(1, 1, 1)
    before = network.weight.clone()

    def loss(prediction, label):
        return (prediction * 0).abs().sum().sqrt()  # finite, with an infinite slope

    with pytest.raises(TrainingError, match=r"gradient norm became nan.*case_0"):
        trainer(cases(), [FiniteGuard(network)], network, loss=loss).run()
    assert torch.equal(network.weight, before)


@pytest.mark.parametrize(("limit", "expected"), [(0.5, 0.5), (0.0, None)])
def test_the_gradients_norm_is_clipped(limit, expected):
    network = nn.Conv2d(1, 1, 3, padding=1)
    norms = []
    engine = trainer(cases(), [FiniteGuard(network, limit)], network, loss=lambda p, y: 100 * (p - y).square().mean())

    def record(_):
        norms.append(float(torch.cat([p.grad.flatten() for p in network.parameters()]).norm()))

    engine.add_event_handler(Events.ITERATION_COMPLETED, record)
    engine.run()
    if expected:
        assert all(norm == pytest.approx(expected, rel=1e-3) for norm in norms)
    else:
        assert max(norms) > 1


@pytest.mark.parametrize("count", [4, 5])  # five: the last group holds one batch only
def test_accumulated_gradients_are_clipped_once_at_their_end(count):
    torch.manual_seed(0)
    network, reference = nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 3, padding=1)
    reference.load_state_dict(network.state_dict())
    data = cases(count)
    trainer(data, [FiniteGuard(network, 0.05)], network, accumulation_steps=2).run()
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    for start in range(0, count, 2):
        optimizer.zero_grad()
        for case in data[start : start + 2]:
            (nn.functional.mse_loss(reference(case["image"][None]), case["label"][None]) / 2).backward()
        nn.utils.clip_grad_norm_(reference.parameters(), 0.05)
        optimizer.step()
    torch.testing.assert_close(network.weight, reference.weight)


def test_frozen_parameters_are_left_alone():
    network = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1))
    network[0].requires_grad_(False)
    assert len(FiniteGuard(network).parameters) == 2
    trainer(cases(), [FiniteGuard(network)], network).run()


# -- seeds


def test_every_epoch_has_its_own_seed_order_and_data_number():
    def run(seed, disturb):
        torch.manual_seed(disturb)
        dataset, sampler, seen = SeededDataset(cases(), seed=seed), SeededSampler(4, seed=seed), []
        engine = trainer(dataset, [EpochSeeds(seed)], epochs=2, sampler=sampler)

        def record(e):
            numbers = (e.state.epoch, dataset.epoch, sampler.epoch)
            seen.append((*numbers, e.state.batch["case"][0], torch.rand(1).item()))

        engine.add_event_handler(Events.ITERATION_COMPLETED, record)
        engine.run()
        return seen

    seen = run(5, disturb=0)
    assert [s[:3] for s in seen] == [(1, 1, 1)] * 4 + [(2, 2, 2)] * 4
    sampler, expected = SeededSampler(4, seed=5), []
    for epoch in (1, 2):
        sampler.set_epoch(epoch)
        expected += [f"case_{i}" for i in sampler]
    assert [s[3] for s in seen] == expected
    assert run(5, disturb=1) == seen != run(6, disturb=0)
    assert len({s[4] for s in seen}) == 8


# -- progress and log


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (12.4, "12 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599, "59 min 59 s"),
        (3720, "1 h 02 min"),
        (90000, "25 h 00 min"),
    ],
)
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_progress_says_where_it_stands_and_when_it_ends(caplog):
    with caplog.at_level(logging.INFO, "hspsam_monai.training.handlers"):
        trainer(cases(), [Progress(every=0)], epochs=2).run()
    lines = [record.message for record in caplog.records if record.name.endswith("handlers")]
    assert len(lines) == 9
    assert lines[4].startswith("Training 2/2 loss 0.") and "iteration 5/8" in lines[4] and lines[4].endswith("left")
    assert lines[-1].startswith("Training: done in")


def test_the_time_left_does_not_count_preparations(caplog, monkeypatch):
    """Features are filled for an hour before the first iteration; a second an iteration is what counts."""
    now = [0.0]
    monkeypatch.setattr("hspsam_monai.training.handlers.time.monotonic", lambda: now[0])

    def spend(seconds):
        now[0] += seconds

    engine = trainer(cases(), [Progress(every=0)], epochs=2)
    engine.add_event_handler(Events.STARTED, lambda _: spend(3600))
    engine.add_event_handler(Events.ITERATION_STARTED, lambda _: spend(1))
    with caplog.at_level(logging.INFO, "hspsam_monai.training.handlers"):
        engine.run()
    lines = [record.message for record in caplog.records if record.name.endswith("handlers")]
    assert lines[3].endswith("iteration 4/8, 1.00 it/s, 4 s left") and lines[-1] == "Training: done in 1 h 00 min."


def test_progress_hides_no_error():
    def fail(prediction, label):
        raise ZeroDivisionError("here")

    with pytest.raises(ZeroDivisionError, match="here"):
        trainer(cases(), [Progress()], loss=fail).run()


def test_log_file_appends_and_is_opened_once(tmp_path):
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    try:
        for _ in range(2):
            log_file(tmp_path / "run")
            logging.getLogger("hspsam_monai.somewhere").info("Polyp %d", 7)
        text = (tmp_path / "run" / "log.txt").read_text()
        assert text.count("INFO hspsam_monai.somewhere: Polyp 7") == 2
    finally:
        for handler in set(root.handlers) - set(before):
            root.removeHandler(handler)
            handler.close()
        root.setLevel(level)
