"""Episodes: who may support whom, the same draw every time, and the way through MONAI's trainer."""

import pytest
import torch
from ignite.engine import Engine
from monai.data import DataLoader
from monai.transforms import Compose, RandFlipd

from hspsam_monai.errors import ConfigError, DataError
from hspsam_monai.training import EpisodeDataset, SetContext, episode_batch, held_out_episodes


def cases(count=6, folder="a/", copies=()):
    made = []
    for index in range(count):
        image = torch.full((3, 8, 8), 0.1 * (copies[index] if index < len(copies) else index))
        image[:, 0, 0] = 0.9
        label = torch.zeros(1, 8, 8)
        label[:, 2:4, 2:4] = 1
        made.append({"image": image, "label": label, "case": f"{folder}{index}"})
    return made


def flips():
    return Compose([RandFlipd(["image", "label"], prob=0.5, spatial_axis=axis) for axis in (0, 1)])


def names(item):
    return item["support_cases"].split("\n")


def test_neither_the_target_nor_its_copies_support_it():
    data = cases(5, copies=[0, 0, 2, 3, 2])  # 1 is a copy of 0, 4 of 2
    dataset = EpisodeDataset(data, supports=(2, 3))
    assert dataset.candidates(0) == [2, 3, 4] and dataset.candidates(2) == [0, 1, 3]
    for epoch in range(8):
        dataset.set_epoch(epoch)
        for index in range(5):
            item = dataset[index]
            assert item["support_images"].shape == (3, 3, 8, 8) and item["support_masks"].shape == (3, 8, 8)
            assert item["case"] not in names(item) and item["supports"] in (2, 3)
            assert not any(torch.equal(item["image"], support) for support in item["support_images"])
    item = EpisodeDataset(data, supports=(2, 2))[3]
    assert not torch.equal(*item["support_images"])  # two supports are no copies of each other


