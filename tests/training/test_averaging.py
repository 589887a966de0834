"""The moving average against ignite's, on ignite's engine."""

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers import EMAHandler
from torch import nn

from hspsam_monai.training import MovingAverage


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Linear(32, 32).requires_grad_(False)
        self.norm = nn.BatchNorm1d(32)
        self.decoder = nn.Linear(32, 1)
        self.decoder.tied = self.decoder.weight  # one tensor under two names

    def forward(self, x):
        return self.decoder(self.norm(self.encoder(x)))


def averaged(kind, network, steps=60, **options):
    """The average after so many steps of SGD on the same batches."""
    average = kind(network, **{"momentum": 0.03, **options})
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)

    def step(engine, batch):
        optimizer.zero_grad()
        network.train()(batch).square().mean().backward()
        optimizer.step()

    engine = Engine(step)
    average.attach(engine)
    generator = torch.Generator().manual_seed(1)
    engine.run([torch.randn(8, 32, generator=generator) for _ in range(steps)])
    return dict(average.ema_model.named_parameters()), dict(average.ema_model.named_buffers())


@pytest.mark.parametrize("options", [{}, {"momentum_warmup": 0.5, "warmup_iters": 20}], ids=["constant", "warm-up"])
def test_what_is_trained_is_averaged_as_ignite_does(options):
    networks = Network(), Network()
    (ours, buffers), (theirs, peers) = map(
        lambda kind, network: averaged(kind, network, **options), (MovingAverage, EMAHandler), networks
    )
    trained = [name for name, p in networks[0].named_parameters() if p.requires_grad]
    assert trained == ["norm.weight", "norm.bias", "decoder.weight", "decoder.bias"]
    for name in trained:
        assert torch.equal(ours[name], theirs[name]), name
        assert not torch.equal(ours[name], networks[0].get_parameter(name)), name
    assert buffers and all(torch.equal(buffers[name], peers[name]) for name in peers)


def test_frozen_weights_stay_to_the_last_bit():
    network = Network()
    before = {name: p.clone() for name, p in network.encoder.named_parameters()}
    ours, theirs = averaged(MovingAverage, network)[0], averaged(EMAHandler, Network())[0]
    assert all(torch.equal(ours[f"encoder.{name}"], value) for name, value in before.items())
    wandered = (theirs["encoder.weight"] - before["weight"]).abs().max()
    assert 0 < wandered < 1e-5  # what the class is for


def test_frozen_weights_that_are_loaded_when_a_run_starts_are_taken_over():
    """As MONAI's CheckpointLoader does, which MONAI Label puts first of all handlers."""
    network, other = Network(), Network()
    torch.nn.init.normal_(other.encoder.weight)
    engine = Engine(lambda engine, batch: None)
    average = MovingAverage(network, momentum=0.5)
    start = average.ema_model.decoder.weight.clone()
    average.attach(engine)
    engine.add_event_handler(Events.STARTED, lambda: network.load_state_dict(other.state_dict()))
    engine.run([0])
    assert torch.equal(average.ema_model.encoder.weight, other.encoder.weight)
    assert torch.equal(average.ema_model.decoder.weight, 0.5 * start + 0.5 * other.decoder.weight)


def test_weights_that_are_thawed_later_are_averaged_from_then_on():
    network = Network()
    average = MovingAverage(network, momentum=0.5)
    engine = Engine(lambda engine, batch: network.encoder.bias.data.fill_(engine.state.iteration))
    average.attach(engine)
    engine.run([0], max_epochs=2)
    network.encoder.requires_grad_(True)
    engine.run([0], max_epochs=3)
    # The second epoch began with 1, and in the third came 3.
    assert torch.equal(average.ema_model.encoder.bias, torch.full((32,), 0.5 * 1 + 0.5 * 3))
    assert not average.ema_model.encoder.bias.requires_grad


def test_a_momentum_out_of_range_is_refused():
    with pytest.raises(ValueError, match="momentum"):
        MovingAverage(Network(), momentum=1.5)
