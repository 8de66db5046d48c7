import json
import sys
import tarfile

import pytest

from revnet.data import ShardIndex, write_shards
from tests.data.folders import fill

# Python warns of processes that are forked from one with threads, as torch's data loader does.
FORK = "ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def members(directory):
    """Path suffix and content of every image, with its label."""
    found = []
    for path in sorted(directory.glob("*.tar")):
        with tarfile.open(path) as tar:
            read = {member.name: tar.extractfile(member).read() for member in tar}
        names = sorted(name for name in read if name.endswith(".png"))
        found += [(path.name.partition("-")[0], read[name], int(read[name[:-3] + "cls"])) for name in names]
    return found


def test_every_image_is_in_one_shard(tmp_path):
    root, out = fill(tmp_path / "images", {"train": 25, "val": 6}), tmp_path / "deep" / "shards"
    index = write_shards(root, out, shard_size=10, num_workers=0)
    assert ShardIndex.read(out) == index
    index.check(out)
    assert {split: [shard.count for shard in shards] for split, shards in index.splits.items()} == {
        "train": [10, 10, 5],
        "val": [6],
    }
    expected = [
        (split, path.read_bytes(), label)
        for split in ("train", "val")
        for label, name in enumerate(index.classes)
        for path in (root / split / name).iterdir()
    ]
    written = members(out)
    assert sorted(written) == sorted(expected)
    assert [label for _, _, label in written] != [label for _, _, label in sorted(expected)]  # shuffled


@pytest.mark.parametrize("name", ["train-000001.tar", "index.json"])
def test_shards_without_a_record_are_not_written_over(tmp_path, name):
    root, out = fill(tmp_path / "images", {"train": 25, "val": 6}), tmp_path / "shards"
    out.mkdir()
    (out / name).write_text("of somebody else")
    with pytest.raises(ValueError, match=rf"shards holds {name}, but no record of a conversion .*: choose another out"):
        write_shards(root, out, shard_size=10, num_workers=0)
    assert contents(out) == {name: b"of somebody else"}


@pytest.mark.filterwarnings(FORK)
def test_an_interrupted_conversion_goes_on_and_ends_in_the_same_bytes(tmp_path, monkeypatch):
    root = fill(tmp_path / "images", {"train": 25, "test": 6})
    write_shards(root, tmp_path / "whole", shard_size=5, num_workers=2)
    out = tmp_path / "interrupted"
    written = []

    def write(planned):
        if len(written) == 3:
            planned.file.with_suffix(".part").write_bytes(b"half a shard")
            raise KeyboardInterrupt
        written.append(planned.file.name)
        return original(planned)

    module = sys.modules["revnet.data.write_shards"]
    original = module.PlannedShard.write
    monkeypatch.setattr(module.PlannedShard, "write", write)
    with pytest.raises(KeyboardInterrupt):
        write_shards(root, out, shard_size=5, num_workers=0)
    assert not (out / "index.json").exists()
    assert len(list(out.glob("*.tar"))) == 3
    with (out / "finished.jsonl").open("a") as record:
        record.write('{"file": "train-0000')  # killed while it wrote a line
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    written.clear()
    monkeypatch.setattr(module.PlannedShard, "write", original)
    write_shards(root, out, shard_size=5, num_workers=0)
    assert all((out / name).stat().st_mtime_ns == time for name, time in times.items())
    assert contents(out) == contents(tmp_path / "whole")


def test_a_damaged_shard_is_written_again(tmp_path):
    root, out = fill(tmp_path / "images", {"train": 12, "test": 4}), tmp_path / "shards"
    write_shards(root, out, shard_size=4, num_workers=0)
    whole = contents(out)
    (out / "train-000001.tar").write_bytes(whole["train-000001.tar"][:-600])
    (out / "train-000002.tar").unlink()
    index = ShardIndex.read(out)
    with pytest.raises(
        ValueError,
        match=r"train-000001.tar has [\d,]+ bytes instead of [\d,]+ and 1 more are damaged; run revnet-shards",
    ):
        index.check(out)
    write_shards(root, out, shard_size=4, num_workers=0)
    index.check(out)
    again = contents(out)
    assert {name: again[name] for name in whole if name.endswith((".tar", "index.json"))} == {
        name: content for name, content in whole.items() if name.endswith((".tar", "index.json"))
    }


def test_all_unreadable_images_are_named_at_the_end(tmp_path):
    root, out = fill(tmp_path / "images", {"train": 12, "test": 4}), tmp_path / "shards"
    broken = [root / "train" / "cat" / "000.png", root / "train" / "dog" / "003.png", root / "test" / "dog" / "001.png"]
    for file in broken:
        file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(ValueError, match=f"^3 images in {root} cannot be read: .*skip_unreadable=true") as caught:
        write_shards(root, out, shard_size=5, num_workers=0)
    assert all(str(file.relative_to(root)) in str(caught.value) for file in broken)
    assert not (out / "index.json").exists()
    index = write_shards(root, out, shard_size=5, num_workers=0, skip_unreadable=True)
    assert sum(shard.count for shards in index.splits.values() for shard in shards) == 13
    assert len(members(out)) == 13


def test_another_conversion_is_not_written_over(tmp_path):
    root, out = fill(tmp_path / "images", {"train": 6, "test": 4}), tmp_path / "shards"
    write_shards(root, out, shard_size=3, num_workers=0)
    with pytest.raises(ValueError, match=f"^out={out} holds shards of other images, .* choose another out"):
        write_shards(root, out, shard_size=2, num_workers=0)


@pytest.mark.parametrize("options", [{"shard_size": 0}, {"num_workers": -1}, {"seed": -1}, {"seed": 2**32}])
def test_an_odd_argument_is_named(tmp_path, options):
    (name,) = options
    with pytest.raises(ValueError, match=f"^{name}={options[name]}: give"):
        write_shards(tmp_path, tmp_path, **options)


@pytest.mark.parametrize("content", ["", "[]", "{}", json.dumps({"classes": [], "splits": {"train": [{}]}})])
def test_what_is_no_index_is_named(tmp_path, content):
    with pytest.raises(FileNotFoundError, match=r"index\.json: no such file; write it by revnet-shards"):
        ShardIndex.read(tmp_path)
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(ValueError, match=r"index\.json is not an index of shards"):
        ShardIndex.read(tmp_path)


def test_an_index_with_more_in_it_is_read(tmp_path):
    """As that of another version."""
    shard = {"file": "train-000000.tar", "count": 1, "bytes": 3, "sha256": "0"}
    (tmp_path / "index.json").write_text(json.dumps({"classes": ["a"], "splits": {"train": [shard]}}))
    index = ShardIndex.read(tmp_path)
    assert (index.splits["train"][0].count, index.splits["train"][0].unreadable) == (1, ())
