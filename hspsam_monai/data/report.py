"""What the check of a data set found, as a table for people and as JSON for programs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Finding:
    """One fault or warning.

    Args:
        kind: short name, such as ``"missing_mask"``; see :func:`hspsam_monai.data.check_dataset` for all.
        file: path relative to the data set, or a case name.
        message: found, expected, and what to do.
    """

    kind: str
    file: str
    message: str


@dataclass
class Report:
    """All findings of one data set.

    Args:
        root: the data set as it was given.
        faults: what must be mended before training.
        warnings: what should be looked at.
        counts: numbers of cases, splits, empty masks and pixels of each class.
    """

    root: str
    faults: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether there is no fault; warnings are allowed."""
        return not self.faults

    def table(self, limit: int = 200) -> str:
        """Plain text: counts, then each fault and warning as ``kind  file  message``.

        Args:
            limit: rows shown of faults and of warnings; the rest is counted.
        """
        lines = [f"{self.root}: {len(self.faults)} faults, {len(self.warnings)} warnings"]
        lines += [f"  {name.replace('_', ' ')}: {value}" for name, value in self.counts.items()]
        for title, findings in (("FAULTS", self.faults), ("WARNINGS", self.warnings)):
            if not findings:
                continue
            shown = findings[:limit]
            kind_width = max(len(finding.kind) for finding in shown)
            file_width = min(48, max(len(finding.file) for finding in shown))
            lines += ["", title]
            lines += [f"  {f.kind:<{kind_width}}  {f.file:<{file_width}}  {f.message}" for f in shown]
            if len(findings) > limit:
                lines.append(f"  … and {len(findings) - limit} more")
        return "\n".join(lines)

    def to_json(self) -> str:
        """Write the report as JSON text with the keys root, ok, counts, faults, warnings."""
        return json.dumps(
            {
                "root": self.root,
                "ok": self.ok,
                "counts": self.counts,
                "faults": [asdict(finding) for finding in self.faults],
                "warnings": [asdict(finding) for finding in self.warnings],
            },
            indent=1,
            ensure_ascii=False,
        )
