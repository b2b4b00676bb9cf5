"""Nothing that is loaded runs code: a payload for every entrance."""

import codecs
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from detectron2.structures import BoxMode
from helpers import Payload, tiny_cfg

from fcos_d2 import Predictor, load_cfg, model_zoo
from fcos_d2.checkpoint import AtomicCheckpointer, read_checkpoint
from fcos_d2.data import register_custom_datasets
from fcos_d2.engine import Trainer, evaluate


@pytest.fixture
def cfg(shapes_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes_folder))
    cfg = tiny_cfg()
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    cfg.SOLVER.IMS_PER_BATCH = 2
    Path(cfg.OUTPUT_DIR).mkdir()
    register_custom_datasets(cfg)
    return cfg


def weights_file(folder, suffix, content, protocol=2):
    file = folder / f"weights{suffix}"
    if suffix == ".pkl":
        file.write_bytes(pickle.dumps(content, protocol=protocol))
    elif suffix == ".pth":
        torch.save(content, file)
    else:  # the format of PyTorch before version 1.6
        file = folder / "legacy.pth"
        torch.save(content, file, _use_new_zipfile_serialization=False)
    return str(file)


ENTRANCES = {
    "training": lambda cfg: Trainer(cfg).resume_or_load(resume=False),
    "evaluation": evaluate,
    "Predictor": Predictor,
    "model zoo": lambda cfg: model_zoo.get(
        "quick_schedules/fcos_R_18_FPN_shapes.yaml", weights=cfg.MODEL.WEIGHTS, device="cpu"
    ),
    "tools": lambda cfg: read_checkpoint(cfg.MODEL.WEIGHTS),
}


@pytest.mark.parametrize("suffix", [".pth", ".pkl", "legacy"])
@pytest.mark.parametrize("entrance", ENTRANCES)
def test_weights(cfg, tmp_path, entrance, suffix):
    content = {"model": {"a": torch.ones(1).numpy()}, "__author__": Payload(tmp_path / "ran")}
    cfg.MODEL.WEIGHTS = weights_file(tmp_path, suffix, content)
    with pytest.raises(ValueError, match="Nothing was run"):
        ENTRANCES[entrance](cfg)
    assert not (tmp_path / "ran").exists()


class Call:
    """Calls a function when it is unpickled, and gives the result a state."""

    def __init__(self, function, *args, state=None):
        self.call = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.call


# NumPy's own functions for pickles, whose modules depend on its version.
_RECONSTRUCT, _FROMBUFFER = np.ones(1).__reduce__()[0], np.ones(1).__reduce_ex__(5)[0]

