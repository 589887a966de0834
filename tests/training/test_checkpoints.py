"""What a run leaves behind, and what stops it: checkpoints, best model, patience, refusals."""

import csv
import json

import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn

from hspsam_monai.encoders.state_files import read_state
from hspsam_monai.errors import ConfigError, TrainingError, WeightsError
from hspsam_monai.networks.pretrained import load_checkpoint
from hspsam_monai.training import Checkpointer, TensorBoard, of_this_process, warmup_poly
from tests.training.conftest import root


def curve(folder):
    with (folder / "learning_curve.csv").open() as file:
        return list(csv.DictReader(file))


def test_model_is_the_averaged_network_in_float16(train):
    run = train(epochs=1).start()
    stored = torch.load(run.folder / "model.pt", weights_only=True)
    average = run.get("ema_handler").ema_model
    assert set(stored) == {"model"} and list(stored["model"]) == list(average.state_dict())
    for key, value in average.state_dict().items():
        assert torch.equal(stored["model"][key], value.half() if value.is_floating_point() else value), key
    trained = run.get("network").state_dict()
    assert any(not torch.equal(value, trained[key]) for key, value in average.state_dict().items())
    # What the validation saw is what inference will see, up to the rounding of the weights.
    fresh = run.get("network_def")
    load_checkpoint(fresh, run.folder / "model.pt")
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        found, expected = fresh.eval()(image), average.eval()(image)
    assert (found - expected).abs().max() <= 0.02 * expected.abs().max()


def test_the_folder_tells_the_run(train):
    run = train(epochs=2).start()
    rows = curve(run.folder)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    steps = len(run.losses) // 2
    assert float(rows[0]["loss"]) == pytest.approx(sum(run.losses[:steps]) / steps)
    assert {"lr", "val_mean_dice"} <= set(rows[0]) and 0 <= float(rows[0]["val_mean_dice"]) <= 1
    assert "Epoch 2: loss" in (run.folder / "log.txt").read_text()
    last = torch.load(run.folder / "last.pt", weights_only=True)
    assert last["epoch"] == 2 and last["iteration"] == len(run.losses)
    assert not list(run.folder.glob(".tmp*"))


def test_an_earlier_run_is_not_overwritten(train):
    first = train(epochs=1).start()
    before = {path.name: path.read_bytes() for path in first.folder.glob("*.pt")}
    with pytest.raises(RuntimeError) as caught:
        train(epochs=1).start()
    assert isinstance(root(caught.value), TrainingError) and "--resume" in str(root(caught.value))
    assert {path.name: path.read_bytes() for path in first.folder.glob("*.pt")} == before


def test_a_run_goes_on_with_its_own_number_of_steps(train):
    """With another it would end early or begin inside an epoch, and look as if all was well."""
    first = train(epochs=1, batch_size=1).start()
    steps = len(first.losses)
    with pytest.raises(RuntimeError) as caught:
        train(epochs=3, batch_size=2, resume=True).start()
    assert isinstance(root(caught.value), TrainingError)
    assert f"of a run with {steps} iterations an epoch, and this one has {steps // 2}" in str(root(caught.value))
    assert len(train(epochs=2, batch_size=1, resume=True).start().losses) == steps


@pytest.mark.parametrize(
    "changed",
    [
        {"batch_size": 1},
        {"precision": "bf16"},
        {"labels": {"background": 0, "a": 1, "b": 2}},
        {"network_def::decoder": "paper"},
    ],
)
def test_a_refused_resume_leaves_the_run_as_it_was(train, changed):
    """Its configuration is what a plain --resume goes on with, and network.json what the model is read by."""
    first = train(epochs=1).start()
    before = {p.name: p.read_bytes() for p in first.folder.iterdir() if p.suffix in (".json", ".pt", ".csv")}
    with pytest.raises(Exception, match=r"\w"):
        train(epochs=2, resume=True, **changed).start()
    assert {name: (first.folder / name).read_bytes() for name in before} == before
    assert train(epochs=2, resume=True).start().losses
    assert json.loads((first.folder / "config.json").read_text())["epochs"] == 2


