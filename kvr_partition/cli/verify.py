"""Certify that a split prefill equals one rank: KV of every layer on every rank, and the logits.

Both are compared with a run in higher precision on the same weights (float32 for half precision, float64
for float32). The split holds if it is no further away than rounding puts the single run. The exit code is
0 if all methods hold and 1 if one does not; the first layer and rank that diverge are named.

Example:
  kvr-partition verify --context 512 --ranks 3 --dtype bfloat16
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvr_partition.cli.options import add_output, add_past, add_ranks, make_group, need_at_least, parse_bytes
from kvr_partition.errors import KVRError, PartitionError, StorageError, UnsupportedError
from kvr_partition.methods import method_of
from kvr_partition.partition import Partition
from kvr_partition.provenance import weights_line

if TYPE_CHECKING:
    from kvr_partition.certificate import Certificate
    from profiler.measure import Candidate
    from profiler.ranks import RankGroup


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``verify``."""
    group = parser.add_argument_group("verify")
    group.add_argument("--context", type=int, default=512, help="prompt length (default 512)")
    group.add_argument("--partition", metavar="SIZES", help="the split, like 300/212; even if not given")
    add_past(group)
    group.add_argument("--methods", default="kvr", help="comma-separated; default kvr (see compare)")
    group.add_argument("--noise", metavar="BYTES", default="0", help="background traffic per layer, like 1MB")
    group.add_argument("--out", metavar="FOLDER", help="write a certificate per method there")
    add_ranks(parser)
    add_output(parser)


def run(options: argparse.Namespace) -> None:
    """Verify and print."""
    need_at_least("ranks", options.ranks, 1)
    partition = (
        Partition.even(options.context, options.ranks, past=options.past)
        if options.partition is None
        else Partition(Partition.parse(options.partition, options.context).sizes, options.past)
    )
    if partition.ranks != options.ranks:
        raise PartitionError(f"--partition has {partition.ranks} chunks, but there are {options.ranks} ranks")
    noise = int(parse_bytes(options.noise, "--noise"))
    group = make_group(options)

    from kvr_partition.cli.show import Progress, print_json

    folder = None if options.out is None else Path(options.out)
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{folder} cannot be made: {error.strerror}") from None
    candidates = [_candidate(name.strip(), partition, noise) for name in options.methods.split(",")]
    for candidate in candidates:
        group.check(candidate)
    certificates = []
    with Progress(len(candidates), options.quiet) as progress, group:
        for candidate in candidates:
            progress.doing(f"verifying {candidate.method} on {group.ranks} {group.backend} ranks")
            certificate = group.verify(candidate)
            certificates.append(certificate)
            if folder is not None:
                certificate.save(folder / f"{candidate.method}.certificate.json")
            progress.advance(1)
    if options.format == "json":
        print_json(
            [{"certificate": one, "holds": one.holds, "divergence": one.divergence} for one in certificates]
        )
    else:
        _show(group, certificates)
    _refuse_broken(certificates)


def _candidate(name: str, partition: Partition, noise: int) -> Candidate:
    """What is verified of a method: the split, or what it cuts by itself.

    Raises:
        UnsupportedError: it is not there, or nothing that one rank can be compared with.
    """
    from profiler.measure import Candidate

    method = method_of(name)
    if not method.verifiable:
        raise UnsupportedError(f"{name} cannot be compared with one rank; leave it out of --methods")
    if method.splits:
        return Candidate(name, partition, noise)
    ranks = 1 if method.alone else partition.ranks
    return Candidate(name, Partition.even(partition.context, ranks, past=partition.past), noise)


def _show(group: RankGroup, certificates: Sequence[Certificate]) -> None:
    from kvr_partition.cli.show import print_table

    print(f"{group.geometry.name} on {group.ranks} {group.backend} ranks, {group.dtype}")
    print(weights_line(group.weights))
    layers = certificates[0].provenance.layers if certificates else ""
    print(f"layers: {layers}")
    for line in group.layers_left if layers != "stock" else ():
        print(f"left as it is: {line}")
    print()
    rows = []
    for certificate in certificates:
        worst = max(certificate.deviations, key=lambda each: each.split, default=None)
        rows.append(
            [
                certificate.method,
                "/".join(map(str, certificate.sizes)),
                "holds" if certificate.holds else "DIVERGES",
                "" if worst is None else f"{worst.split:.1e}",
                "" if worst is None else f"{worst.single:.1e}",
                "same" if certificate.same_token else "differs",
            ]
        )
    print_table(
        ["method", "chunks", "certificate", "largest error", "single's there", "first token"], rows, left=3
    )


def _refuse_broken(certificates: Sequence[Certificate]) -> None:
    """Say where the first of those that do not hold diverges.

    Raises:
        KVRError: one does not hold.
    """
    broken = next((certificate for certificate in certificates if not certificate.holds), None)
    if broken is None:
        return
    at = broken.divergence
    where = (
        "only in its first token"
        if at is None
        else f"at rank {at.rank}, {'logits' if at.layer is None else f'layer {at.layer}'}: "
        f"{at.split:.2e} from {broken.reference}, one rank {at.single:.2e}"
    )
    raise KVRError(f"{broken.method} does not equal one rank; it diverges first {where}")
