"""Counters watched around load: what grew, on which device, during which check."""

from typing import Any, Dict, List, Optional, Set, Tuple

from probes.agent import record
from probes.agent.api import Scalar

Key = Tuple[str, Optional[str]]


class Watch:
    """Takes the collectors' records, sample by sample, and says what changed."""

    def __init__(self, spec: Dict[str, Any]) -> None:
        self.check = str(spec["check"])
        self.every = float(spec.get("every") or 0.0)
        self.collect: List[Dict[str, Any]] = list(spec["collect"])
        self._last: Dict[Key, Optional[float]] = {}
        self._grown: Dict[Key, Optional[float]] = {}
        self._peaks: Dict[Key, float] = {}
        self._evidence: List[str] = []
        self._failed: Dict[str, Tuple[str, str]] = {}
        self._answered: Set[str] = set()
        self._absent: Dict[str, str] = {}
        self._sampled = False

    def take(self, entry: Dict[str, Any], found: Dict[str, Any], first: bool, when: str) -> None:
        """One collector's record. `when`: the check that ran since the last sample."""
        self._sampled = True
        check = str(entry["check"])
        status = found["status"]
        if status == "not_applicable":
            self._absent[check] = found["detail"]
            return
        if status == "answered":
            self._answered.add(check)
        elif status != "unsupported" or check not in self._failed:
            self._failed[check] = (status, found["detail"])
        seen = {(m, d): v for m, d, v in found["measures"] if _is_number(v)}
        for metric, name in (entry.get("peaks") or {}).items():
            for (m, device), value in seen.items():
                if m == metric:
                    self._peaks[name, device] = max(value, self._peaks.get((name, device), value))
        for metric, name in (entry.get("counters") or {}).items():
            self._count(name, {d: v for (m, d), v in seen.items() if m == metric}, first, when)

    def _count(self, name: str, seen: Dict[Optional[str], float], first: bool, when: str) -> None:
        if first:
            for device, value in seen.items():
                self._last[name, device], self._grown[name, device] = value, 0
            return
        known = {device for n, device in self._grown if n == name}
        for device in sorted(known | set(seen), key=str):
            key = (name, device)
            before, now = self._last.get(key), seen.get(device)
            of = name if device is None else "%s of %s" % (name, device)
            if now is None or before is None:
                if self._grown.get(key, 0) is not None:
                    self._evidence.append(
                        "%s: no value %s %s" % (of, "after" if now is None else "before", when)
                    )
                self._grown[key] = self._last[key] = None
                continue
            growth = now - before
            if growth < 0:
                self._evidence.append("%s was reset from %g during %s" % (of, before, when))
                growth = now
            elif growth > 0:
                self._evidence.append("%s grew by %g during %s" % (of, growth, when))
            total = self._grown[key]
            assert total is not None
            self._grown[key], self._last[key] = total + growth, now

    def record(self, seconds: float, aborted: str = "") -> str:
        """The record of the whole watch. A counter that could not be read throughout is null, never zero."""
        if aborted:
            return record.ended(self.check, "timeout", aborted, seconds, self._evidence)
        if not self._sampled:
            return record.ended(self.check, "not_applicable", "nothing loaded this node")
        measures: List[List[Scalar]] = [
            [name, device, grown] for (name, device), grown in self._grown.items()
        ]
        measures += [[name, device, peak] for (name, device), peak in self._peaks.items()]
        lines = ["%s: %s: %s" % (check, status, detail) for check, (status, detail) in self._failed.items()]
        if measures:
            measures += self._never_read()
            return record.answered(self.check, measures, seconds, (lines + self._evidence)[:50])
        if self._failed:
            statuses = {status for status, _ in self._failed.values()}
            status = next(s for s in ("timeout", "error", "unsupported") if s in statuses)
            return record.ended(self.check, status, "; ".join(lines), seconds)
        if self._absent:
            return record.ended(self.check, "not_applicable", "; ".join(self._absent.values()), seconds)
        return record.ended(
            self.check, "error", "the collectors gave none of the counters asked for", seconds
        )

    def _never_read(self) -> List[List[Scalar]]:
        """Null for each counter of a collector that failed in every sample: left out, it would read as sound.

        A collector that is not for this node (not applicable, or unsupported throughout) has no counters.
        """
        known = {name for name, _ in self._grown}
        return [
            [name, None, None]
            for entry in self.collect
            if entry["check"] not in self._answered
            and self._failed.get(entry["check"], ("unsupported", ""))[0] != "unsupported"
            for name in (entry.get("counters") or {}).values()
            if name not in known
        ]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
