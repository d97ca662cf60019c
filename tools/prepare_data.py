# Copyright (c) OpenMind bundle collection. SPDX-License-Identifier: Apache-2.0
"""Look at data, choose what to pre-train on, prepare it ahead of time on as many machines as there are, and check it.

  python tools/prepare_data.py scan FOLDER                          # what is there, from headers alone; writes nothing
  python tools/prepare_data.py scan FOLDER --output report          # also report/scan.json and report/scan.png
  python tools/prepare_data.py list FOLDER --output datalist.json --modality T1w,T2w --max_quality_score 3
  python tools/prepare_data.py prepare FOLDER --store_dir /data/store --num_workers 16
  python tools/prepare_data.py verify /data/store

FOLDER is any folder of volumes, a BIDS data set, the OpenMind data set, or a file: nnssl's pretrain_data.json,
OpenMind's table, a MONAI datalist. --help after a command explains its settings; docs/data.md tells the whole of it.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from tools.commanding.running import main
from tools.preparing.settings import ListCases, Prepare, Scan, Verify

__all__ = ["list_cases", "prepare", "scan", "verify"]


def scan(settings: Scan) -> None:
    """Print what is in a folder, from headers alone: volumes, subjects, modalities, sizes, spacings, problems."""
    from tools.preparing.scanning import scan as run

    run(settings)


def list_cases(settings: ListCases) -> None:
    """Write a datalist to pre-train on: what passes the filters, split by subject."""
    from tools.preparing.scanning import list_cases as run

    run(settings)


def prepare(settings: Prepare) -> None:
    """Prepare every volume that pre-training would use, unless it is there. Stop and start it as you like.

    Settings must be those of pretrain.yaml, or pre-training prepares the volumes again.
    """
    from tools.preparing.filling import prepare as run

    run(settings)


def verify(settings: Verify) -> None:
    """Read every file of a store and compare it with the checksum that was noted when it was written.

    What is damaged is printed and written to STORE/damaged.txt; the exit status is 1 if there is any and it stays.
    """
    from tools.preparing.filling import verify as run

    run(settings)


if __name__ == "__main__":
    main({"scan": scan, "list": list_cases, "prepare": prepare, "verify": verify}, __doc__)
