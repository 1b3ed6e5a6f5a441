"""MeasurementLog: every sample ever taken in an out directory, one JSON line each, never rewritten."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

from kvr_partition import jsonfile
from kvr_partition.errors import FileFormatError
from kvr_partition.jsonfile import set_torn_tail_aside, write_error
from kvr_partition.measurement import Failure, Measurement, Sample
from kvr_partition.partition import Partition
from kvr_partition.provenance import Provenance

SCHEMA = "kvr-partition/measurements/2"

GUESS = "guess"
"""The purpose of measurements that costs are guessed from."""


def purpose_of(what: Literal["search", "compare", "predict"], context: int, past: int = 0) -> str:
    """The purpose of a context's measurements, as the log names it.

    Args:
        what: ``"search"``: of one partition after the other; ``"compare"``: of the best ones side by side with the
            baselines; ``"predict"``: of what a table says of a context that was held out.
    """
    return f"{what}/{context}" + (f"+{past}" if past else "")


Key = tuple[str, str, tuple[int, ...], int, int]
"""Purpose, method, sizes, past and noise: what a finished measurement is found by."""


class KeptKV(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a model keeps of the tokens it has read, as a probe of it showed.

    Attributes:
        layers: layers that keep any.
        entry_bytes: bytes that a token keeps in one of them, the mean over all; of all prompts of a batch.
    """

    layers: int
    entry_bytes: int


class RunLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="run", tag_field="type"):
    """The start of a run: the conditions of every later line that names it."""

    schema: str
    run: str
    provenance: Provenance
    kept: KeptKV | None = None
    """None in older logs; a configuration says it of most models, but not of all."""


class SampleLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="sample", tag_field="type"):
    """One timed prefill, written the moment it is known. Warm-up samples are kept, marked, and not used."""

    run: str
    purpose: str
    method: str
    sizes: tuple[int, ...]
    warmup: bool
    sample: Sample
    noise: int = 0
    past: int = 0

    @property
    def of(self) -> Key:
        """Which candidate it is of."""
        return self.purpose, self.method, self.sizes, self.past, self.noise


class MeasurementLine(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="measurement", tag_field="type"
):
    """A candidate is finished: its samples are the last ``samples`` lines for it in this run."""

    run: str
    purpose: str
    method: str
    sizes: tuple[int, ...]
    samples: int
    stopped: str
    failure: Failure | None = None
    noise: int = 0
    past: int = 0

    @property
    def of(self) -> Key:
        """Which candidate it is of."""
        return self.purpose, self.method, self.sizes, self.past, self.noise


class ChunkLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="chunk", tag_field="type"):
    """A chunk timed on all ranks at once, without links; one figure a rank, in seconds.

    Timed ``alone``, the first rank's only, while all others were idle. With ``layers``, only so many layers of it.
    """

    run: str
    chunk: int
    prefix: int
    warmup: bool
    seconds: tuple[float, ...]
    first_kv_s: tuple[float, ...] = ()
    """Until the first layer's KV was ready; empty in older logs."""
    alone: bool = False
    layers: int | None = None


class LinkLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="link", tag_field="type"):
    """Messages from each rank to the next, timed; for each link its seconds, message by message."""

    run: str
    nbytes: int
    warmup: bool
    seconds: tuple[tuple[float, ...], ...]


class OperationsLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="operations", tag_field="type"):
    """What a prefill of the model computes, counted; see `profiler.models.Operations`."""

    run: str
    per_token: float
    per_pair: float
    before_kv: float


Line = RunLine | SampleLine | MeasurementLine | ChunkLine | LinkLine | OperationsLine


def _up_to_date(text: bytes) -> bytes:
    """A line of the log; one that begins a run may be of an older schema than the others."""
    # Only those have one, and most lines are samples.
    if b'"schema"' not in text or SCHEMA.encode() in text:
        return text
    line = msgspec.json.decode(text)
    return msgspec.json.encode(jsonfile.upgraded(line, SCHEMA)) if isinstance(line, dict) else text


def _conditions(origin: Provenance) -> bytes:
    """Equal for runs whose measurements may stand for each other."""
    return msgspec.json.encode(origin.conditions(), order="sorted")


