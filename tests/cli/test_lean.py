"""Importing MONAI without what it brings along: in processes of their own, since an import happens once."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hspsam_monai.cli import workflows
from hspsam_monai.cli.lean import UNUSED, import_monai
from hspsam_monai.data import phantom


def python(code: str) -> dict:
    """Run code in a new interpreter; what it prints last is JSON."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow  # MONAI and torchvision
def test_what_is_left_out_can_be_imported_afterwards():
    answer = python(
        "import importlib, json, sys\n"
        "from hspsam_monai.cli.lean import UNUSED, import_monai\n"
        "done = import_monai()\n"
        "left_out = [name for name in (*UNUSED, 'torch.distributed.optim', 'sympy') if name not in sys.modules]\n"
        "from monai.engines import SupervisedEvaluator\n"
        "import torchvision, scipy.signal\n"
        "from torch.distributed.optim import ZeroRedundancyOptimizer as sharded\n"
        "works = torchvision.ops.nms.__name__, scipy.signal.hilbert.__name__, sharded.__mro__[1].__name__\n"
        "print(json.dumps([done, left_out, SupervisedEvaluator.__name__, works, import_monai()]))"
    )
    left_out = [*UNUSED, "torch.distributed.optim", "sympy"]
    assert answer == [True, left_out, "SupervisedEvaluator", ["nms", "hilbert", "Optimizer"], False]


@pytest.mark.slow  # MONAI twice
def test_a_package_that_monai_needs_is_not_left_out():
    answer = python(
        "import json\n"
        "from hspsam_monai.cli.lean import import_monai\n"
        "done = import_monai(('pickle', 'torchvision'))\n"
        "import pickle, monai, ignite.engine\n"
        "from monai.networks.nets import TorchVisionFCModel\n"
        "TorchVisionFCModel('resnet18', pretrained=False)\n"
        "print(json.dumps([done, issubclass(monai.engines.SupervisedEvaluator, ignite.engine.Engine)]))"
    )
    assert answer == [False, True]


def test_an_imported_monai_stays_as_it_is():
    before = set(sys.modules)
    assert not import_monai()
    assert set(sys.modules) == before


def test_the_command_segments_the_same_and_leaves_it_out(tmp_path: Path):
    picture = tmp_path / "picture.png"
    Image.fromarray(phantom(3, (96, 128))[0]).save(picture)
    words = ["segment", str(picture), str(tmp_path / "lean"), "image_size=128"]
    loaded = python(
        "import atexit, json, sys\n"
        f"atexit.register(lambda: print(json.dumps([n for n in {['monai', 'sympy', *UNUSED]} if n in sys.modules])))\n"
        f"sys.argv[1:] = {words}\n"
        "from hspsam_monai.cli import main\n"
        "main()"
    )
    assert loaded == ["monai"]
    workflows.segment(picture, tmp_path / "full", overrides={"image_size": 128})
    masks = [np.asarray(Image.open(tmp_path / name / "picture.png")) for name in ("lean", "full")]
    assert np.array_equal(*masks) and masks[0].any()
