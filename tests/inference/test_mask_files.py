"""Where predicted masks go, and from which device."""

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from PIL import Image

from hspsam_monai.data import read_mask
from hspsam_monai.errors import DataError
from hspsam_monai.inference import SaveMaskd


class Elsewhere(torch.Tensor):
    """Values as on a device that is not the CPU: NumPy cannot read them before ``cpu()``."""

    def cpu(self):
        return self.as_subclass(torch.Tensor)

    def __array__(self, *args, **options):
        raise TypeError("can't convert device type tensor to numpy")

    def numpy(self, **options):
        raise TypeError("can't convert device type tensor to numpy")


def item(source, case, mask):
    image = MetaTensor(torch.zeros(3, 2, 3), meta={"filename_or_obj": str(source)})
    return {"pred": mask, "image": image, "case": case}


def test_a_mask_on_another_device_is_written(tmp_path):
    (tmp_path / "in").mkdir()
    mask = torch.tensor([[[0, 1, 1], [2, 0, 1]]], dtype=torch.float32)
    given = item(tmp_path / "in" / "a.png", "a", mask.as_subclass(Elsewhere))
    saved = SaveMaskd(tmp_path / "out", tmp_path / "in")(given)["saved_to"]
    assert np.array_equal(read_mask(saved, 3), mask[0].numpy())


def test_masks_of_others_are_never_replaced_and_ours_are(tmp_path):
    """A truth with its own palette, as VOC's, beside its pictures."""
    (tmp_path / "in").mkdir()
    truth = Image.fromarray(np.full((2, 3), 3, np.uint8), "P")
    truth.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0])
    truth.save(tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    save = SaveMaskd(tmp_path, tmp_path / "in")
    with pytest.raises(DataError, match="no palette PNG of our colours"):
        save(item(tmp_path / "in" / "a.jpg", "a", torch.zeros(1, 2, 3)))
    assert (tmp_path / "a.png").read_bytes() == before and save.of_before(tmp_path / "in" / "a.jpg") is None
    for value in (1.0, 2.0):  # an earlier run's
        again = SaveMaskd(tmp_path, tmp_path / "in")
        again(item(tmp_path / "in" / "b.jpg", "b", torch.full((1, 2, 3), value)))
        assert SaveMaskd(tmp_path, tmp_path / "in").of_before(tmp_path / "in" / "b.jpg") == tmp_path / "b.png"
    assert read_mask(tmp_path / "b.png", 3).max() == 2


def test_a_mask_of_more_pixels_than_pillow_reads_is_none_of_ours(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    SaveMaskd(tmp_path, tmp_path / "in")(item(tmp_path / "in" / "a.jpg", "a", torch.ones(1, 20, 30)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    save = SaveMaskd(tmp_path, tmp_path / "in", tolerant=True)
    save(item(tmp_path / "in" / "a.jpg", "a", torch.ones(1, 20, 30)))
    assert [case for case, _ in save.failures] == ["a"]


def test_twins_do_not_overwrite_each_other(tmp_path):
    (tmp_path / "in").mkdir()
    save = SaveMaskd(tmp_path / "out", tmp_path / "in")
    for number, name in enumerate(("a.png", "a.jpg")):
        save(item(tmp_path / "in" / name, name, torch.full((1, 2, 3), float(number))))
    assert [read_mask(tmp_path / "out" / f"a.{suffix}.png", 2).max() for suffix in ("png", "jpg")] == [0, 1]


def test_links_are_called_what_they_are_called(tmp_path):
    for number in (1, 2):
        (tmp_path / "store" / f"p{number}").mkdir(parents=True)
        (tmp_path / "store" / f"p{number}" / "frame.jpg").touch()
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"patient{number}.jpg").symlink_to(tmp_path / "store" / f"p{number}" / "frame.jpg")
    save = SaveMaskd(tmp_path / "out", tmp_path / "in")
    for number in (1, 2):
        save(item(tmp_path / "in" / f"patient{number}.jpg", f"patient{number}", torch.zeros(1, 2, 3)))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["patient1.png", "patient2.png"]
    with pytest.raises(DataError, match=r"holds the mask of .*patient2\.jpg"):
        save(item(tmp_path / "in" / "patient2.png", "patient2", torch.zeros(1, 2, 3)))


def test_what_cannot_be_written_is_named_and_the_rest_goes_on(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "in" / name).write_bytes(b"a picture")
    save = SaveMaskd(tmp_path / "in", tmp_path / "in", tolerant=True)
    save(item(tmp_path / "in" / "a.png", "a", torch.zeros(1, 2, 3)))  # would replace the picture
    assert (tmp_path / "in" / "a.png").read_bytes() == b"a picture"
    assert "the picture itself" in save.failures[0][1] and save.of_before(tmp_path / "in" / "a.png", "a") is None
    (tmp_path / "out" / "b.png").mkdir(parents=True)
    save = SaveMaskd(tmp_path / "out", tmp_path / "in", tolerant=True)
    save(item(tmp_path / "in" / "b.png", "b", torch.zeros(1, 2, 3)))  # a folder is in the way
    save(item(tmp_path / "in" / "c.png", "c", torch.zeros(1, 2, 3)))
    assert [case for case, _ in save.failures] == ["b"] and (tmp_path / "out" / "c.png").is_file()
    assert save.failures[0][1].startswith(f"{tmp_path / 'out' / 'b.png'} is there and no palette PNG")
    again = SaveMaskd(tmp_path / "out", tmp_path / "in", tolerant=True)
    assert again.of_before(tmp_path / "in" / "c.png", "c") == tmp_path / "out" / "c.png"
    again(item(tmp_path / "in" / "c.png", "c", torch.ones(1, 2, 3)))  # a mask of before gives way
    assert not again.failures and read_mask(tmp_path / "out" / "c.png", 2).all()
    assert again.of_before(tmp_path / "in" / "c.png", "c") is None
    (tmp_path / "file").touch()
    save = SaveMaskd(tmp_path / "file" / "sub", tmp_path / "in", tolerant=True)
    save(item(tmp_path / "in" / "c.png", "c", torch.ones(1, 2, 3)))
    assert str(tmp_path / "file") in save.failures[0][1]
    with pytest.raises(OSError):
        SaveMaskd(tmp_path / "file" / "sub", tmp_path / "in")(item("c.png", "c", torch.ones(1, 2, 3)))


def test_folders_of_images_leave_no_trace(tmp_path):
    (tmp_path / "in").mkdir()
    save = SaveMaskd("out", tmp_path / "in")
    found = {
        name: save.target(tmp_path / "in" / name).as_posix()
        for name in ("images/a.png", "x/images/a.JPG", "imagesTr/c.png", "imagesTs/t.png", "z/b.tif")
    }
    assert list(found.values()) == ["out/a.png", "out/x/a.png", "out/c.png", "out/t.png", "out/z/b.png"]
    assert save.target("/elsewhere/images/a.png").as_posix() == "out/a.png"
