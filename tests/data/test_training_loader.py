import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.samplers import RandomSubsetTrainingSampler, RepeatFactorTrainingSampler
from detectron2.utils.events import EventStorage
from helpers import tiny_cfg

from fcos_d2.data import (
    DatasetMapper,
    TrainingLoader,
    loading,
    register_custom_datasets,
    training_loader,
)

NUM_IMAGES = 600


@pytest.fixture
def cfg(shapes_folder, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes_folder))
    cfg = tiny_cfg()
    cfg.SOLVER.IMS_PER_BATCH = 4
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    cfg.SEED = 5
    register_custom_datasets(cfg)
    return cfg


def file_of(element):
    return element["file_name"].rsplit("/", 1)[1]


def batches(cfg, number, first_batch=0, mapper=dict):
    loader = TrainingLoader(cfg, mapper)
    loader.start(cfg.SEED, first_batch)
    return list(itertools.islice(loader, number))


def names(cfg, number, first_batch=0):
    return [[file_of(x) for x in batch] for batch in batches(cfg, number, first_batch)]


def test_batches_are_those_of_one_shuffled_stream_in_two_orientations(cfg):
    """The slow reference: shuffled epochs one after the other, sorted into two buckets."""
    generator = torch.Generator().manual_seed(cfg.SEED)
    records = DatasetCatalog.get("shapes_train")
    expected, buckets = [], {True: [], False: []}
    while len(expected) < 200:  # more than an epoch
        for index in torch.randperm(NUM_IMAGES, generator=generator).tolist():
            bucket = buckets[records[index]["width"] > records[index]["height"]]
            bucket.append(file_of(records[index]))
            if len(bucket) == 4:
                expected.append(list(bucket))
                bucket.clear()
    assert names(cfg, 200) == expected[:200]
    first_epoch = list(itertools.chain(*expected[:140]))
    assert len(set(first_epoch)) == len(first_epoch) == 560


def among_two(monkeypatch, rank):
    fake = SimpleNamespace(
        get_world_size=lambda: 2, get_rank=lambda: rank, is_main_process=lambda: rank == 0
    )
    monkeypatch.setattr(training_loader, "comm", fake)


SAMPLERS = {
    "TrainingSampler": {},
    "RepeatFactorTrainingSampler": {"REPEAT_THRESHOLD": 0.9},
    "RandomSubsetTrainingSampler": {"RANDOM_SUBSET_RATIO": 0.1},
}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_passes_over_batches_and_shares_them_among_processes(cfg, monkeypatch, sampler):
    cfg.DATALOADER.SAMPLER_TRAIN = sampler
    cfg.DATALOADER.update(SAMPLERS[sampler])
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = True
    whole = names(cfg, 30)
    assert names(cfg, 30) == whole
    assert names(cfg, 10, first_batch=20) == whole[20:]
    if sampler == "RandomSubsetTrainingSampler":
        assert len(set(itertools.chain(*whole))) <= 55  # a tenth of those that are not empty
    shares = []
    for rank in (0, 1):
        among_two(monkeypatch, rank)
        shares.append(names(cfg, 30))
    for batch, *parts in zip(whole, *shares, strict=True):
        assert sorted(parts[0] + parts[1]) == sorted(batch)
        assert len(parts[0]) == len(parts[1]) == 2


def test_repeats_rare_images_as_detectron2_does(cfg):
    cfg.DATALOADER.SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    cfg.DATALOADER.REPEAT_THRESHOLD = 0.9
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    records = DatasetCatalog.get("shapes_train")
    factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(records, 0.9)
    theirs = iter(RepeatFactorTrainingSampler(factors, seed=cfg.SEED))
    expected = [file_of(records[i]) for i in itertools.islice(theirs, 400)]
    assert TrainingLoader(cfg, dict).images_per_epoch == pytest.approx(factors.sum().item())
    assert list(itertools.chain(*names(cfg, 100))) == expected


def test_a_random_subset_is_detectron2s(cfg):
    cfg.DATALOADER.SAMPLER_TRAIN = "RandomSubsetTrainingSampler"
    cfg.DATALOADER.RANDOM_SUBSET_RATIO = 0.1
    # The seeds that Detectron2 draws, each for itself, from NumPy's generator seeded with SEED.
    numpy = np.random.RandomState(np.random.SeedSequence((cfg.SEED,)).generate_state(1)[0])
    shuffle, subset = numpy.randint(2**31), numpy.randint(2**31)
    theirs = RandomSubsetTrainingSampler(NUM_IMAGES, 0.1, seed_shuffle=shuffle, seed_subset=subset)
    found = list(itertools.islice(TrainingLoader(cfg, dict).indices(), 200))
    assert found == list(itertools.islice(iter(theirs), 200))
    assert len(set(found)) == 60


