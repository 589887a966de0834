"""Data sets whose randomness is a function of (seed, epoch, index), and one that outlives bad files."""

import pytest
import torch
from monai.data import DataLoader
from monai.transforms import Compose, LoadImaged, RandAffined, RandFlipd, RandGaussianNoised

from hspsam_monai.data import SeededDataset, SeededSampler, TolerantDataset, find_cases, write_phantoms
from hspsam_monai.errors import ConfigError
from hspsam_monai.transforms import RandCamerad, RandEmptyCropd


@pytest.fixture(scope="module")
def cases():
    generator = torch.Generator().manual_seed(0)
    label = torch.zeros(1, 32, 32)
    label[:, 8:16, 8:16] = 1
    return [{"image": torch.rand(3, 32, 32, generator=generator), "label": label} for _ in range(6)]


def transforms():
    return Compose(
        [
            RandEmptyCropd(prob=0.3),
            RandFlipd(["image", "label"], prob=0.5, spatial_axis=0),
            RandAffined(["image", "label"], prob=0.8, rotate_range=3.0, mode=["bilinear", "nearest"]),
            RandCamerad(prob=0.8),
            RandGaussianNoised("image", prob=0.5),
        ]
    )


def dataset(cases, seed=0, epoch=1):
    made = SeededDataset(cases, transforms(), seed=seed)
    made.set_epoch(epoch)
    return made


def images(samples):
    return torch.stack([torch.as_tensor(sample["image"]) for sample in samples])


def test_order_and_earlier_draws_do_not_matter(cases):
    forwards, backwards = dataset(cases), dataset(cases)
    first = images([forwards[i] for i in range(6)])
    torch.manual_seed(99)
    second = images([backwards[i] for i in reversed(range(6))]).flip(0)
    assert torch.equal(first, second)
    assert torch.equal(images([forwards[3]])[0], first[3])


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_do_not_matter(cases, workers):
    expected = images([dataset(cases)[i] for i in range(6)])
    loader = DataLoader(dataset(cases), batch_size=2, num_workers=workers)
    found = torch.cat([torch.as_tensor(batch["image"]) for batch in loader])
    assert torch.equal(found, expected)


@pytest.fixture
def threads():
    """Sets the number of threads; puts it back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_threads_do_not_matter(threads):
    """Workers have one thread each and the main process several, which shows in the last bits of larger images."""
    generator = torch.Generator().manual_seed(0)
    many = [{"image": torch.rand(3, 96, 96, generator=generator), "label": torch.ones(1, 96, 96)} for _ in range(8)]
    drawn = []
    for count in (1, 2, 3):
        threads(count)
        made = dataset(many)
        drawn.append(images([made[i] for i in range(8)]))
        assert torch.get_num_threads() == count
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


def test_seed_epoch_and_index_all_matter(cases):
    same = [dict(cases[0]) for _ in range(2)]
    base = images([dataset(same)[0]])
    for other in (dataset(same, seed=1)[0], dataset(same, epoch=2)[0], dataset(same)[1]):
        assert not torch.equal(images([other]), base)


def test_without_random_transforms_nothing_is_needed(cases):
    assert torch.equal(SeededDataset(cases)[2]["image"], cases[2]["image"])


@pytest.mark.parametrize("length", [1, 3, 8, 17])
@pytest.mark.parametrize("replicas", [1, 2, 3, 8])
def test_shards_are_even_and_cover_everything(length, replicas):
    shards = [SeededSampler(length, 7, rank=rank, replicas=replicas) for rank in range(replicas)]
    drawn = [list(shard) for shard in shards]
    assert {len(indices) for indices in drawn} == {len(shards[0])}
    flat = [index for indices in drawn for index in indices]
    assert set(flat) == set(range(length)) and len(flat) < length + replicas


def test_order_depends_on_seed_and_epoch_alone():
    sampler, again = SeededSampler(50, 3), SeededSampler(50, 3)
    first = list(sampler)
    torch.manual_seed(5)
    assert list(again) == first and sorted(first) == list(range(50)) and first != list(range(50))
    again.set_epoch(1)
    assert list(again) != first and list(SeededSampler(50, 4)) != first
    assert list(SeededSampler(50, 3, shuffle=False)) == list(range(50))


def test_an_epoch_may_draw_fewer_cases():
    whole, some = SeededSampler(20, 3), SeededSampler(20, 3, draws=6)
    for epoch in range(3):
        for sampler in (whole, some):
            sampler.set_epoch(epoch)
        assert len(some) == 6 and list(some) == list(whole)[:6]
    shards = [list(SeededSampler(20, 3, rank=rank, replicas=2, draws=6)) for rank in range(2)]
    assert sorted(shards[0] + shards[1]) == sorted(list(SeededSampler(20, 3))[:6])
    for draws in (0, 21):
        with pytest.raises(ConfigError, match="draws is"):
            SeededSampler(20, draws=draws)


# -- bad files


def reader():
    return Compose([LoadImaged("image", reader="hspsam_monai.data.PhotoReader", ensure_channel_first=True)])


def test_a_truncated_picture_is_recorded_and_the_rest_goes_on(tmp_path, caplog):
    folder = write_phantoms(tmp_path / "data", 4, size=(48, 48))
    found = find_cases(folder, labels=False)
    victim = folder / "images" / f"{found[1]['case']}.jpg"
    victim.write_bytes(victim.read_bytes()[:600])
    (folder / "images" / f"{found[2]['case']}.jpg").write_bytes(b"")
    data = TolerantDataset(found, reader())
    survivors = [item["case"] for item in data]
    assert survivors == [found[0]["case"], found[3]["case"]]
    assert [name for name, _ in data.failures] == [found[1]["case"], found[2]["case"]]
    assert victim.name in data.failures[0][1] and "applying transform" not in data.failures[0][1]
    assert found[1]["case"] in caplog.text


def test_it_works_in_monais_loader(tmp_path):
    folder = write_phantoms(tmp_path / "data", 3, size=(48, 48))
    found = find_cases(folder, labels=False)
    (folder / "images" / f"{found[0]['case']}.jpg").write_bytes(b"not a picture")
    data = TolerantDataset(found, reader())
    batches = list(DataLoader(data, batch_size=1, num_workers=0))
    assert [batch["case"][0] for batch in batches] == [case["case"] for case in found[1:]] and len(data.failures) == 1


def test_a_programming_fault_is_not_swallowed():
    def fault(case):
        raise KeyError("typo")

    with pytest.raises(KeyError):
        list(TolerantDataset([{"case": "a"}], fault))
    with pytest.raises(RuntimeError, match="applying transform"):
        list(TolerantDataset([{"case": "a"}], Compose([fault])))


def test_without_transform_cases_pass_through():
    assert list(TolerantDataset([{"case": "a"}, {"case": "b"}])) == [{"case": "a"}, {"case": "b"}]


def test_a_few_cases_fill_a_longer_epoch_augmented_anew(cases):
    made = SeededDataset(cases[:2], transforms(), seed=0, length=5)
    made.set_epoch(1)
    items = images([made[i] for i in range(len(made))])
    assert len(made) == 5
    assert torch.equal(items[:2], images([dataset(cases[:2])[i] for i in range(2)]))
    assert not torch.equal(items[0], items[2]) and torch.equal(items[3], images([made[3]])[0])
