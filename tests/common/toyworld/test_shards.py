"""Shards of rendered examples."""

import pytest
import torch

from common.io import atomic_save_safetensors, load_safetensors
from common.toyworld.examples import LABELS, make_examples
from common.toyworld.shards import ShardConfig, load_shards, shard_path, write_shard, write_shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    directory = tmp_path_factory.mktemp("world")
    write_shards(ShardConfig(output=directory, num_images=10, first_seed=3, workers=1, shard_size=6))
    return directory


def test_shards_hold_the_examples_of_their_seeds_in_order(folder):
    data, expected = load_shards(folder), make_examples(list(range(3, 13)))
    assert (data.images.numpy() == expected.images).all()
    assert (data.masks.numpy() == expected.masks).all()
    assert data.captions == expected.captions
    assert (data.instances.numpy() == expected.instances).all()
    for name in LABELS:
        assert (data.labels[name].numpy() == expected.labels[name]).all()
        assert (data.mentioned[name].numpy() == expected.mentioned[name]).all()


def test_max_images_cuts_everything_alike(folder):
    data = load_shards(folder, max_images=7)
    assert len(data) == len(data.masks) == len(data.captions) == len(data.instances) == len(data.labels["class"]) == 7


def test_rendering_again_keeps_complete_shards_and_makes_missing_ones(folder):
    kept, missing = shard_path(folder, 3, 6), shard_path(folder, 9, 4)
    before, content = kept.stat().st_mtime_ns, load_safetensors(missing)[0]["images"]
    missing.unlink()
    for first_seed, count in ((3, 6), (9, 4)):
        write_shard(folder, first_seed, count)
    assert kept.stat().st_mtime_ns == before
    assert torch.equal(load_safetensors(missing)[0]["images"], content)


def test_an_empty_folder_and_another_world_are_errors(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="common.toyworld.shards"):
        load_shards(tmp_path)
    tensors, header = load_safetensors(shard_path(folder, 9, 4))
    atomic_save_safetensors(tensors, shard_path(tmp_path, 9, 4), header | {"label_names": "{}"})
    with pytest.raises(ValueError, match="another version"):
        load_shards(tmp_path)


def test_bad_settings_are_named(tmp_path):
    with pytest.raises(ValueError, match="workers must be >= 1, got 0"):
        ShardConfig(output=tmp_path, workers=0)