@pytest.mark.parametrize("ratio", [0.0, 0.001, -0.1, 1.5, float("nan")])
def test_a_subset_of_no_or_too_many_images_is_refused(cfg, ratio):
    cfg.DATALOADER.SAMPLER_TRAIN = "RandomSubsetTrainingSampler"
    cfg.DATALOADER.RANDOM_SUBSET_RATIO = ratio
    with pytest.raises(ValueError, match="RANDOM_SUBSET_RATIO must leave at least one of the 600"):
        TrainingLoader(cfg, dict)


def test_other_samplers_are_refused(cfg):
    cfg.DATALOADER.SAMPLER_TRAIN = "WeightedTrainingSampler"
    with pytest.raises(ValueError, match=r"must be one of \['TrainingSampler', .*override Trainer"):
        TrainingLoader(cfg, dict)


def test_pixels_depend_on_seed_and_position_alone(cfg):
    cfg.INPUT.MIN_SIZE_TRAIN = (64, 96, 128)
    mapper = DatasetMapper(cfg, is_train=True)
    np.random.seed(1)
    expected = np.random.RandomState(1).rand()
    first = batches(cfg, 12, mapper=mapper)
    assert np.random.rand() == expected  # those of the surroundings go on
    np.random.seed(2)
    cfg.DATALOADER.NUM_WORKERS = 3
    second = batches(cfg, 7, first_batch=5, mapper=mapper)
    for a, b in zip(itertools.chain(*first[5:]), itertools.chain(*second), strict=True):
        assert a["file_name"] == b["file_name"]
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["instances"].gt_boxes.tensor, b["instances"].gt_boxes.tensor)
    sizes = {min(x["image"].shape[1:]) for x in itertools.chain(*first)}
    assert sizes == {64, 96, 128}  # augmentation is random at all
    cfg.SEED = 6
    other = batches(cfg, 12, mapper=mapper)
    assert [[file_of(x) for x in b] for b in other] != [[file_of(x) for x in b] for b in first]


def test_a_batch_that_cannot_be_shared_is_refused(cfg, monkeypatch):
    cfg.SOLVER.IMS_PER_BATCH = 5
    among_two(monkeypatch, 0)
    with pytest.raises(ValueError, match=r"IMS_PER_BATCH, 5 images .* multiple of the 2 processes"):
        TrainingLoader(cfg, dict)


def test_data_sets_that_are_no_lists_are_refused(cfg):
    class Numbers(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, i):
            return i

    DatasetCatalog.register("numbers", Numbers)
    cfg.DATASETS.TRAIN = ("numbers",)
    with pytest.raises(ValueError, match=r"a Numbers, not as a list.*Override"):
        TrainingLoader(cfg, dict)
    DatasetCatalog.remove("numbers")


