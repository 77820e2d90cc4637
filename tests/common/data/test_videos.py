"""Real files, written by PyAV from a toy-world clip, come back whole, upright and in order, or are refused by name."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from common.data.videos import BadVideo, VideoInfo, crop_frames, nearest_size, read_frames, to_clip, video_info
from common.toyworld.clips import render_clip
from common.toyworld.sampling import compose, sample_object
from common.toyworld.scene import Placed


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    """A clip that moves by some pixels a frame, doubled because H.264 halves the colour: uint8 (12,128,128,3)."""
    rng = np.random.default_rng(3)
    scene = compose(rng, (Placed(sample_object(rng)),), fill=0.5, background="beach")
    rendered = render_clip(scene, "moving right", num_frames=12).frames
    levels = (rendered * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return levels.repeat(2, axis=1).repeat(2, axis=2)


def write(
    path: Path, frames: np.ndarray, codec="libx264", rate=8, *, times_ms=None, prepare=None, movflags="", **options
) -> Path:
    with av.open(str(path), "w", options={"movflags": movflags} if movflags else {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.bit_rate = 4_000_000
        if prepare is not None:
            prepare(stream)
        if times_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, levels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(levels, format="rgb24")
            if times_ms is not None:
                frame.pts, frame.time_base = times_ms[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_with_audio(path: Path, frames: np.ndarray | None, seconds: float = 3.0) -> Path:
    with av.open(str(path), "w") as container:
        audio = container.add_stream("aac", rate=48000)
        if frames is not None:
            video = container.add_stream("libx264", rate=8)
            video.height, video.width, video.pix_fmt = *frames.shape[1:3], "yuv420p"
        tone = np.sin(np.arange(int(48000 * seconds)) / 30).astype(np.float32)
        for start in range(0, len(tone), 1024):
            frame = av.AudioFrame.from_ndarray(tone[None, start : start + 1024], format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 48000, start
            container.mux(audio.encode(frame))
        container.mux(audio.encode())
        if frames is not None:
            for levels in frames:
                container.mux(video.encode(av.VideoFrame.from_ndarray(levels, format="rgb24")))
            container.mux(video.encode())
    return path


def copy_packets(source: Path, path: Path, *, skip: int = 0, earlier: int = 0, **options) -> Path:
    """The packets from number `skip` on, shown `earlier` ticks earlier, without encoding: what cutting tools do."""
    with av.open(str(source)) as old, av.open(str(path), "w", options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        packets = [packet for packet in old.demux(video=0) if packet.size][skip:]
        for packet in packets:
            packet.stream, packet.pts, packet.dts = stream, packet.pts - earlier, packet.dts - earlier
            new.mux(packet)
    return path


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.mean((one.astype(float) - other) ** 2))


def assert_same_frames(found: np.ndarray, frames: np.ndarray) -> None:
    assert found.dtype == np.uint8 and found.shape == frames.shape
    for number, frame in enumerate(found):
        quality = [psnr(frame, original) for original in frames]
        assert quality[number] > 30 and quality[number] == max(quality)


def read_all(info: VideoInfo) -> np.ndarray:
    return read_frames(info, range(info.num_frames))


@pytest.mark.parametrize(
    ("name", "codec", "rate"),
    [
        ("clip.mp4", "libx264", 8),
        ("clip.mp4", "libx264", 24),
        ("clip.mp4", "mpeg4", Fraction(30000, 1001)),
        ("clip.webm", "libvpx-vp9", Fraction(30000, 1001)),
        ("clip.mov", "libx264", Fraction(30000, 1001)),
        ("clip.mkv", "libx264", 8),
        ("clip.avi", "mpeg4", 24),
    ],
)
def test_files_come_back_as_they_were(tmp_path, frames, name, codec, rate):
    info = video_info(write(tmp_path / name, frames, codec, rate))
    assert (info.num_frames, info.width_px, info.height_px, info.rotation_deg) == (12, 128, 128, 0)
    assert info.fps == pytest.approx(float(rate), rel=1e-4)
    np.testing.assert_allclose(info.times_s, np.arange(12) / float(rate), atol=1e-3)
    assert_same_frames(read_all(info), frames)


def test_size_of_a_common_camera_and_odd_sizes(tmp_path, frames):
    wide = np.stack([np.array(Image.fromarray(frame).resize((320, 240))) for frame in frames])
    info = video_info(write(tmp_path / "wide.mp4", wide, rate=30))
    assert (info.width_px, info.height_px) == (320, 240)
    assert_same_frames(read_all(info), wide)
    info = video_info(write(tmp_path / "odd.webm", frames[:, :127, :95], "libvpx-vp9"))
    assert (info.width_px, info.height_px) == (95, 127)
    assert_same_frames(read_all(info), frames[:, :127, :95])


def test_gif_with_its_own_durations(tmp_path, frames):
    pictures = [Image.fromarray(frame) for frame in frames]
    durations_ms = [100, 200, 50] * 4
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=durations_ms)
    info = video_info(tmp_path / "a.gif")
    assert (info.num_frames, info.width_px, info.height_px) == (12, 128, 128)
    np.testing.assert_allclose(info.times_s, np.cumsum([0, *durations_ms[:-1]]) / 1000)
    assert info.fps == pytest.approx(12 / 1.4)
    assert_same_frames(read_all(info), frames)
    np.testing.assert_array_equal(read_frames(info, [7, 2]), read_all(info)[[7, 2]])


def test_gif_without_durations_and_with_holes(tmp_path):
    pictures = [Image.new("P", (4, 4), i) for i in range(2)]
    for picture in pictures:
        picture.putpalette([255, 0, 0, 0, 0, 255])
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=0, transparency=0)
    info = video_info(tmp_path / "a.gif")
    assert info.times_s == (0.0, 0.1) and info.fps == 10
    assert read_frames(info, [0])[0, 0, 0].tolist() == [255, 255, 255]


def test_any_frame_in_any_order_has_the_same_bits(tmp_path, frames):
    info = video_info(write(tmp_path / "a.mp4", frames, g="5", bf="2"))
    everything = read_all(info)
    for index in range(12):
        np.testing.assert_array_equal(read_frames(info, [index])[0], everything[index])
    np.testing.assert_array_equal(read_frames(info, [11, 3, 3, 8, 0]), everything[[11, 3, 3, 8, 0]])
    for outside in ([12], [-1], []):
        with pytest.raises(IndexError, match="has 0 to 11"):
            read_frames(info, outside)


def test_variable_frame_rate_keeps_the_times(tmp_path, frames):
    times_ms = np.cumsum([0, *[100, 300] * 5, 100])
    info = video_info(write(tmp_path / "phone.mp4", frames, times_ms=times_ms.tolist()))
    np.testing.assert_allclose(info.times_s, times_ms / 1000, atol=1e-4)
    assert info.fps == pytest.approx(11 / 2.1, rel=1e-3)
    assert_same_frames(read_all(info), frames)


@pytest.mark.parametrize("clockwise", [90, 180, 270])
def test_rotated_by_metadata_comes_back_upright(tmp_path, frames, clockwise):
    tall = frames[:, :, 20:84]
    plain = video_info(write(tmp_path / "plain.mp4", tall))
    turned_path = write(tmp_path / "turned.mp4", tall, prepare=lambda stream: stream.set_display_rotation(-clockwise))
    turned = video_info(turned_path)
    expected = np.rot90(read_all(plain), -clockwise // 90, axes=(1, 2))
    assert turned.rotation_deg == clockwise and (turned.height_px, turned.width_px) == expected.shape[1:3]
    np.testing.assert_array_equal(read_all(turned), expected)


def test_rotation_as_a_phone_writes_it(tmp_path, frames):
    """The matrix (0, 1, 0, -1, 0, 0, height, 0, 1) in the track header: ISO 14496-12, 90 degrees clockwise."""
    data = bytearray(write(tmp_path / "plain.mp4", frames[:, :, :96]).read_bytes())
    place = data.index(b"tkhd") + 4 + 40
    assert struct.unpack_from(">9i", data, place) == (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    struct.pack_into(">9i", data, place, 0, 65536, 0, -65536, 0, 0, 128 * 65536, 0, 1 << 30)
    (tmp_path / "phone.mp4").write_bytes(data)
    info = video_info(tmp_path / "phone.mp4")
    assert (info.rotation_deg, info.width_px, info.height_px) == (90, 128, 96)
    assert_same_frames(read_all(info), np.rot90(frames[:, :, :96], -1, axes=(1, 2)))


def test_video_with_longer_sound(tmp_path, frames):
    info = video_info(write_with_audio(tmp_path / "talk.mp4", frames))
    assert info.num_frames == 12
    assert_same_frames(read_all(info), frames)


def cut_off(path: Path, part: float) -> Path:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    return path


def damaged(path: Path) -> Path:
    """Zeros in the middle half of the pictures, the index whole: what a download that left a gap looks like."""
    data = bytearray(path.read_bytes())
    first, last = data.index(b"mdat") + 4, data.index(b"moov") - 4
    gap = slice(first + (last - first) // 4, first + (last - first) * 3 // 4)
    data[gap] = bytes(gap.stop - gap.start)
    path.write_bytes(data)
    return path


def text_file(path: Path) -> Path:
    path.write_text("no video\n" * 100)
    return path


def empty_file(path: Path) -> Path:
    path.touch()
    return path


def header_only(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        container.start_encoding()
    return path


def picture_file(path: Path) -> Path:
    Image.new("RGB", (32, 32)).save(path, format="PNG")
    return path


def cover_only(path: Path) -> Path:
    """Music with a cover picture, which FFmpeg lists as a video track."""
    with av.open(str(path), "w", format="mp4") as container:
        audio, cover = container.add_stream("aac", rate=48000), container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 64, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame(64, 64, "rgb24")))
        container.mux(cover.encode())
        for start in range(0, 9600, 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 48000, start
            container.mux(audio.encode(frame))
        container.mux(audio.encode())
    return path


def gif_file(path: Path, frames: np.ndarray) -> Path:
    pictures = [Image.fromarray(frame) for frame in frames]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=100)
    return path


def without_trailer(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-1])
    return path


def squeeze(stream: av.VideoStream) -> None:
    stream.codec_context.sample_aspect_ratio = Fraction(4, 3)


BAD = {
    "missing": (lambda d, f: d / "clip.mp4", "there is no such file"),
    "zero bytes": (lambda d, f: empty_file(d / "clip.mp4"), "empty .0 bytes."),
    "text": (lambda d, f: text_file(d / "clip.mp4"), "no video in a known format"),
    "picture": (lambda d, f: picture_file(d / "clip.mp4"), "it is a picture"),
    "audio": (lambda d, f: write_with_audio(d / "clip.mp4", None), r"no video track \(it holds: audio\)"),
    "cover": (lambda d, f: cover_only(d / "clip.m4a"), r"no video track \(it holds: audio\)"),
    "no frames": (lambda d, f: header_only(d / "clip.mp4"), "no video track|no frame"),
    "cut mp4": (lambda d, f: cut_off(write(d / "clip.mp4", f), 0.6), "truncated"),
    "cut mp4, index first": (lambda d, f: cut_off(write(d / "clip.mp4", f, movflags="faststart"), 0.6), "truncated"),
    "damaged mp4": (lambda d, f: damaged(write(d / "clip.mp4", f)), "truncated or damaged"),
    "cut webm": (lambda d, f: cut_off(write(d / "clip.webm", f, "libvpx-vp9"), 0.6), r"truncated: \d.\d\d s of 1.50 s"),
    "cut gif": (lambda d, f: cut_off(gif_file(d / "clip.gif", f), 0.6), "truncated"),
    "gif without end": (lambda d, f: without_trailer(gif_file(d / "clip.gif", f)), "truncated after 12 frames"),
    "hidden frames": (
        lambda d, f: copy_packets(
            write(d / "a.mp4", f), d / "clip.mp4", earlier=5 * 2048, avoid_negative_ts="disabled", use_editlist="1"
        ),
        "shows 7 frames, but decord finds 12",
    ),
    "no first picture": (
        lambda d, f: copy_packets(write(d / "a.mp4", f, "mpeg4"), d / "clip.mp4", skip=3),
        "does not begin with a whole picture",
    ),
    "mirrored": (
        lambda d, f: write(d / "clip.mp4", f, prepare=lambda s: s.set_display_rotation(0, hflip=True)),
        "mirrored.*stored upright: ffmpeg",
    ),
    "odd angle": (
        lambda d, f: write(d / "clip.mp4", f, prepare=lambda s: s.set_display_rotation(30)),
        r"by 33\d degrees.*stored upright: ffmpeg",
    ),
    "wide pixels": (lambda d, f: write(d / "clip.mp4", f, prepare=squeeze), r"not square \(4/3\).*setsar=1"),
    "width": (lambda d, f: write(d / "clip.mp4", f[:, :, :48]), "decord cannot read .* 48 x 128 px"),
    "codec": (lambda d, f: write(d / "clip.mp4", f, "libsvtav1"), r"cannot read it \(codec .*av1.*convert it: ffmpeg"),
}  # fmt: skip


@pytest.mark.parametrize("make", BAD)
def test_bad_files_are_refused_by_name(tmp_path, frames, make):
    write_file, message = BAD[make]
    path = write_file(tmp_path, frames)
    with pytest.raises(BadVideo, match=message) as caught:
        video_info(path)
    assert caught.value.path == path and repr(str(path)) in str(caught.value)


def test_a_file_that_changes_is_noticed(tmp_path, frames):
    for name, rewrite in (("a.mp4", write), ("a.gif", gif_file)):
        info = video_info(rewrite(tmp_path / name, frames))
        rewrite(tmp_path / name, frames[:5])
        with pytest.raises(BadVideo, match="12 frames before"):
            read_frames(info, [0, 7])
        (tmp_path / name).unlink()
        with pytest.raises(BadVideo, match="is gone"):
            read_frames(info, [0])


@pytest.fixture
def frame_folder(tmp_path) -> Path:
    """frame 8 to frame 11, each as bright as its number, and a hidden file."""
    folder = tmp_path / "frames"
    folder.mkdir()
    (folder / ".DS_Store").write_text("x")
    for number in (8, 9, 10, 11):
        Image.new("RGB", (30, 20), (number, number, number)).save(folder / f"frame {number}.png")
    return folder


def test_folder_of_frames_in_the_order_of_numbers(frame_folder):
    info = video_info(frame_folder, frames_fps=12.5)
    assert (info.num_frames, info.fps, info.width_px, info.height_px) == (4, 12.5, 30, 20)
    np.testing.assert_allclose(info.times_s, [0, 0.08, 0.16, 0.24])
    assert read_all(info)[:, 0, 0, 0].tolist() == [8, 9, 10, 11]
    (frame_folder / "frame 9.png").unlink()
    with pytest.raises(BadVideo, match="4 frames before and has 3 now"):
        read_frames(info, [0])


def test_bad_folders_of_frames(frame_folder):
    def refusal(**settings) -> BadVideo:
        with pytest.raises(BadVideo) as caught:
            video_info(frame_folder, **settings)
        return caught.value

    assert "pass frames_fps > 0" in str(refusal())
    Image.new("RGB", (30, 21)).save(frame_folder / "frame 12.png")
    error = refusal(frames_fps=8)
    assert error.path.name == "frame 12.png" and "30 x 21 px, but 'frame 8.png' is 30 x 20" in str(error)
    (frame_folder / "frame 12.png").write_bytes((frame_folder / "frame 11.png").read_bytes()[:-25])
    assert "truncated or damaged" in str(refusal(frames_fps=8))
    (frame_folder / "frame 12.png").rename(frame_folder / "frame 011.png")
    assert "same number as 'frame 011.png'" in str(refusal(frames_fps=8))
    (frame_folder / "frame 011.png").rename(frame_folder / "notes.txt")
    assert refusal(frames_fps=8).path.name == "notes.txt"
    for path in frame_folder.iterdir():
        path.unlink()
    assert "holds no frames" in str(refusal(frames_fps=8))


def test_crop_is_central_and_not_distorted():
    """A wide frame with a square in its centre: the square stays square and in the centre, what is outside goes."""
    frame = np.zeros((1, 60, 120, 3), np.uint8)
    frame[0, 20:40, 50:70] = 255
    frame[0, :, :20] = 99
    cut = crop_frames(frame, 30, 30)
    assert (
        cut.shape == (1, 30, 30, 3)
        and cut[0, 12:18, 12:18].min() > 240
        and cut[0, 15].max(1).tolist() == cut[0, :, 15].max(1).tolist()
    )
    assert not (cut == 99).any()
    tall = crop_frames(np.swapaxes(frame, 1, 2), 30, 30)
    np.testing.assert_array_equal(tall, np.swapaxes(cut, 1, 2))
    np.testing.assert_array_equal(crop_frames(frame, 60, 120), frame)


def test_scaling_is_antialiased():
    """Lines one pixel wide become their mean grey, not black or white."""
    lines = np.zeros((1, 64, 64, 3), np.uint8)
    lines[:, :, ::2] = 255
    inside = crop_frames(lines, 8, 8)[0, :, 1:-1].astype(int)
    assert abs(inside - 127.5).max() < 12


def test_clip_values_and_layout():
    frames = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    frames[1, 2, 3] = [0, 255, 51]
    clip = to_clip(frames)
    assert clip.shape == (3, 2, 4, 5) and clip.is_contiguous()
    assert clip[:, 1, 2, 3].tolist() == pytest.approx([-1, 1, -0.6])


def test_nearest_size_keeps_the_aspect():
    assert nearest_size(720, 1280, short_side_px=256, multiple_px=64) == (256, 448)  # 455.1 rounded
    assert nearest_size(1280, 720, short_side_px=256, multiple_px=64) == (448, 256)
    assert nearest_size(320, 576, short_side_px=320, multiple_px=64) == (320, 576)
    assert nearest_size(240, 320, short_side_px=64, multiple_px=8) == (64, 88)  # 85.3 rounded
    assert nearest_size(100, 100, short_side_px=64, multiple_px=64) == (64, 64)
    with pytest.raises(ValueError, match="multiples of 64 px, got 300 x 300; nearest: 320 x 320"):
        nearest_size(720, 1280, short_side_px=300, multiple_px=64)