class Records:
    """What lines of a log say: those of all its runs, or of the runs under the same conditions."""

    def __init__(self) -> None:
        self._samples: dict[tuple[str, Key], list[Sample]] = {}
        self._finished: dict[Key, Measurement] = {}
        self._chunks: list[ChunkLine] = []
        self._links: list[LinkLine] = []
        self._operations: OperationsLine | None = None
        self._kept: KeptKV | None = None

    def finished(self, purpose: str, method: str, partition: Partition, noise: int = 0) -> Measurement | None:
        """The finished measurement of a candidate, if there is one."""
        return self._finished.get((purpose, method, partition.sizes, partition.past, noise))

    def measurements(self, purpose: str | None = None) -> list[Measurement]:
        """All finished measurements, in the order they finished, of one purpose or of all."""
        return [found for of, found in self._finished.items() if purpose in (None, of[0])]

    @property
    def chunks(self) -> list[ChunkLine]:
        """All timed chunks, whole or in part."""
        return list(self._chunks)

    @property
    def links(self) -> list[LinkLine]:
        """All timed messages."""
        return list(self._links)

    @property
    def operations(self) -> OperationsLine | None:
        """What the model computes, if costs were guessed from that."""
        return self._operations

    @property
    def kept(self) -> KeptKV | None:
        """What the model keeps of a token, if the log says it."""
        return self._kept

    def note(self, line: Line) -> None:
        """Take a line in."""
        match line:
            case RunLine():
                self._kept = line.kept or self._kept
            case ChunkLine():
                self._chunks.append(line)
            case LinkLine():
                self._links.append(line)
            case OperationsLine():
                self._operations = line
            case SampleLine() if not line.warmup:
                self._samples.setdefault((line.run, line.of), []).append(line.sample)
            case MeasurementLine():
                samples = self._samples.get((line.run, line.of), [])
                self._finished[line.of] = Measurement(
                    method=line.method,
                    sizes=line.sizes,
                    samples=tuple(samples[-line.samples :] if line.samples else ()),
                    stopped=line.stopped,
                    run=line.run,
                    failure=line.failure,
                    noise=line.noise,
                    past=line.past,
                )


class MeasurementLog(Records):
    """Append-only log in a file. Safe against being killed at any moment and against a full disk.

    As `Records` it is all that it holds. A log may hold runs under several conditions, such as links that were
    held to a bandwidth for a while. What was measured under one of them never stands for another: `of_run` and
    `under` give what was measured under the same.

    A last line without its end, which is what a kill or a full disk leaves, is moved to a file beside the
    log (``.torn``) when the log is opened; `repaired` then says so. Any other damage is refused.

    Args:
        path: the file; made when missing.

    Raises:
        FileFormatError: a line that is not one of ours, with its number.
        StorageError: the file cannot be opened for writing.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self.repaired = self.path.exists() and set_torn_tail_aside(self.path)
            self._file = self.path.open("ab", buffering=0)
        except OSError as error:
            raise write_error(self.path, error) from None
        try:
            lines = list(self._read())
        except BaseException:
            self._file.close()
            raise
        super().__init__()
        self._provenance: dict[str, Provenance] = {}
        self._alike: dict[bytes, Records] = {}
        self._of_run: dict[str, Records] = {}
        for line in lines:
            self._note(line)

    def append(self, line: Line) -> None:
        """Write one line so that it survives whatever happens next.

        Raises:
            StorageError: the disk is full; nothing of the line stays behind.
        """
        end = self._file.seek(0, os.SEEK_END)
        data = msgspec.json.encode(line) + b"\n"
        try:
            written = self._file.write(data)
            if written != len(data):
                raise OSError(28, os.strerror(28))
            os.fsync(self._file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(end)
            raise write_error(self.path, error) from None
        self._note(line)

    def of_run(self, run: str) -> Records:
        """What was measured under the conditions of a run; if the log does not say them, in that run."""
        return self._of_run.setdefault(run, Records())

    def under(self, origin: Provenance) -> Records:
        """What was measured under the same conditions; all there is, in a log that names none."""
        return self._alike.setdefault(_conditions(origin), Records()) if self._provenance else self

    @property
    def provenance(self) -> dict[str, Provenance]:
        """Conditions of each run."""
        return dict(self._provenance)

    def fileno(self) -> int:
        """Descriptor of the open file."""
        return self._file.fileno()

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def __enter__(self) -> MeasurementLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _note(self, line: Line) -> None:
        if isinstance(line, RunLine):
            self._provenance[line.run] = line.provenance
            self._of_run[line.run] = self.under(line.provenance)
        self.note(line)
        self.of_run(line.run).note(line)

    def _read(self) -> Iterator[Line]:
        decoder: msgspec.json.Decoder[Line] = msgspec.json.Decoder(Line)
        with self.path.open("rb") as stream:
            for number, text in enumerate(stream, start=1):
                try:
                    line = decoder.decode(_up_to_date(text))
                except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                    raise FileFormatError(
                        f"{self.path} line {number} is not a measurement: {error}; "
                        "restore the line, or move the file away and measure anew"
                    ) from None
                if isinstance(line, RunLine) and line.schema != SCHEMA:
                    raise FileFormatError(
                        f"{self.path} line {number} has schema {line.schema!r}; this version reads {SCHEMA!r}"
                    )
                yield line
