"""Folders of supports: what their masks show, contexts made of them, and every fault with its file."""

import numpy as np
import pytest
import torch
from PIL import Image

from hspsam_monai.errors import ConfigError, DataError
from hspsam_monai.inference import Closeness, ImageInferer, give_context, read_supports, support_labels
from hspsam_monai.networks import ConvPyramidSAM
from hspsam_monai.networks.proxy_prompt import FAR


def square(value=255, size=(40, 56)):
    mask = np.zeros(size, np.uint8)
    mask[8:24, 10:30] = value
    return mask


def two(size=(40, 56)):
    mask = square(1, size)
    mask[28:36, 10:30] = 2
    return mask


def test_masks_of_0_and_255_are_one_object_and_class_ids_are_many(supports):
    folder = supports({"a": square(), "b": square(1)})
    assert support_labels(folder) == {"background": 0, "object": 1}
    folder = supports({"a": two(), "b": square(2)})
    assert support_labels(folder) == {"background": 0, "object_1": 1, "object_2": 2}


def test_palette_masks_are_class_ids(supports):
    folder = supports({"a": two()})
    picture = Image.fromarray(two(), "P")
    picture.putpalette([0, 0, 0, 250, 0, 0, 0, 250, 0])
    picture.save(folder / "masks" / "a.png")
    assert list(support_labels(folder)) == ["background", "object_1", "object_2"]
    assert np.array_equal(read_supports(folder, 3)[1][0].numpy(), two())


def test_grey_and_colour_images_of_any_size_make_the_context_of_their_tensors(supports, proxy):
    folder = supports({"a": square(), "b": square(size=(70, 64))}, grey=("b",))
    images, masks, names = read_supports(folder, 2)
    assert names == ["a", "b"] and [tuple(i.shape) for i in images] == [(3, 40, 56), (3, 70, 64)]
    assert torch.equal(images[1][0], images[1][2]) and 0 <= images[0].min() <= images[0].max() <= 1
    assert np.array_equal(masks[0].numpy(), square(1))
    give_context(proxy, folder)
    given = proxy.context_values.clone()
    proxy.set_context(images, masks)
    assert torch.equal(given, proxy.context_values) and len(proxy.context_keys) == 2 * 16


@pytest.mark.parametrize(
    ("masks", "classes", "message"),
    [
        ({"a": square(), "hole": square(0)}, 2, r"hole\.png: found no foreground"),
        ({"a": two()}, 2, "show 2 objects; expected the network's 1"),
        ({"a": square()}, 3, "show 1 objects; expected the network's 2"),
        ({"a": square(3)}, 2, "hold the values 0, 3; expected 0 and 255"),
        ({"a": two(), "b": square(255)}, 3, "b.*unknown label 255"),
    ],
)
def test_faulty_masks_are_named(supports, masks, classes, message):
    with pytest.raises(DataError, match=message):
        read_supports(supports(masks), classes)


def test_colour_codes_sizes_and_missing_supports(supports, proxy, tmp_path):
    folder = supports({"a": square()})
    Image.fromarray(square(size=(40, 50))).save(folder / "masks" / "a.png")
    with pytest.raises(DataError, match=r"a\.png: found a mask of 50x40 pixels; expected 56x40"):
        give_context(proxy, folder)
    coloured = np.stack([square(200), square(30), square(10)], -1)
    Image.fromarray(coloured).save(folder / "masks" / "a.png")
    with pytest.raises(DataError, match=r"a\.png.*colour-coded"):
        support_labels(folder)
    (folder / "masks" / "a.png").unlink()
    with pytest.raises(DataError, match="without mask"):
        give_context(proxy, folder)
    (folder / "images" / "a.png").unlink()
    with pytest.raises(DataError, match="found no picture"):
        give_context(proxy, folder)
    with pytest.raises(DataError, match="no such file or folder"):
        give_context(proxy, tmp_path / "nowhere")


def test_a_network_that_takes_no_supports(supports):
    with pytest.raises(ConfigError, match="ConvPyramidSAM takes no supports"):
        give_context(ConvPyramidSAM("mobile_sam", image_size=64), supports({"a": square()}))


@torch.no_grad()
@pytest.mark.parametrize("flips", [False, True])
def test_closeness_is_the_networks_similarity_without_a_second_encoder_pass(supports, proxy, flips):
    from ignite.engine import Engine
    from monai.engines.utils import IterationEvents

    folder = supports({"a": square(size=(64, 64)), "b": square(size=(64, 64))})
    give_context(proxy, folder)
    proxy.context_reference.fill_(1e-3)  # random weights find all images alike
    images = [read_supports(folder, 2)[0][0][None], torch.zeros(1, 3, 64, 64)]
    passes, seen = [], []
    proxy.encoder.register_forward_hook(lambda *_: passes.append(1))
    closeness = Closeness(proxy)

    def step(engine, image):
        ImageInferer(64, "float32", flips)(image, proxy)
        engine.fire_event(IterationEvents.FORWARD_COMPLETED)
        seen.append(closeness.values)

    engine = Engine(step)
    engine.register_events(*IterationEvents)
    closeness.attach(engine)
    engine.run(images)
    assert len(passes) == len(images) * (4 if flips else 1)
    expected = [proxy.similarity(image).tolist() for image in images]
    assert seen[0] == pytest.approx(expected[0], abs=1e-5) and seen[1] == pytest.approx(expected[1], abs=1e-5)
    assert seen[0] == [1.0] and 0 < seen[1][0] < 1
    assert closeness.values is None and not proxy.csm._forward_pre_hooks
    assert Closeness(None).values is None and Closeness(ConvPyramidSAM).network is None


def test_images_unlike_every_support_are_named_in_the_warning():
    from hspsam_monai.evaluation import far_from_supports
    from hspsam_monai.scores import CaseScore

    def row(name, similarity):
        return CaseScore(name, name, (), (), (), (5,), similarity=similarity)

    assert far_from_supports([row("a", None), row("b", FAR)]) == ""
    text = far_from_supports([row("a", 0.9), row("b", 0.4), row("c", 0.1)])
    assert text.startswith("2 of 3 images") and text.index("c (0.10)") < text.index("b (0.40)")
    many = far_from_supports([row(str(i), 0.1) for i in range(12)])
    assert "and 4 more" in many
