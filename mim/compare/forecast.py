"""What a comparison will take and what it can show, before it runs: ``mim compare --plan``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mim.compare.sequential import SeedRule, family_of, nominal_level
from mim.compare.statistics import LEVEL, Design, Family, Values, pooled_spread


@dataclass(frozen=True)
class Forecast:
    """What is known of a comparison before it runs.

    Attributes:
        groups: their number.
        seeds: the least and the most that a group takes.
        references: number of runs that train nothing.
        finished: number of runs that have a result already.
        seconds: what is left takes, one run after the other, with the least and the most seeds;
            empty where nothing is known.
        counted: how the seconds are known, and what is among them.
        jobs: runs at once.
        values: group -> seed -> the primary measure, of finished runs.
        scale: printed over stored value: 100 for points of per cents.
        against: whether all groups are compared with one of them.
        more: lines about equal work and tuning.
    """

    groups: int
    seeds: tuple[int, int]
    references: int = 0
    finished: int = 0
    seconds: Sequence[float] = ()
    counted: str = ""
    jobs: int = 1
    values: Values | None = None
    scale: float = 100.0
    against: bool = False
    more: Sequence[str] = ()

    @property
    def family(self) -> Family:
        """The comparisons that the primary measure decides."""
        names = [str(number) for number in range(self.groups)]
        return family_of(names, names[0] if self.against else None)

    def design(self, sd: float) -> Design:
        """The design at its last seed."""
        least, most = self.seeds
        level = LEVEL
        if least < most:
            level = nominal_level(most, SeedRule(least, most), self.family)
        return Design(self.family, most, sd, level)

    def lines(self) -> list[str]:
        """What ``--plan`` prints."""
        return [self._runs(), *self.more, self._hours(), self._power()]

    def _runs(self) -> str:
        least, most = self.seeds
        seeds = f"{most} seeds" if least == most else f"{least} to {most} seeds, until decided"
        count = f"{self.groups * least}"
        if least < most:
            count += f" to {self.groups * most}"
        text = f"runs: {count} ({self.groups} groups, {seeds}), {self.references} references"
        return f"{text}; {self.finished} are finished"

    def _hours(self) -> str:
        if not self.seconds:
            return "time: not known before a run has finished"
        span = " to ".join(f"{each / self.jobs / 3600:.2g}" for each in self.seconds)
        at_once = f", {self.jobs} at once" if self.jobs > 1 else ""
        return f"time: {span} h left{at_once}: {self.counted}"

    def _power(self) -> str:
        if self.groups < 2:
            return "smallest difference shown: there is one group, and nothing to compare"
        spread = pooled_spread(self.values) if self.values else None
        smallest = self.design(spread.sd if spread else 1.0).smallest()
        if smallest is None:
            return "smallest difference shown: none; fewer than three seeds give no interval"
        head = "smallest difference shown with 80 % power:"
        if spread is None:
            return f"{head} {smallest:.3g} standard deviations of a run over seeds"
        unit = " points" if self.scale == 100 else ""
        return (
            f"{head} {self.scale * smallest:.3g}{unit}, by a standard deviation over seeds of "
            f"{self.scale * spread.sd:.3g} ({spread.df} degrees of freedom so far)"
        )