def test_supports_are_made_on_one_thread_like_targets():
    """Else the last bits of an augmented picture would tell the number of loader workers."""
    threads = []

    def note(item):
        threads.append(torch.get_num_threads())
        return dict(item)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        _ = EpisodeDataset(cases(), note, supports=(2, 2))[0]
        assert threads == [1, 1, 1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_same_file_twice_is_a_copy(tmp_path):
    data = []
    for index, content in enumerate(("one", "one", "two")):
        (tmp_path / f"{index}.png").write_text(content)
        data.append({"image": str(tmp_path / f"{index}.png"), "label": "", "case": str(index)})
    assert EpisodeDataset(data).candidates(0) == [2]


def test_supports_come_from_the_same_task():
    data = cases(3, "a/") + cases(3, "b/", copies=[7, 8, 9])
    dataset = EpisodeDataset(data, supports=(2, 2))
    assert all(name.startswith("b/") for name in names(dataset[4]))
    for case in data:
        case["task"] = "polyp"
    assert EpisodeDataset(data).candidates(0) == [1, 2, 3, 4, 5]
    with pytest.raises(DataError, match=r"c/0 has no other image of its task \(c\)"):
        EpisodeDataset(cases(3) + cases(1, "c/"))


def test_draws_depend_on_seed_epoch_and_index_alone():
    def episode(seed=0, epoch=0, index=2, warm=False):
        dataset = EpisodeDataset(cases(), flips(), seed=seed, supports=(1, 3))
        dataset.set_epoch(epoch)
        if warm:
            _ = dataset[0], dataset[5]
        return dataset[index]

    first, again = episode(), episode(warm=True)
    assert all(torch.equal(torch.as_tensor(first[k]), torch.as_tensor(again[k])) for k in first if "case" not in k)
    assert names(first) == names(again)
    others = [episode(seed=1), episode(seed=2), episode(epoch=1), episode(epoch=2)]
    assert any(names(other) != names(first) for other in others[:2])
    assert any(names(other) != names(first) for other in others[2:])
    assert {episode(epoch=e)["supports"] for e in range(20)} == {1, 2, 3}


def test_too_few_cases_are_repeated_and_empty_masks_avoided():
    item = EpisodeDataset(cases(2), supports=(4, 4))[0]
    assert item["support_images"].shape[0] == 4 and set(names(item)) == {"a/1"}
    data = cases(6)
    for case in data[:2]:
        case["label"].zero_()
    dataset = EpisodeDataset(data, supports=(1, 1))
    for epoch in range(12):
        dataset.set_epoch(epoch)
        assert dataset[5]["support_masks"].any()


@pytest.mark.parametrize("supports", [(0, 2), (3, 2)])
def test_impossible_numbers_of_supports(supports):
    with pytest.raises(ConfigError, match="supports is"):
        EpisodeDataset(cases(), supports=supports)


def test_batches_reach_the_network_through_monais_trainer():
    from monai.engines import SupervisedTrainer

    from hspsam_monai.inference import ImageInferer

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bias, self.seen = torch.nn.Parameter(torch.zeros(())), []

        def forward(self, image, images, masks):
            self.seen.append((image.shape, images.shape, masks.shape))
            return image[:, :2] + self.bias

    network = Network()
    dataset = EpisodeDataset(cases(), flips(), supports=(1, 2))
    SupervisedTrainer(
        device=torch.device("cpu"), max_epochs=4, train_data_loader=DataLoader(dataset, batch_size=3), network=network,
        optimizer=torch.optim.SGD(network.parameters(), 0.1), loss_function=lambda p, y: (p - y).square().mean(),
        inferer=ImageInferer(precision="float32"), prepare_batch=episode_batch, epoch_length=2, decollate=False,
    ).run()  # fmt: skip
    assert len(network.seen) == 8
    for image, images, masks in network.seen:
        assert image == (3, 3, 8, 8) and images[:1] == masks[:1] == (3,) and images[1] == masks[1] in (1, 2)


def test_validation_sets_the_context_of_what_is_validated():
    class Network(torch.nn.Module):
        num_classes = 2

        def set_context(self, images, masks):
            self.context = images, masks

    data = cases(5)
    data[1]["label"].zero_()
    network, loads = Network(), []
    handler = SetContext(network, data, lambda case: loads.append(case["case"]) or case, supports=8)
    handler(None)
    images, masks = network.context
    assert len(images) == len(masks) == 4 and images[0].shape == (3, 8, 8) and masks[0].shape == (8, 8)
    assert all(mask.any() for mask in masks)
    handler(None)
    assert len(loads) == 5  # read once
    engine = Engine(lambda *_: None)
    with pytest.raises(DataError, match="Of 1 training cases, none of the 0 taken as supports shows class 1"):
        SetContext(network, data[1:2], lambda case: case).attach(engine)  # before anything is trained
    network.image_size, large = 8, cases(3)
    for case in large:
        case["image"], case["label"] = torch.rand(3, 90, 70), torch.zeros(1, 90, 70)
        case["label"][0, 41, 33] = 1  # a pixel that sampling would step over
    SetContext(network, large, lambda case: case)(None)
    images, masks = network.context
    assert {image.shape for image in images} == {(3, 16, 16)} and all(mask.sum() in (1, 2, 4) for mask in masks)
    del network.image_size
    network.num_classes, rare = 3, cases(30)
    rare[11]["label"][0, :2] = 2
    for seed in range(5):
        SetContext(network, rare, lambda case: case, supports=4, seed=seed)(None)
        assert len(network.context[1]) == 4 and {2} <= set(torch.stack(network.context[1]).unique().tolist())


def test_a_longer_epoch_repeats_cases_in_new_episodes():
    dataset = EpisodeDataset(cases(4), flips(), supports=(2, 2), length=12)
    items = [dataset[i] for i in range(len(dataset))]
    assert [item["case"] for item in items] == [f"a/{i % 4}" for i in range(12)]
    assert all(item["case"] not in names(item) for item in items)
    assert len({tuple(names(item)) for item in items[::4]}) > 1


def test_validation_on_training_cases_holds_each_out_of_its_own_supports():
    class Supported(torch.nn.Module):
        def set_context(self, images, masks):
            """Only its presence counts."""

    data = cases(5)
    episodes = held_out_episodes(Supported(), data, lambda case: case)
    for index in range(5):
        assert sorted([*names(episodes[index]), f"a/{index}"]) == [f"a/{i}" for i in range(5)]
    assert len(held_out_episodes(Supported(), data, lambda case: case, supports=2)[0]["support_masks"]) == 2
    plain = held_out_episodes(torch.nn.Identity(), data, lambda case: case)
    batch = next(iter(DataLoader(plain, batch_size=2)))
    image, label, further, _ = episode_batch(batch)
    assert image.shape == (2, 3, 8, 8) and label.shape == (2, 1, 8, 8) and further == ()
