"""What the factory of models chooses by the devices of the mesh."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from jax.sharding import Mesh

from jaxtrain.model.factory import HFModelFactory, Placement
from jaxtrain.parallel.layout import BatchLayout
from jaxtrain.recipe.mesh import AXES
from jaxtrain.recipe.model import ModelConfig
from tests.runs import model_folder


@dataclass(frozen=True)
class Device:
    """What a mesh needs to know of a device that is not here."""

    platform: str
    device_kind: str = "one of them"
    id: int = 0
    process_index: int = 0


@pytest.mark.parametrize("written", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_the_dtype_is_bfloat16_by_default_on_accelerators(tmp_path, platform, written):
    devices = np.empty((1,) * len(AXES), object)
    devices.flat[0] = Device(platform)
    placement = Placement(BatchLayout(Mesh(devices, AXES), 1, 1), 64, tiled_mlp=False)
    name = str(model_folder(tmp_path))
    factory = HFModelFactory(ModelConfig(name_or_path=name, from_scratch=True, dtype=written))
    model = factory.create_model(replace(factory.create_config(), placement=placement))
    default = "float32" if platform == "cpu" else "bfloat16"
    assert model.compute.compute_dtype == (written or default)
