from __future__ import annotations

import contextlib
import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvr_partition import KVRError, OutOfRangeError, Partition, PartitionError, PartitionTable, load
from kvr_partition.errors import FileFormatError, StorageError, UnsupportedError
from kvr_partition.export import export
from kvr_partition.table import Entry

TABLE = PartitionTable(
    [
        Entry(8192, (2900, 2100, 1700, 1492), ttft_s=0.41, interval_s=(0.40, 0.43), measured=8),
        Entry(12288, (4300, 3100, 2600, 2288)),
        Entry(512, (300, 212)),
    ]
)


@st.composite
def tables(draw: st.DrawFn) -> PartitionTable:
    ranks = draw(st.integers(1, 6))
    contexts = draw(st.lists(st.integers(ranks, 5_000), min_size=1, max_size=5, unique=True))
    shares = st.lists(st.floats(0.01, 1), min_size=ranks, max_size=ranks)
    return PartitionTable(
        Entry(one, Partition.from_fractions(draw(shares), one).sizes, quantum=draw(st.integers(1, one // ranks)))
        for one in contexts
    )


@given(tables(), st.data())
def test_every_context_inside_the_range_has_a_valid_partition(table: PartitionTable, data: st.DataObject) -> None:
    contexts = table.contexts(table.ranks[0])
    context = data.draw(st.integers(contexts[0], contexts[-1]))
    found = table.lookup(context)
    assert found.partition.context == context
    assert found.partition.ranks == table.ranks[0]
    assert found.source == ("searched" if context in contexts else "interpolated")


@given(tables())
def test_a_file_gives_back_the_same_table(table: PartitionTable) -> None:
    assert PartitionTable.from_json(table.to_json()).entries == table.entries


def test_interpolation_is_linear_between_the_fractions_of_the_two_nearest() -> None:
    # The paper's example: 10k between 8k and 12k on 4 GPUs.
    table = PartitionTable(
        [
            Entry(8000, (2880, 2040, 1640, 1440)),
            Entry(12000, (4080, 3060, 2580, 2280)),
            Entry(16000, (8000, 4000, 2000, 2000)),
        ]
    )
    assert table.lookup(10000).partition.sizes == (3500, 2550, 2100, 1850)


def test_between_searches_chunks_keep_to_their_quanta() -> None:
    searched = [
        Entry(4096, (1152, 1024, 1024, 896), quantum=64),
        Entry(8192, (2304, 2048, 2048, 1792), quantum=128),
        Entry(16384, (4864, 4224, 3840, 3456), quantum=128),
    ]
    table = PartitionTable(searched)
    assert table.lookup(12288).partition.sizes == (3584, 3072, 2944, 2688)
    assert all(boundary % 64 == 0 for boundary in table.lookup(5248).partition.boundaries)
    assert any(boundary % 128 for boundary in table.lookup(5248).partition.boundaries[:-1])
    assert table.lookup(8192).source == "searched"
    for quantum in (0, 1025):
        with pytest.raises(PartitionError, match="leaves each of 4 ranks one"):
            table.with_entry(Entry(4096, (1024,) * 4, quantum=quantum))


def test_outside_the_searched_range_there_is_no_answer() -> None:
    for context in (8191, 12289):
        with pytest.raises(OutOfRangeError, match="searched range of 8192 to 12288"):
            TABLE.lookup(context, ranks=4)
    with pytest.raises(OutOfRangeError, match="nothing was searched for 3 ranks; the table has 2, 4"):
        TABLE.lookup(8192, ranks=3)
    with pytest.raises(OutOfRangeError, match="past 5 with 4 ranks; the table has past 0"):
        TABLE.lookup(8192, ranks=4, past=5)
    with pytest.raises(OutOfRangeError, match="say which"):
        TABLE.lookup(8192)


def test_an_entry_replaces_the_one_for_the_same_context() -> None:
    changed = TABLE.with_entry(Entry(512, (256, 256)))
    assert changed.lookup(512, ranks=2).partition.sizes == (256, 256)
    assert TABLE.lookup(512, ranks=2).partition.sizes == (300, 212)
    assert changed.without(512, 2).ranks == (4,)
    with pytest.raises(PartitionError, match="two entries for context 512"):
        PartitionTable([*TABLE.entries, Entry(512, (1, 511))])


def test_save_and_load(tmp_path: Path) -> None:
    TABLE.save(tmp_path / "table.json")
    assert load(tmp_path / "table.json").entries == TABLE.entries
    assert [entry.name for entry in tmp_path.iterdir()] == ["table.json"]


def damaged(**changes: object) -> bytes:
    document = json.loads(TABLE.to_json())
    document["entries"] = document["entries"][:1]
    document["entries"][0].update(changes)
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not one of our JSON files"),
        (b"[1, 2]", "not one of our JSON files"),
        (b'{"schema": "kvr-partition/table/9", "entries": []}', "has schema 'kvr-partition/table/9'"),
        (TABLE.to_json()[:-40], "not one of our JSON files"),
        (damaged(sizes=[300, 213]), "sum to 513, not to their context of 512"),
        (damaged(sizes=[513, -1]), "size of rank 1 must be at least 1"),
        (damaged(sizes=[]), "at least one chunk"),
        (damaged(sizes="300/212"), r"entries\[.*\]\.sizes"),
        (damaged(context=512.5), r"entries\[.*\]\.context"),
        (damaged(extra=1), "unknown field `extra`"),
        (damaged(ttft_s=-1.0), r"entries\[0\] has a time that cannot be"),
        (damaged(interval_s=[2.0, 1.0]), r"entries\[0\] has a time that cannot be"),
        (TABLE.to_json().replace(b"0.41", b"NaN"), "not one of our JSON files"),
        (b'{"schema":' * 100_000, "not one of our JSON files"),
    ],
)
def test_a_file_that_is_no_table_is_refused_by_file_and_field(tmp_path: Path, content: bytes, says: str) -> None:
    file = tmp_path / "bad.json"
    file.write_bytes(content)
    with pytest.raises(FileFormatError, match=says) as caught:
        load(file)
    assert "bad.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.binary(max_size=300), st.integers(0, 2_000))
def test_no_damage_to_a_file_gets_past_as_anything_but_our_error(noise: bytes, at: int) -> None:
    content = TABLE.to_json()
    at %= len(content)
    with contextlib.suppress(KVRError):
        PartitionTable.from_json(content[:at] + noise + content[at + len(noise) :])


def test_missing_and_odd_paths(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="does not exist"):
        load(tmp_path / "nothing.json")
    with pytest.raises(FileFormatError, match="is a folder"):
        load(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    TABLE.save(tmp_path / "table.json")
    before = (tmp_path / "table.json").read_bytes()
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)); "
    code = limit + "from kvr_partition import load; import sys; t = load(sys.argv[1]); t.save(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "table.json")], capture_output=True, text=True, check=False
    )
    assert "StorageError" in done.stderr
    assert (tmp_path / "table.json").read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["table.json"]
    assert issubclass(StorageError, KVRError)


def test_exports_agree_with_the_table() -> None:
    assert PartitionTable.from_json(export(TABLE, "json").encode()).entries == TABLE.entries
    rows = list(csv.DictReader(io.StringIO(export(TABLE, "csv"))))
    assert [(int(row["ranks"]), int(row["context"]), row["sizes"]) for row in rows] == [
        (entry.ranks, entry.context, "/".join(map(str, entry.sizes))) for entry in TABLE.entries
    ]
    assert float(rows[1]["ttft_s"]) == 0.41
    markdown = export(TABLE, "markdown")
    assert markdown.count("\n") == 2 + len(TABLE.entries)
    assert "| 4 | 8192 | 0 | 2900 / 2100 / 1700 / 1492 | 0.354 / 0.256 / 0.208 / 0.182 | 410.0 |" in markdown
    with pytest.raises(UnsupportedError, match="unknown format"):
        export(TABLE, "xml")
