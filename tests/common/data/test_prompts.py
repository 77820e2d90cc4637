"""Template lists and the reader of the DreamBooth benchmark's folder."""

import pytest

from common.data.prompts import OBJECT_TEMPLATES, STYLE_TEMPLATES, fill_templates, read_dreambooth

PROMPTS = """Classes

subject_name,class
backpack,backpack
cat2,cat
bear_plushie,stuffed animal

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
'a cube shaped {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} wearing a red hat'.format(unique_token, class_token),
"a {0} {1}'s portrait".format(unique_token, class_token)
]
"""


def test_template_lists_have_the_published_counts():
    """27 object lines, all distinct; 19 style lines of which 17 are distinct."""
    assert (len(OBJECT_TEMPLATES), len(set(OBJECT_TEMPLATES))) == (27, 27)
    assert (len(STYLE_TEMPLATES), len(set(STYLE_TEMPLATES))) == (19, 17)
    assert all(template.count("{}") == 1 for template in OBJECT_TEMPLATES + STYLE_TEMPLATES)
    assert fill_templates(OBJECT_TEMPLATES, "<cat-toy>")[1] == "a rendering of a <cat-toy>"


@pytest.mark.parametrize("layout", ["", "dataset"])
def test_reads_a_part_of_the_benchmark(tmp_path, layout):
    folder = tmp_path / layout
    for name in ("cat2", "bear_plushie", ".git"):
        (folder / name).mkdir(parents=True)
    (folder / "prompts_and_classes.txt").write_bytes(PROMPTS.replace("\n", "\r\n").encode())
    bear, cat = read_dreambooth(tmp_path)
    assert (bear.name, bear.class_noun, bear.is_live, bear.images_dir) == (
        "bear_plushie",
        "stuffed animal",
        False,
        folder / "bear_plushie",
    )
    assert bear.prompts("sks") == ["a sks stuffed animal in the jungle", "a cube shaped sks stuffed animal"]
    assert cat.is_live and cat.prompts("") == ["a cat wearing a red hat", "a cat's portrait"]


def test_layout_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no prompts_and_classes.txt in .*pass the folder"):
        read_dreambooth(tmp_path)
    file = tmp_path / "prompts_and_classes.txt"
    file.write_text("subject_name,class\n")
    with pytest.raises(ValueError, match="has no line 'Object Prompts'"):
        read_dreambooth(tmp_path)
    file.write_text("subject_name,class\ncat,cat\nObject Prompts\nLive Subject Prompts\n")
    with pytest.raises(ValueError, match="read 1 classes, 0 object and 0 live prompts"):
        read_dreambooth(tmp_path)
    file.write_text(PROMPTS)
    with pytest.raises(ValueError, match="no subject folder"):
        read_dreambooth(tmp_path)
    (tmp_path / "my_mug").mkdir()
    with pytest.raises(ValueError, match=r"names no class for the folders \['my_mug'\]; add a line"):
        read_dreambooth(tmp_path)
