import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTModel,
)

from common.backbones.image_encoders import (
    ARCFACE_TEMPLATE_PX,
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    ClipVisionEncoder,
    DinoEncoder,
    Preprocessing,
    align_faces,
    similarity_transform,
)


def photo(height, width, seed=0):
    """A smooth picture with some noise, uint8 (height, width, 3)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = np.stack([127 + 90 * np.sin(x / 17 + c) * np.cos(y / (11 + c)) for c in range(3)], -1)
    return np.clip(waves + rng.normal(0, 12, waves.shape), 0, 255).astype(np.uint8)


def as_pixel_values(image):
    return torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1


@pytest.mark.parametrize("size", [(300, 417), (512, 256), (64, 64)])
def test_clip_preprocessing_is_that_of_the_pil_processor(size):
    """Reference: transformers' CLIPImageProcessor on PIL; within two of 255 levels, because PIL rounds to 8 bits."""
    image = photo(*size)
    expected = CLIPImageProcessor()(Image.fromarray(image), return_tensors="pt").pixel_values
    result = Preprocessing(224, 224, CLIP_MEAN, CLIP_STD)(as_pixel_values(image))
    difference = (result - expected) * torch.tensor(CLIP_STD).view(3, 1, 1) * 255
    assert result.shape == (1, 3, 224, 224) and difference.abs().max() < 2 and difference.abs().mean() < 0.5


def test_dino_preprocessing_resizes_to_256_and_crops_224():
    """Reference: PIL's own bicubic resize and crop."""
    image = photo(300, 417)
    resized = Image.fromarray(image).resize((417 * 256 // 300, 256), Image.Resampling.BICUBIC)
    left = (resized.width - 224) // 2
    pixels = np.asarray(resized.crop((left, 16, left + 224, 240)), dtype=np.float32) / 255
    expected = torch.from_numpy((pixels - IMAGENET_MEAN) / IMAGENET_STD).permute(2, 0, 1)[None].float()
    result = Preprocessing(256, 224, IMAGENET_MEAN, IMAGENET_STD)(as_pixel_values(image))
    assert ((result - expected) * torch.tensor(IMAGENET_STD).view(3, 1, 1) * 255).abs().max() < 2


def test_preprocessing_names_a_wrong_shape():
    with pytest.raises(ValueError, match=r"\(3, 8, 8\)"):
        Preprocessing(8, 8, CLIP_MEAN, CLIP_STD)(torch.zeros(3, 8, 8))


SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 8}


def test_clip_encoder_loads_a_folder_and_returns_projection_and_penultimate_tokens(tmp_path):
    torch.manual_seed(0)
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**SMALL, image_size=32, projection_dim=10)).eval()
    model.save_pretrained(tmp_path)
    encoder = ClipVisionEncoder.load(tmp_path)
    pixel_values = as_pixel_values(photo(40, 48)).requires_grad_()
    features = encoder.features(pixel_values)
    output = model(encoder.preprocessing(pixel_values), output_hidden_states=True)
    assert encoder.preprocessing == Preprocessing(32, 32, CLIP_MEAN, CLIP_STD)
    assert torch.equal(features.embedding, output.image_embeds) and features.embedding.shape == (1, 10)
    assert torch.equal(features.tokens, output.hidden_states[-2]) and features.tokens.shape == (1, 17, 16)
    torch.testing.assert_close(encoder.embed_images(pixel_values).norm(dim=-1), torch.ones(1))
    features.embedding.sum().backward()
    assert pixel_values.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_dino_encoder_reads_both_versions_and_drops_register_tokens(tmp_path):
    torch.manual_seed(0)
    pixel_values = as_pixel_values(photo(40, 48))
    ViTModel(ViTConfig(**SMALL, image_size=56), add_pooling_layer=False).save_pretrained(tmp_path / "v1")
    first = DinoEncoder.load(tmp_path / "v1")
    assert first.preprocessing == Preprocessing(64, 56, IMAGENET_MEAN, IMAGENET_STD)
    hidden = first.model(first.preprocessing(pixel_values)).last_hidden_state
    assert torch.equal(first.features(pixel_values).embedding, hidden[:, 0])
    assert first.features(pixel_values).tokens.shape == (1, 50, 16)
    torch.testing.assert_close(first.embed_images(pixel_values).norm(dim=-1), torch.ones(1))

    config = {key: value for key, value in SMALL.items() if key != "intermediate_size"}
    model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**config, image_size=56, num_register_tokens=4))
    model.save_pretrained(tmp_path / "v2")
    second = DinoEncoder.load(tmp_path / "v2")
    hidden = second.model(second.preprocessing(pixel_values)).last_hidden_state
    assert torch.equal(second.features(pixel_values).tokens, hidden[:, [0, *range(5, 54)]])


def test_similarity_transform_recovers_a_known_one_and_solves_least_squares():
    """References: the parameters that moved the points; numpy's least squares on the same linear problem."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(2, 5, 2, generator=generator, dtype=torch.float64)
    angle, scale = torch.tensor(0.4, dtype=torch.float64), 1.7
    rotation = scale * torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
    moved = points @ rotation.T + torch.tensor([3.0, -2.0], dtype=torch.float64)
    matrix = similarity_transform(points, moved)
    torch.testing.assert_close(matrix[0, :, :2], rotation)
    torch.testing.assert_close(matrix[1, :, 2], torch.tensor([3.0, -2.0], dtype=torch.float64))

    noisy = moved + torch.randn(2, 5, 2, generator=generator, dtype=torch.float64)
    x, y = points[0].numpy().T
    one, zero = np.ones(5), np.zeros(5)
    system = np.concatenate([np.stack([x, -y, one, zero], 1), np.stack([y, x, zero, one], 1)])
    a, b, tx, ty = np.linalg.lstsq(system, noisy[0].numpy().T.ravel(), rcond=None)[0]
    expected = torch.tensor([[a, -b, tx], [b, a, ty]])
    torch.testing.assert_close(similarity_transform(points, noisy)[0], expected)


def test_aligned_face_has_its_key_points_on_the_template():
    """The picture holds its own coordinates as colours, so the colour at a template point names where it came from."""
    x, y = torch.arange(160.0).expand(200, -1), torch.arange(200.0)[:, None].expand(-1, 160)
    picture = torch.stack([x / 100 - 1, y / 100 - 1, torch.zeros_like(x)])[None]
    template = torch.tensor(ARCFACE_TEMPLATE_PX)
    keypoints = template @ (0.8 * torch.tensor([[0.96, 0.28], [-0.28, 0.96]])) + torch.tensor([45.0, 35.0])
    aligned = align_faces(picture, keypoints[None])
    assert aligned.shape == (1, 3, 112, 112)
    for (column, row), (source_x, source_y) in zip(ARCFACE_TEMPLATE_PX, keypoints, strict=True):
        left, top = int(column), int(row)
        patch, dx, dy = aligned[0, :2, top : top + 2, left : left + 2], column - left, row - top
        colour = (1 - dy) * ((1 - dx) * patch[:, 0, 0] + dx * patch[:, 0, 1])
        colour = colour + dy * ((1 - dx) * patch[:, 1, 0] + dx * patch[:, 1, 1])
        torch.testing.assert_close((colour + 1) * 100, torch.stack([source_x, source_y]), rtol=0, atol=1e-2)
    outside = align_faces(picture, keypoints[None] - 1000)
    assert torch.equal(outside, -torch.ones_like(outside))
    with pytest.raises(ValueError, match=r"\(1, 5, 2\)"):
        align_faces(picture, keypoints)