def test_gradients_that_add_up_warn_of_nothing(train, recwarn):
    train(epochs=1, accumulation_steps=3).start()
    assert not [w for w in recwarn if "lr_scheduler.step" in str(w.message)]


def test_a_run_of_other_parameter_groups_does_not_go_on(train):
    first = train(epochs=1).start()
    last = torch.load(first.folder / "last.pt", weights_only=True)
    last["optimizer"]["param_groups"][0]["params"].pop()
    torch.save(last, first.folder / "last.pt")
    with pytest.raises(RuntimeError) as caught:
        train(epochs=2, resume=True).start()
    assert isinstance(root(caught.value), TrainingError) and "over other parameters" in str(root(caught.value))


def test_curves_are_opened_by_those_who_write_them(tmp_path):
    """A file for a process that writes nothing would hide the curves, as TensorBoard shows the newest."""
    handlers = [TensorBoard(log_dir=str(tmp_path / "tb"), output_transform=lambda x: x) for _ in range(2)]
    assert not (tmp_path / "tb").exists() and of_this_process(handlers, 1) == []
    engine = Engine(lambda _engine, _batch: {"loss": 0.5})
    for handler in of_this_process(handlers[:1], 0):
        handler.attach(engine)
    engine.run([0, 1])
    handlers[0].close()
    handlers[1].close()
    (events,) = (tmp_path / "tb").iterdir()
    assert b"loss" in events.read_bytes()


def test_nothing_to_resume_is_named(train):
    with pytest.raises(RuntimeError) as caught:
        train(resume=True).start()
    assert isinstance(root(caught.value), TrainingError) and "Nothing to resume" in str(root(caught.value))


def test_a_damaged_checkpoint_is_named(train):
    run = train(epochs=1).start()
    last = run.folder / "last.pt"
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(RuntimeError) as caught:
        train(epochs=2, resume=True).start()
    chain, error = [], caught.value
    while error is not None:
        chain.append(error)
        error = error.__cause__
    assert any(isinstance(error, WeightsError) and "last.pt" in str(error) for error in chain)


def test_a_bad_image_stops_the_run_and_the_last_epoch_stays(train):
    kept = {}

    def poison(engine):
        if engine.state.iteration == 5:  # three an epoch: the second of epoch 2
            kept.update({p.name: p.read_bytes() for p in run.folder.glob("*.pt")})
            engine.state.batch["image"][0, 0, 3, 3] = float("nan")
            kept["case"] = engine.state.batch["case"][0]

    run = train(epochs=2)
    with pytest.raises(RuntimeError) as caught:
        run.start(at_iteration=poison)
    error = root(caught.value)
    assert isinstance(error, TrainingError) and "epoch 2, iteration 5" in str(error) and kept.pop("case") in str(error)
    assert {p.name: p.read_bytes() for p in run.folder.glob("*.pt")} == kept
    for name in ("last.pt", "model.pt"):
        state = torch.load(run.folder / name, weights_only=True)
        tensors = state["model"] if "model" in state else {**state["network"], **state["best_network"]}
        assert all(tensor.isfinite().all() for tensor in tensors.values())
    resumed = train(epochs=2, resume=True).start()  # and it can go on
    assert len(curve(resumed.folder)) == 2


def test_patience_stops_the_run(train):
    run = train(epochs=6, lr=0.0, patience=1).start()  # without learning, no epoch is better than the first
    assert [row["epoch"] for row in curve(run.folder)] == ["1", "2"]
    log = (run.folder / "log.txt").read_text()
    assert "1 validations without a better value" in log
    again = train(epochs=6, lr=0.0, patience=1, resume=True).start()
    assert again.losses == [] and len(curve(run.folder)) == 2


def test_resuming_a_finished_run_does_nothing_and_more_epochs_go_on(train):
    train(epochs=1).start()
    assert train(epochs=1, resume=True).start().losses == []
    longer = train(epochs=2, resume=True).start()
    assert [row["epoch"] for row in curve(longer.folder)] == ["1", "2"]