FORGED = {
    "an array of pointers": Call(np.ndarray, (1,), "O", b"A" * 8),
    "an array that is called": Call(np.ndarray, (2, 2)),
    "an array of other memory": Call(np.ndarray, (1,), "f8", b"A" * 16, -(2**20)),
    "an array of an array, which may be freed": Call(
        _FROMBUFFER, np.ones(4), np.dtype("f8"), (4,), "C"
    ),
    "more objects than there are": Call(
        _RECONSTRUCT, np.ndarray, (0,), b"b",
        state=(1, (200,), np.dtype("O"), False, [{}, []]),
    ),
    "a type that hides its pointers": Call(
        np.dtype, "V16", False, True,
        state=(3, "|", None, ("a", "b"), {"a": (np.dtype("O"), 0), "b": (np.dtype("i8"), 8)},
               16, 1, 0),
    ),
    "objects": np.array([{}, []], dtype=object),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
@pytest.mark.parametrize("forged", FORGED)
def test_descriptions_of_memory_that_are_not_true(tmp_path, forged, suffix):
    """NumPy would take bytes of the file for pointers, or show other memory of the process."""
    file = weights_file(tmp_path, suffix, {"model": {"a": FORGED[forged]}})
    with pytest.raises(ValueError, match=r"Nothing was run|damaged or not a checkpoint"):
        read_checkpoint(file)


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_of_a_types_state_only_the_byte_order_counts(tmp_path, suffix):
    """NumPy would copy 16 MB out of an array of 16 bytes, and crash."""
    state = (3, ">", (np.dtype("f8"), (2**20,)), None, None, -1, -1, 0)
    forged = Call(np.dtype, "f8", False, True, state=state)
    array = Call(_FROMBUFFER, np.ones(2, ">f8").tobytes(), forged, (2,), "C")
    read = read_checkpoint(weights_file(tmp_path, suffix, {"model": {"a": array}}))
    assert read["model"]["a"].tolist() == [1, 1]


def test_no_other_encodings(tmp_path):
    """In .pth files PyTorch's own reader allows them."""
    file = weights_file(tmp_path, ".pkl", {"model": Call(codecs.encode, "text", "rot13")})
    with pytest.raises(ValueError, match="the encoding rot13"):
        read_checkpoint(file)


def test_nothing_can_be_set_on_a_class(tmp_path):
    """A pickle, by hand: the class BoxMode, a state for it, BUILD."""
    before = BoxMode.convert
    state = pickle.dumps((None, {"convert": "poisoned"}), protocol=2)[2:-1]
    data = b"\x80\x02}X\x01\x00\x00\x00acdetectron2.structures.boxes\nBoxMode\n" + state + b"bs."
    (tmp_path / "poison.pkl").write_bytes(data)
    with pytest.raises(ValueError, match="a state for a function or a class"):
        read_checkpoint(str(tmp_path / "poison.pkl"))
    assert BoxMode.convert == before


@pytest.mark.parametrize(
    ("suffix", "protocol"), [(".pth", 2), ("legacy", 2), (".pkl", 2), (".pkl", 4), (".pkl", 5)]
)
def test_arrays_of_all_kinds_are_read(tmp_path, suffix, protocol):
    arrays = {
        "float16": np.arange(6, dtype=np.float16).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big endian": np.arange(4, dtype=">i4"),
        "bool": np.array([True, False]),
        "empty": np.zeros((0, 4), np.float32),
        "no dimension": np.array(3.5),
    }
    others = [np.array([True, False]), (1, "a")]
    content = {"model": arrays, "scalar": np.float32(1.5), "list": others, "type": np.dtype("i8")}
    read = read_checkpoint(weights_file(tmp_path, suffix, content, protocol))
    for name, array in arrays.items():
        np.testing.assert_array_equal(read["model"][name], array)
        assert read["model"][name].dtype == array.dtype
        read["model"][name][...] = 0  # writable
    assert read["scalar"] == 1.5
    assert read["list"][0].tolist() == [True, False]
    assert read["list"][1] == (1, "a")
    assert read["type"] == np.int64


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_one_list_twice_at_each_of_many_levels_takes_no_time(tmp_path, suffix):
    """There are 2^60 ways to the array."""
    nested = [np.ones(1)]
    for level in range(60):
        nested = ([nested, nested], (nested, nested), {"a": nested, "b": nested})[level % 3]
    begin = time.monotonic()
    found = read_checkpoint(weights_file(tmp_path, suffix, {"model": nested}))["model"]
    assert time.monotonic() - begin < 30  # milliseconds, on a machine that does nothing else
    for level in reversed(range(60)):
        assert found["b" if level % 3 == 2 else 1] is found["a" if level % 3 == 2 else 0]
        found = found["a" if level % 3 == 2 else 0]
    assert found[0].tolist() == [1]


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_a_list_in_itself_is_refused(tmp_path, suffix):
    forged = [1]
    forged.append(forged)
    with pytest.raises(ValueError, match="damaged or not a checkpoint"):
        read_checkpoint(weights_file(tmp_path, suffix, {"model": forged}))


def test_the_payload_would_run(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


def test_resume(cfg, tmp_path):
    torch.save({"model": {}, "x": Payload(tmp_path / "ran")}, tmp_path / "output/model_final.pth")
    (tmp_path / "output" / "last_checkpoint").write_text("model_final.pth")
    with pytest.raises(ValueError, match="Nothing was run"):
        Trainer(cfg).resume_or_load(resume=True)
    assert not (tmp_path / "ran").exists()


def test_best_checkpoint_of_a_resumed_run(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "test", classmethod(lambda *args: {"bbox": {"AP": 1.0}}))
    cfg.SOLVER.MAX_ITER = 1
    Trainer(cfg).train()
    torch.save({"model": {}, "best_metric": Payload(tmp_path / "ran")},
               tmp_path / "output" / "model_best.pth")  # fmt: skip
    cfg.SOLVER.MAX_ITER = 2
    resumed = Trainer(cfg)
    resumed.resume_or_load(resume=True)
    resumed.train()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("key", ["PROPOSAL_FILES_TRAIN", "PROPOSAL_FILES_TEST"])
def test_proposals(cfg, tmp_path, key):
    file = tmp_path / "proposals.pkl"
    file.write_bytes(pickle.dumps({"ids": [], "boxes": Payload(tmp_path / "ran")}))
    cfg.MODEL.LOAD_PROPOSALS = True
    cfg.DATASETS[key] = (str(file),)
    other = "PROPOSAL_FILES_TEST" if "TRAIN" in key else "PROPOSAL_FILES_TRAIN"
    cfg.DATASETS[other] = ("missing, and not needed",)
    build = (
        Trainer.build_train_loader
        if "TRAIN" in key
        else lambda cfg: Trainer.build_test_loader(cfg, "shapes_val")
    )
    with pytest.raises(ValueError, match="Nothing was run"):
        build(cfg)
    assert not (tmp_path / "ran").exists()


def test_proposals_without_code_are_loaded(cfg, tmp_path):
    records = DatasetCatalog.get("shapes_train")
    proposals = {
        "ids": [r["image_id"] for r in records],
        "boxes": [np.array([[1.0, 2.0, 30.0, 40.0]], np.float32) for _ in records],
        "objectness_logits": [np.ones(1, np.float32) for _ in records],
        "bbox_mode": records[0]["annotations"][0]["bbox_mode"].__class__.XYXY_ABS,
    }
    file = tmp_path / "proposals.pkl"
    file.write_bytes(pickle.dumps(proposals))
    cfg.MODEL.LOAD_PROPOSALS = True
    cfg.DATASETS.PROPOSAL_FILES_TRAIN = (str(file),)
    batch = next(iter(Trainer.build_train_loader(cfg)))
    assert len(batch[0]["proposals"]) == 1


@pytest.mark.parametrize("as_base", [False, True])
def test_yaml(tmp_path, as_base):
    file = tmp_path / "config.yaml"
    file.write_text(f"SEED: !!python/object/apply:os.mkdir ['{tmp_path / 'ran'}']\n")
    if as_base:
        (tmp_path / "child.yaml").write_text("_BASE_: config.yaml\n")
        file = tmp_path / "child.yaml"
    with pytest.raises(ValueError, match=r"(?s)contains Python code.*Nothing was run.*--allow"):
        load_cfg(str(file))
    assert not (tmp_path / "ran").exists()
    load_cfg(str(file), allow_unsafe=True)
    assert (tmp_path / "ran").exists()


def test_detectron2s_configs_with_code_are_read_where_asked_for():
    from detectron2.model_zoo import get_config_file

    file = get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    assert load_cfg(file, allow_unsafe=True).MODEL.META_ARCHITECTURE == "RetinaNet"
    with pytest.raises(ValueError, match="contains Python code"):
        load_cfg(file)


def test_files_of_detectron2s_zoo_are_still_read(tmp_path):
    """Its .pkl files hold plain arrays; and files of Detectron, in names of Caffe2."""
    cfg = tiny_cfg()
    model = build_model(cfg)
    arrays = {k: v.numpy() for k, v in model.state_dict().items()}
    file = weights_file(tmp_path, ".pkl", {"model": arrays, "__author__": "Detectron2"})
    other = build_model(cfg)
    AtomicCheckpointer(other).load(file)
    for name, value in other.state_dict().items():
        assert (value.numpy() == arrays[name]).all()
    conv1 = np.full((64, 3, 7, 7), 0.5, np.float32)
    caffe2 = {"blobs": {"conv1_w": conv1, "conv1_w_momentum": conv1,
                        "res2_0_branch2a_w": np.zeros((64, 64, 3, 3), np.float32)}}  # fmt: skip
    AtomicCheckpointer(other).load(weights_file(tmp_path, ".pkl", caffe2))
    assert (other.backbone.bottom_up.stem.conv1.weight == 0.5).all()
