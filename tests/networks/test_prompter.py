"""The learned prompts and the Q -> A generator."""

import pytest
import torch
from torch.nn import functional as F

from hspsam_monai.encoders import Level
from hspsam_monai.errors import ConfigError
from hspsam_monai.networks.prompter import HierarchicalPrompter, QueryToAnswer

LEVELS = (Level(64, 4, None), Level(128, 8, 128), Level(160, 16, 160))


@torch.no_grad()
def test_equals_the_paper_written_out():
    """D -> D/4 -> D/4 -> C, LeakyReLU; then C -> C/4 -> C/4 -> C a token, ReLU."""
    generator = QueryToAnswer(64, 256, 2)
    assert [tuple(p.shape) for p in generator.shared.parameters() if p.ndim == 2] == [(16, 64), (16, 16), (256, 16)]
    assert [tuple(p.shape) for p in generator.separate[0].parameters() if p.ndim == 2] == [
        (64, 256),
        (64, 64),
        (256, 64),
    ]
    q = torch.randn(2, 64)
    a, _, b, _, c = generator.shared
    shared = c(F.leaky_relu(b(F.leaky_relu(a(q)))))
    expected = []
    for index, own in enumerate(generator.separate):
        a, _, b, _, c = own
        expected.append(c(F.relu(b(F.relu(a(shared[index]))))))
    torch.testing.assert_close(generator(q), torch.stack(expected))
    batched = torch.randn(5, 2, 64)  # the same for every image of a batch
    torch.testing.assert_close(generator(batched)[3], generator(batched[3]))


def test_static_answers_are_constants_of_the_task():
    prompter = HierarchicalPrompter(LEVELS, 128, 3)
    prompts = prompter.encoder_prompts()
    assert prompts[0] is None and [tuple(q.shape) for q in prompts[1:]] == [(3, 128), (3, 160)]
    answers = prompter([None, None, None])
    attended = prompter([None, torch.randn(2, 3, 128), torch.randn(2, 3, 160)])
    assert answers[0] is None and [tuple(a.shape) for a in answers[1:]] == [(3, 128)] * 2
    assert all(torch.equal(a, b) for a, b in zip(answers[1:], attended[1:], strict=True))


def test_image_answers_come_from_the_attended_tokens():
    prompter = HierarchicalPrompter(LEVELS, 128, 3, "image")
    tokens = [None, torch.randn(2, 3, 128), torch.randn(2, 3, 160)]
    answers = prompter(tokens)
    assert answers[0] is None and [tuple(a.shape) for a in answers[1:]] == [(2, 3, 128)] * 2
    assert all(torch.equal(a, prompter.answers[i](tokens[i + 1])) for i, a in enumerate(answers[1:]))


def test_none_has_no_parameters():
    prompter = HierarchicalPrompter(LEVELS, 128, 3, "none")
    assert list(prompter.parameters()) == []
    assert prompter.encoder_prompts() == [None] * 3 == prompter([None] * 3)


def test_prompts_start_small_and_different():
    torch.manual_seed(0)
    first, second = HierarchicalPrompter((Level(768, 16, 768),) * 2, 256, 16).queries
    assert 0.019 < float(first.detach().std()) < 0.021 and not torch.equal(first, second)


def test_refusals():
    with pytest.raises(ConfigError, match="prompt source is 'box'"):
        HierarchicalPrompter(LEVELS, 128, 3, "box")
    with pytest.raises(ConfigError, match="prompts per level is 0"):
        HierarchicalPrompter(LEVELS, 128, 0)


@pytest.mark.parametrize("source", ["static", "image"])
def test_gradcheck(source):
    torch.manual_seed(0)
    prompter = HierarchicalPrompter((Level(8, 16, 8), Level(8, 16, None)), 4, 2, source).double()
    query = prompter.queries[0]
    tokens = torch.randn(2, 2, 8, dtype=torch.float64, requires_grad=True)
    # Their start is tiny; near the kink of a ReLU a finite difference would be wrong.
    torch.nn.init.normal_(query)

    def run(_, tokens, *parameters):
        return prompter([tokens, None])[0]

    assert torch.autograd.gradcheck(run, (query, tokens, *prompter.answers.parameters()))
