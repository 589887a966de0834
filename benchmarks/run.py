"""``make bench``: run the benchmarks that need no training, say what is missing, write RESULTS.md.

The studies that train for hours (unseen_sources.py, prompt_ablation.py) are started by hand, see README.md; what they
have finished stays in RESULTS.md.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from types import ModuleType

import box_prompt
import speed
from common import logger, shared_folder
from results import RESULTS

from hspsam_monai.bundle_path import bundle_root
from hspsam_monai.encoders.catalogue import CATALOGUE, locate
from hspsam_monai.errors import HspsamError


def main(argv: list[str] | None = None) -> int:
    """Run what can run here; 1 if a benchmark failed, whatever it failed of: the others still run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shared = shared_folder()
    parser.add_argument("--data", type=Path, default=shared and shared / "data" / "polyp", help="folder of data sets")
    parser.add_argument("--weights", type=Path, default=shared and shared / "weights", help="folder of mobile_sam.pt")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="smoke run; never reaches RESULTS.md")
    parser.add_argument("--dry", action="store_true", help="print the tables, leave the results file alone")
    args = parser.parse_args(argv)

    common = ["--results", str(args.results)] + ["--dry"] * args.dry
    # speed.py refuses a folder that is named and absent; one that is merely usual is left out.
    usual = args.data == parser.get_default("data")
    data = ["--data", str(args.data)] if args.data is not None and (not usual or args.data.is_dir()) else []
    failed = False
    missing = _missing(args.data, args.weights)
    if missing:
        print("box_prompt: not run.\n  " + "\n  ".join(missing))
    else:
        weights = ["--weights", str(args.weights) if args.weights else "catalogue"]
        failed |= _fails(box_prompt, [*common, *data, *weights, *(["--limit", "2"] if args.quick else [])])
    failed |= _fails(speed, [*common, *data, *(["--quick"] if args.quick else [])])
    open_sections = unmeasured(args.results)
    print(f"Not measured in {args.results.name}: {', '.join(open_sections) or 'nothing'}. See benchmarks/README.md.")
    return int(failed)


def _fails(script: ModuleType, words: list[str]) -> bool:
    try:
        return bool(script.main(words))
    except HspsamError as error:
        print(f"{script.__name__}: failed. {error}", file=sys.stderr)
    except Exception:
        logger.exception("%s: failed.", script.__name__)
    return True


def _missing(data: Path | None, weights: Path | None) -> list[str]:
    """Say what box_prompt lacks, and where it would come from."""
    found = []
    if not (bundle_root() / "models" / "model.pt").is_file():
        found.append("The bundle has no models/model.pt; train one and copy it there.")
    if data is None or not data.is_dir():
        found.append("No data: give --data, a folder of data sets with images/, masks/ and splits.json.")
    try:
        locate(weights / CATALOGUE["mobile_sam"].file_name if weights else "mobile_sam")
    except HspsamError as error:
        found.append(str(error))
    return found


def unmeasured(path: Path) -> list[str]:
    """Names of the sections of a results file that hold no figure yet."""
    sections = re.findall(r"<!-- section: (\S+) -->(.*?)<!-- end: \1 -->", path.read_text(encoding="utf-8"), re.DOTALL)
    return [name for name, content in sections if content.strip().lower().startswith("not measured")]


if __name__ == "__main__":
    sys.exit(main())
