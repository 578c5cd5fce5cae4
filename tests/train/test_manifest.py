"""The manifest notices every way in which a file can differ from the one that was written."""

import json

import pytest
from etils import epath

from jaxreason.train import manifest


@pytest.fixture
def folder(tmp_path) -> epath.Path:
    root = epath.Path(tmp_path) / "00000007"
    (root / "arrays" / "params").mkdir(parents=True)
    (root / "arrays" / "params" / "data").write_bytes(bytes(range(256)) * 40)
    (root / "meta.json").write_text('{"step": 7}')
    (root / "empty").write_bytes(b"")
    manifest.write(root, 7)
    return root


def test_lists_every_file_with_size_and_digest(folder):
    files = manifest.verify(folder)["files"]
    assert sorted(files) == ["arrays/params/data", "empty", "meta.json"]
    assert files["empty"] == {
        "size": 0,
        "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    }
    assert files["arrays/params/data"]["size"] == 256 * 40
    assert manifest.read(folder)["step"] == 7
    assert manifest.is_complete(folder)


def test_the_manifest_appears_only_whole(folder):
    assert not list(folder.glob("*.tmp"))


def test_no_manifest_is_an_unfinished_save(folder):
    (folder / manifest.NAME).unlink()
    assert not manifest.is_complete(folder)
    with pytest.raises(manifest.Unfinished, match="manifest.json is missing"):
        manifest.verify(folder)


@pytest.mark.parametrize("bit", range(8))
def test_one_flipped_bit_is_named(folder, bit):
    path = folder / "arrays" / "params" / "data"
    data = bytearray(path.read_bytes())
    data[5000] ^= 1 << bit
    path.write_bytes(bytes(data))
    with pytest.raises(manifest.Damaged, match="arrays/params/data has SHA-256 .* instead of"):
        manifest.verify(folder)


def test_a_missing_and_a_cut_file_are_named(folder):
    (folder / "meta.json").write_text('{"step": 7')
    with pytest.raises(manifest.Damaged, match="meta.json has 10 bytes instead of 11"):
        manifest.verify(folder)
    (folder / "meta.json").unlink()
    with pytest.raises(manifest.Damaged, match="meta.json is missing"):
        manifest.verify(folder)


def test_every_bit_of_the_manifest_counts(folder):
    whole = (folder / manifest.NAME).read_bytes()
    for position in range(len(whole)):
        broken = bytearray(whole)
        broken[position] ^= 1 << (position % 8)
        (folder / manifest.NAME).write_bytes(bytes(broken))
        with pytest.raises(manifest.Damaged, match="manifest.json"):
            manifest.read(folder)
        (folder / manifest.NAME).write_bytes(whole[:position])
        with pytest.raises(manifest.Damaged, match="manifest.json"):
            manifest.read(folder)


def test_a_manifest_edited_by_hand_is_refused(folder):
    content = json.loads((folder / manifest.NAME).read_text())
    content["files"]["meta.json"]["size"] = 12
    (folder / manifest.NAME).write_text(json.dumps(content, indent=0, sort_keys=True) + "\n")
    with pytest.raises(manifest.Damaged, match="does not match its own SHA-256"):
        manifest.read(folder)


def test_only_the_chosen_files_are_read(folder):
    (folder / "arrays" / "params" / "data").unlink()
    manifest.verify(folder, lambda path: not path.startswith("arrays/"))
    with pytest.raises(manifest.Damaged):
        manifest.verify(folder)


def test_files_that_are_not_listed_do_not_matter(folder):
    (folder / "notes.txt").write_text("kept by hand")
    manifest.verify(folder)


def test_steps_and_removal(tmp_path, folder):
    root = epath.Path(tmp_path)
    for name in ("00000012", "123456789", "tmp", "0001"):
        (root / name).mkdir()
    (root / "00000003").write_text("a file, not a folder")
    assert manifest.steps(root) == [7, 12, 123456789]
    assert manifest.steps(root / "none") == []
    manifest.remove(folder)
    manifest.remove(root / "00000099")
    assert manifest.steps(root) == [12, 123456789]
