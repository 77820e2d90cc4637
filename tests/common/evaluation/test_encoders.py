"""Preprocessing against transformers' PIL processor, tiny random towers, the feature cache, ids without folders."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, Dinov2Config, Dinov2Model, ViTConfig, ViTModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from common.backbones.image_encoders import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from common.data.images import to_pixel_values
from common.evaluation.encoders import Clip, Dino, PilPreprocessing, encoder_id
from common.evaluation.feature_cache import FeatureCache, picture_hash

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth noise with edges."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.NEAREST)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> str:
    """A random CLIP with a tokenizer of single letters."""
    folder = tmp_path_factory.mktemp("hub") / "tiny-clip"
    torch.manual_seed(0)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    ids = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    config = CLIPConfig(
        text_config={**SMALL, **ids, "vocab_size": len(words), "max_position_embeddings": 12, "projection_dim": 8},
        vision_config={**SMALL, "image_size": 32, "patch_size": 8, "projection_dim": 8},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("size", [(300, 416), (512, 512), (224, 230), (96, 64)])
def test_clip_preprocessing_equals_the_pil_processor_of_transformers(size):
    image = photo(*size)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 224}, crop_size=224)
    expected = processor(image, return_tensors="pt").pixel_values
    result = PilPreprocessing(224, 224, CLIP_MEAN, CLIP_STD)(to_pixel_values(image)[None])
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


def test_dino_preprocessing_resizes_to_256_before_the_crop():
    """Reference: PIL and numpy, step by step."""
    image = photo(400, 300)
    resized = image.resize((341, 256), Image.Resampling.BICUBIC)
    pixels = np.asarray(resized.crop((58, 16, 282, 240)), dtype=np.float64) / 255  # (341 - 224) / 2 = 58.5 rounds to 58
    expected = torch.from_numpy((pixels - IMAGENET_MEAN) / IMAGENET_STD).permute(2, 0, 1)[None].float()
    preprocess = PilPreprocessing(256, 224, IMAGENET_MEAN, IMAGENET_STD)
    torch.testing.assert_close(preprocess(to_pixel_values(image)[None]), expected, rtol=0, atol=1e-5)
    assert str(preprocess) == "PIL bicubic 256, centre crop 224, ImageNet mean and std"


def test_clip_projects_and_normalises_both_towers(clip_folder):
    encoder = Clip.load(clip_folder)
    images = torch.stack([to_pixel_values(photo(40, 48, seed)) for seed in range(3)])
    inputs = PilPreprocessing(32, 32, CLIP_MEAN, CLIP_STD)(images)
    tokens = encoder.tokenizer(["a dog", "hi"], padding=True, return_tensors="pt")
    output = encoder.model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=inputs)
    torch.testing.assert_close(encoder.embed_images(images), output.image_embeds)
    torch.testing.assert_close(encoder.embed_texts(["a dog", "hi"]), output.text_embeds)
    assert encoder.embed_texts(["a very long text " * 20]).shape == (1, 8)  # cut, not refused


def test_dino_is_the_normalised_class_token_and_refuses_the_second_version(tmp_path):
    torch.manual_seed(0)
    model = ViTModel(ViTConfig(**SMALL, image_size=56, patch_size=8), add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path / "dino")
    encoder = Dino.load(tmp_path / "dino")
    images = to_pixel_values(photo(80, 64))[None]
    inputs = PilPreprocessing(64, 56, IMAGENET_MEAN, IMAGENET_STD)(images)
    expected = F.normalize(model(inputs).last_hidden_state[:, 0], dim=-1)
    torch.testing.assert_close(encoder.embed_images(images), expected)
    config = {key: value for key, value in SMALL.items() if key != "intermediate_size"}
    Dinov2Model(Dinov2Config(**config, image_size=56, patch_size=14)).save_pretrained(tmp_path / "dinov2")
    with pytest.raises(ValueError, match="'dinov2' model"):
        Dino.load(tmp_path / "dinov2")


def test_names_tell_weights_apart_and_hide_the_folder(clip_folder):
    encoder = Clip.load(clip_folder)
    assert encoder.name.startswith("tiny-clip@") and clip_folder not in encoder_id(encoder)
    assert Clip.load(clip_folder).name == encoder.name
    model = CLIPModel.from_pretrained(clip_folder)
    model.logit_scale.data += 1e-3
    assert Clip(model, encoder.tokenizer, "tiny-clip").name != encoder.name


class CountingEncoder:
    """Mean colours as features; counts the pictures it was given."""

    name, preprocessing = "colours", "none"

    def __init__(self, shift: float = 0.0) -> None:
        self.shift, self.count = shift, 0

    def embed_images(self, pixel_values):
        self.count += len(pixel_values)
        return F.normalize(pixel_values.mean((2, 3)) + 2 + self.shift * torch.arange(3), dim=-1)


def test_cache_embeds_each_picture_once_even_after_a_restart(tmp_path):
    images = [to_pixel_values(photo(8, 8, seed)) for seed in (0, 1, 0)] + [to_pixel_values(photo(6, 9, 2))]
    encoder = CountingEncoder()
    expected = torch.cat([encoder.embed_images(image[None]) for image in images])
    encoder.count = 0
    torch.testing.assert_close(FeatureCache(tmp_path).embed(encoder, images), expected)
    assert encoder.count == 1 + 3  # the probe, and three different pictures
    torch.testing.assert_close(FeatureCache(tmp_path).embed(encoder, images), expected)
    assert encoder.count == 1 + 3 + 1  # only the probe again
    retrained = CountingEncoder(shift=0.5)  # same name, other weights: nothing of the file may be used
    fresh = FeatureCache(tmp_path).embed(retrained, images)
    assert retrained.count == 1 + 3 and not torch.allclose(fresh, expected)


def test_picture_hash_knows_size_and_pixels():
    flat = torch.zeros(3, 2, 8)
    assert picture_hash(flat) == picture_hash(flat.clone()) != picture_hash(flat.reshape(3, 4, 4))
    assert picture_hash(flat) != picture_hash(flat + 0.02)
