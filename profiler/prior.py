"""The prior of a session's searches: what chunks and links cost, from a profile, timed, or guessed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from msgspec.structs import replace

from kvr_partition.errors import RankError, UnsupportedError
from kvr_partition.machine.cost import FitError
from kvr_partition.machine.machine import Machine
from kvr_partition.machine.profile import Profile
from kvr_partition.measurement import Measurement
from profiler.calibrate import guessed_machine, keep_samples, measured_machine, time_links
from profiler.listener import Listener
from profiler.measure import Candidate
from profiler.ranks import RankGroup
from profiler.sizes import profile_chunk_sizes
from profiler.store import MeasurementLog


@dataclass
class Prior:
    """What is known of the costs of a group's ranks before any partition is measured.

    Attributes:
        group: the ranks.
        log: where every timed chunk and message goes.
        profile: of these ranks, measured before; None: they are timed.
        asked: whether it was found out.
        machine: with the size effects of chunks; None if nothing tells.
        reference: what waits are held against: a machine whose links were timed.
        chunks_timed: whether its costs come from chunks, and not from a guess.
        costs_known: whether the log tells what chunks cost.
    """

    group: RankGroup
    log: MeasurementLog
    profile: Profile | None = None
    asked: bool = field(init=False, default=False)
    machine: Machine | None = field(init=False, default=None)
    reference: Machine | None = field(init=False, default=None)
    chunks_timed: bool = field(init=False, default=False)
    costs_known: bool = field(init=False, default=False)

    def check_profile(self, longest: int) -> None:
        """Refuse a profile that is of other ranks, or of shorter contexts.

        Args:
            longest: tokens of the longest context, with what precedes it.

        Raises:
            UnsupportedError: it is.
        """
        if self.profile is None:
            return
        differing = self.group.provenance.difference(self.profile.provenance)
        if differing is not None:
            raise UnsupportedError(f"the profile is of other ranks: {differing} (now, then); measure one of these")
        if longest > self.profile.context:
            raise UnsupportedError(
                f"the profile tells of contexts up to {self.profile.context} tokens, not of {longest}; "
                "measure one for those"
            )

    def find_out(
        self,
        quanta: Mapping[int, int],
        past: int,
        measure: Callable[[Candidate], Measurement],
        listener: Listener,
    ) -> None:
        """Find the machine out.

        Args:
            quanta: by context, what boundaries are multiples of.
            past: tokens before each context.
            measure: times a candidate that costs are guessed from.
            listener: told of what is under way.

        Raises:
            RankError: the ranks failed.
        """
        longest = max(quanta)
        if self.profile is None:
            machine = self._timed_or_guessed(longest, past, measure, listener)
        else:
            machine = self._profiled(self.profile)
        self.machine = None if machine is None else self._with_sizes(machine, quanta, listener)
        self.asked = True

    def _profiled(self, profile: Profile) -> Machine:
        keep_samples(profile, self.log, self.group.run)
        self.costs_known = self.chunks_timed = True
        self.reference = profile.machine("fanout" if self.group.topology == "fanout" else "chain")
        return self.reference

    def _timed_or_guessed(
        self, longest: int, past: int, measure: Callable[[Candidate], Measurement], listener: Listener
    ) -> Machine | None:
        listener.doing("timing a few chunks and the links")
        try:
            self.reference = measured_machine(self.group, longest + past, self.log)
            self.costs_known = self.chunks_timed = True
            return self.reference
        except FitError as error:
            # Measurements correct a guess as well as a fit; it only takes a few more of them.
            listener.say(f"  going on from a guess of what chunks cost: {error}")
        guess: Machine | None = None
        with contextlib.suppress(RankError):
            guess = guessed_machine(self.group, longest, measure)
            self.costs_known = True
            with contextlib.suppress(FitError):
                self.reference = replace(guess, link=time_links(self.group, self.log))
        return guess

    def _with_sizes(self, machine: Machine, quanta: Mapping[int, int], listener: Listener) -> Machine:
        if self.group.tile_rows > 1:
            listener.doing("timing chunk sizes")
        try:
            return profile_chunk_sizes(self.group, machine, quanta, self.log)
        except RankError as error:
            listener.say(f"  going on without knowing what single chunk sizes take: {error}")
            return machine