def test_validation_every_second_epoch_and_after_the_last(train):
    run = train(epochs=3, val_interval=2).start()
    scores = [row["val_mean_dice"] for row in curve(run.folder)]
    assert [bool(score) for score in scores] == [False, True, True]
    best = 2 if float(scores[1]) >= float(scores[2]) else 3
    assert torch.load(run.folder / "last.pt", weights_only=True)["best_epoch"] == best


def test_accumulation_steps_once_for_several_batches(train):
    steps = []

    def count(run):
        run.get("optimizer").register_step_post_hook(lambda *_: steps.append(1))

    run = train(epochs=1, accumulation_steps=2, batch_size=1).start(before=count)
    assert len(run.losses) == 6 and len(steps) == 3


def test_the_learning_rate_ends_with_the_run_when_accumulating(train):
    run = train(epochs=2, accumulation_steps=2, batch_size=1, warmup=1).start()
    halfway, end = (float(row["lr"]) for row in curve(run.folder))
    assert halfway > 0 and end == pytest.approx(0, abs=1e-9)


# -- the handler alone, on a network of one layer


def tiny(folder, **options):
    """A trainer of one layer with a validation whose scores are given, and its checkpointer."""
    network = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    scheduler = warmup_poly(optimizer, 100)
    evaluator = Engine(lambda *_: None)
    engine = Engine(lambda *_: {"loss": torch.tensor(1.0)})
    scores = options.pop("scores", [0.5])
    evaluator.state.key_metric_name = "dice"

    def validate(engine):
        evaluator.state.epoch = engine.state.epoch
        evaluator.state.metrics = {"dice": scores[engine.state.epoch - 1], "text": "no number"}
        network.weight.data.fill_(engine.state.epoch)

    engine.add_event_handler(Events.EPOCH_COMPLETED, validate)
    checkpointer = Checkpointer(folder, network, optimizer, scheduler, evaluator, **options)
    checkpointer.attach(engine)
    return engine, checkpointer


def test_the_best_epoch_is_kept(tmp_path):
    engine, _ = tiny(tmp_path, scores=[0.3, 0.6, 0.6, 0.2], half=False)
    engine.run([0], max_epochs=4)
    assert (read_state(tmp_path / "model.pt")["weight"] == 2).all()  # equal is not better
    assert (torch.load(tmp_path / "last.pt", weights_only=True)["network"]["weight"] == 4).all()


def test_a_score_that_is_not_a_number_is_never_the_best(tmp_path):
    engine, checkpointer = tiny(tmp_path, scores=[float("nan"), 0.1])
    engine.run([0], max_epochs=2)
    assert checkpointer.best == pytest.approx(0.1) and checkpointer.best_epoch == 2


def test_only_the_first_process_writes(tmp_path):
    engine, checkpointer = tiny(tmp_path / "run")
    checkpointer.rank = 1
    engine.run([0], max_epochs=1)
    assert not (tmp_path / "run").exists()


def test_a_parallel_wrapper_is_looked_through(tmp_path):
    wrapper = nn.Module()
    wrapper.module = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(wrapper.parameters(), lr=0.1)
    made = Checkpointer(tmp_path, wrapper, optimizer, warmup_poly(optimizer, 10), Engine(lambda *_: None))
    assert made.network is wrapper.module is made.best_network


def test_the_last_validated_epoch_is_kept_where_nothing_may_choose(tmp_path):
    engine, checkpointer = tiny(tmp_path, scores=[0.3, 0.6, 0.2], half=False, keep="last")
    engine.run([0], max_epochs=3)
    assert (read_state(tmp_path / "model.pt")["weight"] == 3).all() and checkpointer.best_epoch == 2
    for options in ({"keep": "first"}, {"keep": "last", "patience": 2}):
        with pytest.raises(ConfigError, match="expected best, or last without patience"):
            tiny(tmp_path / "other", **options)