@pytest.fixture
def with_bad_images(cfg, shapes_folder, tmp_path):
    """A data set of 12 images, of which two are damaged."""
    data = json.loads((shapes_folder / "shapes" / "train.json").read_text())
    data["images"] = data["images"][:12]
    ids = {x["id"] for x in data["images"]}
    data["annotations"] = [a for a in data["annotations"] if a["image_id"] in ids]
    images = tmp_path / "images"
    images.mkdir()
    for i, image in enumerate(data["images"]):
        pixels = (shapes_folder / "shapes" / "train" / image["file_name"]).read_bytes()
        pixels = pixels[: len(pixels) // 2] if i == 3 else b"text" if i == 7 else pixels
        (images / image["file_name"]).write_bytes(pixels)
    (tmp_path / "bad.json").write_text(json.dumps(data))
    entry = {"FORMAT": "coco", "JSON": str(tmp_path / "bad.json"), "IMAGES": str(images)}
    cfg.DATASETS.CUSTOM.bad = type(cfg)(entry, new_allowed=True)
    register_custom_datasets(cfg)
    cfg.DATASETS.TRAIN = ("bad",)
    yield cfg
    DatasetCatalog.remove("bad")
    MetadataCatalog.remove("bad")


@pytest.mark.parametrize("workers", [0, 1])
def test_the_error_names_the_bad_image(with_bad_images, workers):
    with_bad_images.DATALOADER.NUM_WORKERS = workers
    with pytest.raises(ValueError, match=r"images/000[48]\.png or its annotations cannot be used"):
        batches(with_bad_images, 6, mapper=DatasetMapper(with_bad_images, is_train=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_skipped_and_counted_where_asked_for(with_bad_images, workers, caplog):
    cfg = with_bad_images
    cfg.DATALOADER.ON_BAD_IMAGE, cfg.DATALOADER.NUM_WORKERS = "skip", workers
    with EventStorage() as storage, caplog.at_level("WARNING"):
        found = batches(cfg, 9, mapper=DatasetMapper(cfg, is_train=True))
    assert {file_of(x) for x in itertools.chain(*found)}.isdisjoint({"0004.png", "0008.png"})
    assert all(len(batch) == 4 for batch in found)
    # 9 batches of 4 are three epochs, but for what the buckets hold; each has two bad images.
    number = storage.history("skipped_images").latest()
    assert 2 <= number <= 10
    assert f"Skipped image {number:.0f} of this process" in caplog.text
    assert "0004.png or its annotations cannot be used" in caplog.text
    assert "skipped_images" not in found[0][0]


def test_nothing_but_bad_images_is_an_error(with_bad_images, tmp_path):
    cfg = with_bad_images
    cfg.DATALOADER.ON_BAD_IMAGE = "skip"
    for file in (tmp_path / "images").iterdir():
        file.write_bytes(b"")
    with pytest.raises(ValueError, match="20 images in a row cannot be used"):
        batches(cfg, 1, mapper=DatasetMapper(cfg, is_train=True))
    cfg.DATALOADER.ON_BAD_IMAGE = "ignore"
    with pytest.raises(ValueError, match=r"ON_BAD_IMAGE must be one of \['raise', 'skip'\]"):
        TrainingLoader(cfg, dict)


def remove_images(folder, number):
    for i in range(1, number + 1):
        (folder / "images" / f"{i:04d}.png").unlink()


def test_images_that_are_not_there_are_an_error_at_the_start(
    with_bad_images, tmp_path, monkeypatch
):
    remove_images(tmp_path, 4)
    message = (
        rf"4 of 12 images of 'bad' are not there: {tmp_path}/images/0001\.png, .*/0002\.png, "
        r".*/0003\.png, \.\.\.\. Put them there, .* or set DATALOADER\.ON_BAD_IMAGE skip"
    )
    with pytest.raises(ValueError, match=message):
        TrainingLoader(with_bad_images, dict)
    # Only the main process looks.
    other = SimpleNamespace(is_main_process=lambda: False)
    monkeypatch.setattr(loading, "comm", other)
    TrainingLoader(with_bad_images, dict)


def test_images_that_are_not_there_are_one_warning_where_they_are_skipped(
    with_bad_images, tmp_path, caplog
):
    remove_images(tmp_path, 2)
    with_bad_images.DATALOADER.ON_BAD_IMAGE = "skip"
    TrainingLoader(with_bad_images, dict)
    (warning,) = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert warning.startswith("2 of 12 images of 'bad' are not there: ")


def test_a_set_to_train_on_needs_no_file_for_the_evaluation(with_bad_images, tmp_path):
    """A copy of COCO's training annotations is half a gigabyte, in each process."""
    data = json.loads((tmp_path / "bad.json").read_text())
    del data["annotations"][0]["area"]
    (tmp_path / "bad.json").write_text(json.dumps(data))
    TrainingLoader(with_bad_images, dict)
    assert MetadataCatalog.get("bad").get("json_file") is None
    DatasetCatalog.get("bad")  # as a test loader does it
    repaired = json.loads(Path(MetadataCatalog.get("bad").json_file).read_text())
    assert "area" in repaired["annotations"][0]


def test_the_first_elements_are_what_all_processes_get(cfg, monkeypatch):
    cfg.INPUT.MIN_SIZE_TRAIN = (64, 96, 128)
    cfg.INPUT.RANDOM_FLIP, cfg.INPUT.ROTATE_90, cfg.INPUT.COLOR = "both", True, 0.5
    cfg.INPUT.LSJ.ENABLED, cfg.INPUT.LSJ.SIZE = True, 96
    shares = []
    for rank in (0, 1):
        among_two(monkeypatch, rank)
        shares.append(batches(cfg, 3, mapper=DatasetMapper(cfg, is_train=True)))
    loader = TrainingLoader(cfg, DatasetMapper(cfg, is_train=True))
    loader.start(cfg.SEED, first_batch=0)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    found = loader.first_elements(10)
    assert torch.equal(torch.get_rng_state(), before[0])  # the training draws what it would draw
    assert np.random.get_state()[1].tolist() == before[1]
    # Process 0 has the images 0 and 2 of each batch of four, process 1 the others.
    expected = [
        element
        for of_both in zip(*shares, strict=True)
        for pair in zip(*of_both, strict=True)
        for element in pair
    ]
    for ours, theirs in zip(found, expected[:10], strict=True):
        assert file_of(ours) == file_of(theirs) and torch.equal(ours["image"], theirs["image"])
        boxes = [x["instances"].gt_boxes.tensor for x in (ours, theirs)]
        assert torch.equal(*boxes)
